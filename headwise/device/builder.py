"""Builds engines in a child process: on the machine that compresses, and again on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.artifacts import storage_error
from headwise.device.cuda import gpu
from headwise.device.runtimes import FULL, MODULES, is_installed, missing
from headwise.errors import EngineError, MachineError

Profiles = Mapping[str, Mapping[str, Sequence[int]]]
"""Input -> ``min``, ``opt`` and ``max`` shape."""

_HINTS = (
    ("Option mask cannot be used together", "give Attention the mask only, with the causal part in it"),
    ("builds nothing for", "say the compute capability of the GPU, such as 86, or install a newer version"),
    ("Cannot compile for target", "the target lacks a type of this graph: choose another precision or target"),
    ("OutOfMemory", "raise export.workspace_mb, or lower the largest batch and sequence"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What to build.

    Attributes:
        graph: in the precision that the engine shall have.
        out: the engine's file.
        target: its name, for messages.
        sm: compute capability without the dot.
        runtime: ``tensorrt-rtx`` needs no GPU; ``tensorrt`` builds on a GPU of this capability only.
        profiles: one or two sets of shapes.
        workspace_mb: limit of the scratch memory in MiB; None leaves it to the builder.
    """

    graph: Path
    out: Path
    target: str
    sm: int
    runtime: str
    profiles: Sequence[Profiles]
    workspace_mb: int | None = None


def check_machine(target: str, sm: int, runtime: str) -> None:
    """Raise what keeps this machine from building.

    Raises:
        MissingDependencyError: the package of the runtime is not installed.
        MachineError: ``tensorrt`` without a GPU of the capability.
    """
    here = gpu() if runtime == FULL else None
    # First the device: on any other, installing the package would not help.
    if runtime == FULL and (here is None or here.sm != sm):
        raise MachineError(
            f"no GPU of sm{sm}" if here is None else f"{here.name} is sm{here.sm}, not sm{sm}",
            expected=f"the device itself: tensorrt builds engines only for the GPU that it runs on ({target})",
            fix="run this step on the device; the ONNX graph of this run is all that it needs",
        )
    if not is_installed(runtime):
        raise missing(runtime, "no such package")


def build(wanted: Build) -> dict[str, Any]:
    """Build, and what the builder said: ``version``, ``seconds``, ``bytes``, and what it logged.

    Raises:
        MissingDependencyError: the package of the runtime is not installed.
        MachineError: ``tensorrt`` without a GPU of the capability.
        EngineError: the parser or the builder refused, or its process died.
        StorageError: the engine cannot be written.
    """
    check_machine(wanted.target, wanted.sm, wanted.runtime)
    result = _run_worker(
        {
            "module": MODULES[wanted.runtime],
            "onnx": str(wanted.graph.resolve()),
            "out": str(wanted.out.resolve()),
            "sm": wanted.sm,
            "profiles": list(wanted.profiles),
            "workspace_mb": wanted.workspace_mb,
        }
    )
    if "errno" in result:
        raise storage_error(OSError(result["errno"], os.strerror(result["errno"])), wanted.out)
    if "error" in result:
        raise _refused(result["error"], wanted.graph, wanted.target)
    return result


def _refused(reason: str, graph: Path, target: str) -> EngineError:
    hint = next((fix for text, fix in _HINTS if text in reason), "change the node that is named above")
    return EngineError(
        f"the engine builder refused {graph.name} for {target}: {' '.join(reason.split())}",
        expected="a graph that TensorRT can build",
        fix=hint,
    )


def _run_worker(job: Mapping[str, Any]) -> dict[str, Any]:
    package_root = str(Path(__file__).resolve().parents[2])  # a folder, or the archive on the device
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file, log_file = (Path(folder, name) for name in ("job.json", "result.json", "log.txt"))
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "headwise.device.engine_worker", str(job_file), str(result_file)]
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
