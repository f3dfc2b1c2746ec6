"""The checks of ``headwise verify``. Each gives lines with PASS, FAIL or NOT RUN, and does not raise for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from headwise.artifacts import digest_file
from headwise.device.arrays import Array, Arrays, Port
from headwise.device.bundle import ARCHIVE, CACHE, Artifact, Bundle
from headwise.device.cuda import gpu
from headwise.device.machine import cpu_model
from headwise.device.runtimes import MODULES, ORT, load_runtime
from headwise.errors import MissingDependencyError

PASS: Final = "PASS"
FAIL: Final = "FAIL"
NOT_RUN: Final = "NOT RUN"
Outcome = Literal["PASS", "FAIL", "NOT RUN"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the result.

    Attributes:
        name: ``files``, ``runtime``, ``ports``, ``golden``, ``latency``, ``memory`` or ``selftest``.
        outcome: FAIL where a check said no, NOT RUN where this machine cannot.
        found: what was found; ``expected`` and ``fix`` are empty where it is right.
        values: the same as numbers.
    """

    name: str
    outcome: Outcome
    found: str
    expected: str = ""
    fix: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def check_files(bundle: Bundle, names: Sequence[str]) -> list[Check]:
    """Sizes and hashes of files against the manifest."""
    wrong = [check for name in names if (check := _check_file(bundle, name)) is not None]
    return wrong or [Check(name="files", outcome=PASS, found=f"{len(names)} files with the recorded size and hash")]


def _check_file(bundle: Bundle, name: str) -> Check | None:
    path, recorded = bundle.folder / name, bundle.files.get(name)
    again = "copy the bundle again, and see that the disk is not full"
    if recorded is None or not path.is_file():
        where = "the manifest" if recorded is None else "the bundle"
        found = f"{name} is missing in {where}"
        return Check(name="files", outcome=FAIL, found=found, expected="every file", fix=again)
    size, whole = path.stat().st_size, recorded["bytes"]
    if size < whole and any(name == engine.file for engine in bundle.engines):
        return Check(
            name="files",
            outcome=FAIL,
            found=f"the engine {name} is truncated: {size:,} of {whole:,} bytes",
            expected="the whole file; a runtime may crash on a part of one",
            fix=again,
        )
    if size != whole:
        return Check(
            name="files", outcome=FAIL, found=f"{name} has {size:,} bytes", expected=f"{whole:,} bytes", fix=again
        )
    digest = digest_file(path)
    if digest != recorded["sha256"]:
        return Check(
            name="files",
            outcome=FAIL,
            found=f"the content of {name} has changed: sha256 {digest[:16]}...",
            expected=f"sha256 {recorded['sha256'][:16]}...",
            fix="copy the bundle again; nothing in it may be edited",
        )
    return None


def check_runtime(artifact: Artifact) -> Check:
    """Whether the runtime is here, in the version that an engine needs, and the GPU that it was built for."""
    try:
        version = str(load_runtime(artifact.runtime).__version__)
    except MissingDependencyError as error:
        return _not_here(error.found, error.expected, error.fix)
    if artifact.runtime == ORT:
        device = cpu_model()
        return Check(
            name="runtime",
            outcome=PASS,
            found=f"onnxruntime {version} on {device}; the golden outputs were made with {artifact.version}",
            values={"runtime": ORT, "version": version, "device": device, "golden_version": artifact.version},
        )
    here = gpu()
    rebuild = f"build an engine for this device: python {ARCHIVE} build --runtime {artifact.runtime}"
    if here is None:
        return _not_here("no GPU", f"a GPU of sm{artifact.sm} and its driver", "run this on the device, or use --onnx")
    if here.sm != artifact.sm:
        return _not_here(f"{here.name} is sm{here.sm}", f"sm{artifact.sm}, which the engine was built for", rebuild)
    if version != artifact.version:
        found = f"{MODULES[artifact.runtime]} {version}"
        expected = f"{artifact.version}, which built the engine: engines do not survive a change of version"
        return _not_here(found, expected, f"{rebuild}; or install version {artifact.version}")
    return Check(
        name="runtime",
        outcome=PASS,
        found=f"{MODULES[artifact.runtime]} {version} on {here.name}, sm{here.sm}",
        values={"runtime": artifact.runtime, "version": version, "device": here.name, "sm": here.sm},
    )


def _not_here(found: str, expected: str, fix: str) -> Check:
    return Check(name="runtime", outcome=NOT_RUN, found=found, expected=expected, fix=fix)


def check_ports(artifact: Artifact, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> Check:
    """Names, dtypes and sizes of what was loaded against the manifest; axes that vary on either side fit any size."""
    for side, wanted, found in (("input", artifact.inputs, inputs), ("output", artifact.outputs, outputs)):
        problem = _renamed(side, wanted, found) or _changed(side, wanted, found)
        if problem is not None:
            return Check(name="ports", outcome=FAIL, found=problem[0], expected=problem[1], fix=_ANOTHER)
    return Check(name="ports", outcome=PASS, found=f"inputs {', '.join(inputs)}; outputs {', '.join(outputs)}")


_ANOTHER = "this is another model than the manifest's: make the bundle again, or build the engine again from its graph"


def _renamed(side: str, wanted: Mapping[str, Port], found: Mapping[str, Port]) -> tuple[str, str] | None:
    missing, extra = [name for name in wanted if name not in found], [name for name in found if name not in wanted]
    if not missing and not extra:
        return None
    expected = f"{side}s " + ", ".join(wanted)
    for name in missing:
        for other in extra:
            if _fits(wanted[name], found[other]):
                return f'{side} "{name}" was renamed: it is called "{other}"', expected
    if missing:
        return f'{side} "{missing[0]}" is missing; there are {", ".join(found)}', expected
    return f'{side} "{extra[0]}" is not in the manifest', expected


def _changed(side: str, wanted: Mapping[str, Port], found: Mapping[str, Port]) -> tuple[str, str] | None:
    wrong = [name for name in wanted if not _fits(wanted[name], found[name])]
    for name in wrong:
        for other in wrong:
            if name != other and _fits(wanted[name], found[other]) and _fits(wanted[other], found[name]):
                return _swapped(f"{side}s", name, other)
    if not wrong:
        return None
    return f'{side} "{wrong[0]}" is {_text(found[wrong[0]])}', _text(wanted[wrong[0]])


def _swapped(what: str, name: str, other: str) -> tuple[str, str]:
    return f'the {what} "{name}" and "{other}" are swapped', f'"{name}" and "{other}" as the manifest has them'


def _fits(wanted: Port, found: Port) -> bool:
    sizes = zip(wanted.dims, found.dims, strict=False)
    fit = all(isinstance(a, str) or isinstance(b, str) or a == b for a, b in sizes)
    return wanted.dtype == found.dtype and len(wanted.dims) == len(found.dims) and fit


def _text(port: Port) -> str:
    return f"{port.dtype} ({', '.join(map(str, port.dims))})"


def check_golden(
    artifact: Artifact, golden: Mapping[str, Arrays], found: Mapping[str, Arrays], tolerance: float | None = None
) -> list[Check]:
    """One line per output: its largest difference to the golden outputs, relative to their largest value.

    What a decoder caches gets one line together, where it is right.

    Args:
        artifact: knows the tolerances.
        golden: case -> output -> what it has to be.
        found: case -> output -> what it is.
        tolerance: in the place of the manifest's.
    """
    checks, cached = list[Check](), list[Check]()
    limits = {name: artifact.tolerance[name] if tolerance is None else tolerance for name in artifact.outputs}
    for name, limit in limits.items():
        error = difference(golden, found, name, name)
        values = {"output": name, "difference": error if np.isfinite(error) else None, "tolerance": limit}
        if error <= limit:
            text = f'output "{name}" is within {error:.2g} of its largest value; {limit:g} is allowed'
            (cached if name.startswith(CACHE) else checks).append(
                Check(name="golden", outcome=PASS, found=text, values=values)
            )
            continue
        twin = next((o for o in limits if o != name and difference(golden, found, o, name) <= limits[o]), None)
        if twin is not None:
            problem = f'output "{name}" gives what output "{twin}" should give: the outputs are swapped'
        elif not np.isfinite(error):
            problem = f'output "{name}" has other shapes than the golden output, or values that are not finite'
        else:
            problem = f'output "{name}" is {error:.2g} of its largest value away from the golden output'
        expected, fix = f"at most {limit:g} for {artifact.precision}", "do not deploy this: " + _ANOTHER
        checks.append(Check(name="golden", outcome=FAIL, found=problem, expected=expected, fix=fix, values=values))
    if cached:
        worst = max(cached, key=lambda check: check.values["difference"])
        checks.append(replace(worst, found=f"{len(cached)} cached outputs; of the worst, {worst.found}"))
    return checks


def difference(golden: Mapping[str, Arrays], found: Mapping[str, Arrays], wanted: str, name: str) -> float:
    """Over all cases, the largest difference of output ``name`` to golden output ``wanted``, relative to the largest
    golden value; infinite where shapes differ or a value is not finite.
    """
    pairs = [(_float(golden[case][wanted]), _float(found[case][name])) for case in golden]
    if any(right.shape != left.shape or not np.isfinite(right).all() for left, right in pairs):
        return float("inf")
    largest = max(float(np.abs(left).max(initial=0)) for left, _ in pairs)
    error = max(float(np.abs(right - left).max(initial=0)) for left, right in pairs)
    return error / largest if largest else (0.0 if error == 0 else float("inf"))


def _float(array: Array) -> Array:
    return np.asarray(array, dtype=np.float64)


def required(bundle: Bundle, artifact: Artifact) -> list[str]:
    """The files that running an artifact on its golden inputs needs."""
    inputs = [bundle.cases[case] for case in artifact.golden]
    return list(dict.fromkeys([*artifact.files, *inputs, *artifact.golden.values()]))
