"""ONNX -> TensorRT engine by way of ``device/builder.py``, and the builder's own list of what it made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.artifacts import write_atomic
from headwise.device.builder import Build, build, check_machine
from headwise.errors import EngineError, ExportError
from headwise.export.graph import graph_inputs
from headwise.export.listing import ListingSummary, read_listing
from headwise.export.profiles import Profiles, profiles_for
from headwise.export.targets import Target

__all__ = ["EngineInfo", "build_engine", "engine_runtime", "profiles_for"]


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
    check_machine(target.name, target.sm, target.runtime)
    _check_profiles(onnx_path, profiles)
    result = build(
        Build(
            graph=onnx_path,
            out=out,
            target=target.name,
            sm=target.sm,
            runtime=target.runtime,
            profiles=[profiles, decode] if decode else [profiles],
            workspace_mb=workspace_mb,
        )
    )
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


def _check_profiles(onnx_path: Path, profiles: Profiles) -> None:
    open_inputs = {n for n, dims in graph_inputs(onnx_path).items() if not all(isinstance(dim, int) for dim in dims)}
    if open_inputs != set(profiles):
        raise EngineError(
            f"profiles for {', '.join(sorted(profiles)) or 'no input'}",
            expected="one for every input with a dynamic axis: " + (", ".join(sorted(open_inputs)) or "none"),
            fix="take them from profiles_for",
        )
