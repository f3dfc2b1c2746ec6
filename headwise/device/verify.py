"""``headwise verify``: is this bundle what was made, and does it run here as it did there?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headwise.device.bundle import ARCHIVE, ONNX, Artifact, Bundle
from headwise.device.checks import (
    FAIL,
    NOT_RUN,
    PASS,
    Check,
    check_files,
    check_golden,
    check_ports,
    check_runtime,
    required,
)
from headwise.device.cuda import gpu
from headwise.device.loading import Session, load, run_case
from headwise.device.measure import latency, memory
from headwise.errors import BundleError, EngineError, ExportError, HeadwiseError

ROUNDS = 50
_ORDER = ("files", "runtime", "ports", "golden", "latency", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result.

    Attributes:
        bundle: its name.
        artifact: what was run, or was to be run.
        checks: in order.
        note: why it is not an engine, where the bundle has some and none was asked for.
    """

    bundle: str
    artifact: str
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def exit_code(self) -> int:
        """1 where a check said no, 4 where something could not be checked here, else 0."""
        outcomes = {check.outcome for check in self.checks}
        return 1 if FAIL in outcomes else 4 if NOT_RUN in outcomes else 0

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "bundle": self.bundle,
            "artifact": self.artifact,
            "note": self.note,
            "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to verify, and how.

    Attributes:
        artifact: name of an engine, or ``onnx``; None takes what this machine can run, and checks every file.
        rounds: measured calls; 0 measures nothing.
        tolerance: in the place of the manifest's tolerances.
    """

    artifact: str | None = None
    rounds: int = ROUNDS
    tolerance: float | None = None


def choose(bundle: Bundle, name: str | None) -> Artifact:
    """The artifact with this name; without one the engine for the GPU that is here, the one built here before others,
    and the graph where there is none.

    Raises:
        BundleError: the bundle has no artifact with this name.
    """
    if name is not None:
        return bundle.artifact(name)
    here = gpu()
    fitting = [e for e in bundle.engines if here is not None and e.sm == here.sm and not e.single]
    return fitting[-1] if fitting else bundle.artifact(ONNX)


def verify(bundle: Bundle, wanted: Wanted | None = None) -> Verification:
    """Check files, runtime and device, inputs and outputs, golden outputs; measure latency and memory.

    Raises:
        BundleError: the bundle has no such artifact.
    """
    wanted = wanted or Wanted()
    artifact = choose(bundle, wanted.artifact)
    together = bundle.with_single(artifact)
    needed = list(dict.fromkeys(name for part in together for name in required(bundle, part)))
    checks = check_files(bundle, list(bundle.files) if wanted.artifact is None else needed)
    if check_files(bundle, needed)[0].outcome != FAIL:
        for part in together:
            mark = f"{part.name}: " if part.single else ""
            checks += [replace(check, found=mark + check.found) for check in _run(bundle, part, wanted)]
    done = {check.name for check in checks}
    skipped = ("latency", "memory") if wanted.rounds == 0 else ()
    bad = next((check for check in checks if check.outcome != PASS), None)
    for name in _ORDER:
        if name not in done and name not in skipped and bad is not None:
            checks.append(Check(name=name, outcome=NOT_RUN, found=f"because of what {bad.name} found"))
    note = "" if wanted.artifact or artifact.is_engine else _no_engine(bundle)
    return Verification(bundle=bundle.name, artifact=artifact.name, checks=tuple(checks), note=note)


def _no_engine(bundle: Bundle) -> str:
    here, have = gpu(), ", ".join(f"{engine.name} (sm{engine.sm})" for engine in bundle.engines)
    return have and f"no engine was run: {'no GPU' if here is None else f'this GPU is sm{here.sm}'}; there is {have}"


def _run(bundle: Bundle, artifact: Artifact, wanted: Wanted) -> list[Check]:
    """The checks of an artifact whose files are whole, up to the first that says no."""
    checks: list[Check] = []
    try:
        for found in _steps(bundle, artifact, wanted):
            checks += found
            if any(check.outcome != PASS for check in found):
                break
    except (ExportError, EngineError, BundleError) as error:
        checks.append(Check(name="golden", outcome=FAIL, found=error.found, expected=error.expected, fix=error.fix))
    except HeadwiseError as error:
        fix = f"{error.fix}: python {ARCHIVE} build --runtime {artifact.runtime}" if artifact.is_engine else error.fix
        checks = [Check(name="runtime", outcome=NOT_RUN, found=error.found, expected=error.expected, fix=fix)]
    return checks


def _steps(bundle: Bundle, artifact: Artifact, wanted: Wanted) -> Iterator[Sequence[Check]]:
    yield [check_runtime(artifact)]
    session: Session = load(bundle, artifact)
    try:
        yield [check_ports(artifact, session.inputs, session.outputs)]
        feeds = bundle.feeds(artifact)
        found = {case: run_case(session, artifact, feed) for case, feed in feeds.items()}
        yield check_golden(artifact, bundle.golden(artifact), found, wanted.tolerance)
        if wanted.rounds:
            first = next(iter(feeds.values()))
            yield [latency(lambda feed: run_case(session, artifact, feed), first, wanted.rounds)]
            yield [memory(getattr(session, "device_bytes", None))]
    finally:
        session.close()
