"""ONNX -> TensorRT engine, with ``tensorrt_rtx`` or ``tensorrt``, and the builder's own list of what it made."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from headwise.artifacts import storage_error, write_atomic
from headwise.errors import EngineError, ExportError, MachineError, MissingDependencyError
from headwise.export.cuda import gpu
from headwise.export.graph import graph_inputs
from headwise.export.listing import ListingSummary, read_listing
from headwise.export.profiles import Profiles, profiles_for
from headwise.export.targets import FULL, RTX, Target

__all__ = ["EngineInfo", "build_engine", "engine_runtime", "gpu", "load_runtime", "profiles_for"]

_MODULES = {RTX: "tensorrt_rtx", FULL: "tensorrt"}
_HINTS = (
    ("Option mask cannot be used together", "give Attention the mask only, with the causal part in it"),
    ("Cannot compile for target", "the target lacks a type of this graph: choose another precision or target"),
    ("OutOfMemory", "raise export.workspace_mb, or lower the largest batch and sequence"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """One engine.

    Attributes:
        target: the device, as the recipe says it.
        sm: its compute capability.
        runtime: ``tensorrt-rtx`` or ``tensorrt``.
        version: of that package.
        bytes: of the file.
        seconds: of the build, without the start of the process.
        profiles: input -> its smallest, best and largest shape.
        listing: None when the builder did not say.
        weights_bytes, activation_bytes, scratch_bytes: device memory as the builder logged it; None when it did not.
        decode: shapes of calls with one token per row, where the engine has a profile of its own for them.
    """

    target: str
    sm: int
    runtime: str
    version: str
    bytes: int
    seconds: float
    profiles: Profiles
    listing: ListingSummary | None
    weights_bytes: int | None
    activation_bytes: int | None
    scratch_bytes: int | None
    decode: Profiles | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types, for the report."""
        return asdict(self)


def load_runtime(runtime: str) -> ModuleType:
    """The package of a runtime.

    Raises:
        MissingDependencyError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(_MODULES[runtime])
    except ImportError as error:
        raise _missing(runtime, str(error)) from error


def engine_runtime(engine: Path) -> str:
    """Which runtime an engine was built with, from the file that the build left beside it.

    Raises:
        ExportError: that file is not there.
    """
    try:
        return str(json.loads(_sidecar(engine).read_text())["runtime"])
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"{_sidecar(engine).name} beside the engine is missing or damaged",
            expected="the file that the build wrote with the engine",
            fix="copy both files, or name the runtime: tensorrt-rtx or tensorrt",
        ) from error


def build_engine(
    onnx_path: Path,
    out: Path,
    target: Target,
    *,
    profiles: Profiles,
    decode: Profiles | None = None,
    workspace_mb: int | None = None,
) -> EngineInfo:
    """Build an engine in a child process and read back what the builder made.

    Args:
        onnx_path: a graph in the precision that the engine shall have.
        out: the engine; a JSON file with the returned record is written beside it.
        target: with ``tensorrt-rtx`` no GPU is needed; ``tensorrt`` builds on a GPU of the target's capability only.
        profiles: see :func:`profiles_for`.
        decode: a second set of shapes, see :func:`headwise.export.profiles.decode_profiles`.
        workspace_mb: limit of the scratch memory in MiB.

    Raises:
        MissingDependencyError: the package of the runtime is not installed.
        MachineError: ``tensorrt`` without a GPU of the target's capability.
        EngineError: the parser or the builder refused, or its process died.
        StorageError: the engine cannot be written.
    """
    _check_machine(target)
    _check_profiles(onnx_path, profiles)
    job = {
        "module": _MODULES[target.runtime],
        "onnx": str(onnx_path.resolve()),
        "out": str(out.resolve()),
        "sm": target.sm,
        "profiles": [profiles, decode] if decode else [profiles],
        "workspace_mb": workspace_mb,
    }
    result = _run_worker(job)
    if "errno" in result:
        raise storage_error(OSError(result["errno"], os.strerror(result["errno"])), out)
    if "error" in result:
        raise _refused(result["error"], onnx_path, target)
    listing = result.get("listing")
    info = EngineInfo(
        target=target.name,
        sm=target.sm,
        runtime=target.runtime,
        version=result["version"],
        bytes=result["bytes"],
        seconds=result["seconds"],
        profiles=profiles,
        decode=decode or None,
        listing=read_listing(listing) if listing else None,
        weights_bytes=result.get("weights_bytes"),
        activation_bytes=result.get("activation_bytes"),
        scratch_bytes=result.get("scratch_bytes"),
    )
    write_atomic(_sidecar(out), json.dumps(info.to_json(), indent=2))
    return info


def _sidecar(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def _missing(runtime: str, reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{_MODULES[runtime]} cannot be imported: {reason}",
        expected=f"the package of the runtime {runtime}",
        fix=f"pip install {_MODULES[runtime]}",
    )


def _check_profiles(onnx_path: Path, profiles: Profiles) -> None:
    open_inputs = {n for n, dims in graph_inputs(onnx_path).items() if not all(isinstance(dim, int) for dim in dims)}
    if open_inputs != set(profiles):
        raise EngineError(
            f"profiles for {', '.join(sorted(profiles)) or 'no input'}",
            expected="one for every input with a dynamic axis: " + (", ".join(sorted(open_inputs)) or "none"),
            fix="take them from profiles_for",
        )


def _check_machine(target: Target) -> None:
    here = gpu() if target.runtime == FULL else None
    # First the device: on any other, installing the package would not help.
    if target.runtime == FULL and (here is None or here.sm != target.sm):
        raise MachineError(
            f"no GPU of sm{target.sm}" if here is None else f"{here.name} is sm{here.sm}, not sm{target.sm}",
            expected=f"the device itself: tensorrt builds engines only for the GPU that it runs on ({target.name})",
            fix="run this step on the device; the ONNX graph of this run is all that it needs",
        )
    if importlib.util.find_spec(_MODULES[target.runtime]) is None:
        raise _missing(target.runtime, "no such package")


def _refused(reason: str, graph: Path, target: Target) -> EngineError:
    hint = next((fix for text, fix in _HINTS if text in reason), "change the node that is named above")
    return EngineError(
        f"the engine builder refused {graph.name} for {target.name}: {' '.join(reason.split())}",
        expected="a graph that TensorRT can build",
        fix=hint,
    )


def _run_worker(job: Mapping[str, Any]) -> dict[str, Any]:
    package_root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file, log_file = (Path(folder, name) for name in ("job.json", "result.json", "log.txt"))
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "headwise.export.engine_worker", str(job_file), str(result_file)]
        with log_file.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": search})
            try:
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if result_file.exists():
            result: dict[str, Any] = json.loads(result_file.read_text())
            return result
        last = (log_file.read_text(errors="replace").strip().splitlines() or ["nothing on its error output"])[-1]
        raise EngineError(
            f"the builder's process ended with {f'signal {-code}' if code < 0 else f'code {code}'}: {last}",
            expected="an engine or a reason",
            fix="signal 9 is usually too little memory; signal 11 is a graph that the builder does not survive",
        )
