"""The self-test of a deployed model: are the bytes of its outputs still those that they were?

A tolerance cannot see a weight whose lowest bits flipped; equal bytes can. They hold for one runtime in one version on
one device with one number of threads only, so a fingerprint belongs to the environment that it was taken in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwise.device.arrays import Array, Arrays, as_float32
from headwise.device.bundle import ARCHIVE, Artifact, Bundle
from headwise.device.checks import FAIL, PASS, Check, check_files, difference, required
from headwise.device.cuda import require_gpu
from headwise.device.loading import load, run_case
from headwise.device.machine import cpu_model
from headwise.device.runtimes import load_runtime
from headwise.device.verify import Verification, choose
from headwise.errors import EngineError, ExportError, MachineError

Run = Callable[[Arrays], Mapping[str, Array]]
"""Inputs of a call by name -> outputs by name."""
Digests = Mapping[str, str]
"""``case/output`` -> sha256 of the output's dtype, shape and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a self-test found.

    Attributes:
        differing: ``case/output`` of every output whose bytes are others.
        compared: how many outputs were compared.
        worst: the largest difference to the golden outputs, relative to the largest value of the output.
    """

    differing: tuple[str, ...]
    compared: int
    worst: float

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was."""
        return not self.differing


class SelfTest:
    """Runs the golden inputs of a bundle and compares the bytes of the outputs.

    Attributes:
        feeds: case -> inputs, in the dtypes of the artifact.
        expected: the fingerprint to compare with; None where there is none for this environment.
    """

    def __init__(self, bundle: Bundle, artifact: Artifact, expected: Digests | None) -> None:
        self.bundle, self.artifact, self.expected = bundle, artifact, expected
        self.feeds: dict[str, dict[str, Array]] = bundle.feeds(artifact)

    @classmethod
    def open(cls, folder: Path, artifact: str | None = None) -> SelfTest:
        """The self-test of an artifact with the fingerprint of ONNX Runtime on this CPU with one thread, where the
        bundle has it.

        Raises:
            BundleError: the folder is no bundle, or has no such artifact.
            MissingDependencyError: the runtime is not installed.
            MachineError: an engine, and no GPU.
        """
        bundle = Bundle.open(folder)
        chosen = choose(bundle, artifact)
        return cls(bundle, chosen, recorded(bundle, chosen))

    def record(self, run: Run) -> Digests:
        """Take the fingerprint of a session that is known to be good, and compare with it from now on."""
        self.expected = {key: _digest(array) for key, array in self._outputs(run).items()}
        return self.expected

    def check(self, run: Run) -> Finding:
        """Compare a session with the fingerprint.

        Args:
            run: the session, for example ``lambda feed: dict(zip(names, session.run(names, feed)))``. The fingerprints
                of a bundle were taken with one thread and the options of ``open_session``; call :meth:`record` once for
                any other session.

        Raises:
            MachineError: there is no fingerprint of this environment.
        """
        if self.expected is None:
            raise MachineError(
                f"no fingerprint of {self.artifact.name} was recorded for this runtime, version and device",
                expected="one that was taken here: bytes of outputs differ between environments",
                fix=f"record one after a passing verify: python {ARCHIVE} verify --selftest --record",
            )
        found = self._outputs(run)
        differing = [key for key, digest in self.expected.items() if key not in found or _digest(found[key]) != digest]
        return Finding(differing=tuple(differing), compared=len(self.expected), worst=self._worst(found))

    def _outputs(self, run: Run) -> dict[str, Array]:
        return {
            f"{case}/{name}": as_float32(np.asarray(array))
            for case, feed in self.feeds.items()
            for name, array in run(feed).items()
            if name in self.artifact.outputs
        }

    def _worst(self, found: Mapping[str, Array]) -> float:
        golden = self.bundle.golden(self.artifact)
        by_case = {case: {n: found.get(f"{case}/{n}", np.empty(0)) for n in self.artifact.outputs} for case in golden}
        return max(difference(golden, by_case, name, name) for name in self.artifact.outputs)


def environment(artifact: Artifact) -> dict[str, Any]:
    """What equal bytes depend on: runtime, version, device, and the threads that fingerprints are taken with."""
    found: dict[str, Any] = {"runtime": artifact.runtime, "version": str(load_runtime(artifact.runtime).__version__)}
    return found | ({"device": require_gpu().name} if artifact.is_engine else {"device": cpu_model(), "threads": 1})


def recorded(bundle: Bundle, artifact: Artifact) -> Digests | None:
    """The latest fingerprint that was taken of an artifact in this environment; None without one."""
    wanted = {"artifact": artifact.name, "environment": environment(artifact)}
    for entry in reversed(bundle.fingerprints):
        if {key: entry[key] for key in wanted} == wanted:
            return dict(entry["digests"])
    return None


def take(bundle: Bundle, artifact: Artifact) -> dict[str, Any]:
    """A fingerprint of an artifact on this machine, with the environment that it belongs to."""
    session = load(bundle, artifact, threads=1)
    try:
        digests = SelfTest(bundle, artifact, None).record(lambda feed: run_case(session, artifact, feed))
        return {"artifact": artifact.name, "environment": environment(artifact), "digests": dict(digests)}
    finally:
        session.close()


def compare(bundle: Bundle, name: str | None) -> Verification:
    """Load an artifact whatever its files are; compare its outputs with the fingerprint, then its files with hashes.

    The hashes also see a bit that no golden input reaches.

    Raises:
        BundleError: the bundle has no such artifact.
        MachineError: there is no fingerprint of this environment, or the artifact cannot run here.
    """
    artifact = choose(bundle, name)
    try:
        session = load(bundle, artifact, threads=1)
        try:
            test = SelfTest(bundle, artifact, recorded(bundle, artifact))
            check = _check(test.check(lambda feed: run_case(session, artifact, feed)))
        finally:
            session.close()
    except (ExportError, EngineError) as error:
        check = Check(name="selftest", outcome=FAIL, found=error.found, expected=error.expected, fix=error.fix)
    files = check_files(bundle, required(bundle, artifact))
    return Verification(bundle=bundle.name, artifact=artifact.name, checks=(check, *files))


def _check(found: Finding) -> Check:
    values = {"compared": found.compared, "differing": list(found.differing)}
    if found.ok:
        text = f"{found.compared} golden outputs, every byte as recorded"
        return Check(name="selftest", outcome=PASS, found=text, values=values)
    which = ", ".join(found.differing[:4]) + (", ..." if len(found.differing) > 4 else "")
    return Check(
        name="selftest",
        outcome=FAIL,
        found=f"{len(found.differing)} of {found.compared} golden outputs have other bytes ({which}), up to "
        f"{found.worst:.2g} of their largest value away",
        expected="the bytes that were recorded for this runtime, version and device",
        fix="load the model again; if that does not help, copy the bundle again, then suspect the memory",
        values=values,
    )


def _digest(array: Array) -> str:
    contiguous = np.ascontiguousarray(array)
    return hashlib.sha256(f"{contiguous.dtype.str}{array.shape}".encode() + contiguous.tobytes()).hexdigest()
