"""What the folder of a run holds that goes on being used: the compressed model, and the graph for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from headwise.errors import DataError
from headwise.export.targets import CPU
from headwise.pipeline.graphs import GRAPH, MODEL
from headwise.pipeline.report import REPORT
from headwise.pipeline.summary import Report, Stage

_USED = ("passed", "warned")


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run."""
    return (path / REPORT).exists()


def untouched_model(report: Report) -> str:
    """The checkpoint that a run began with: its folder, its hub id or its factory."""
    checkpoint = report["checkpoint"]
    return str(checkpoint.get("folder") or checkpoint["source"])


def compressed_model(folder: Path, report: Report) -> str:
    """The checkpoint behind the last pass whose result was used; the untouched one where there is none."""
    stage = last_pass(report)
    return untouched_model(report) if stage is None else str(folder / stage["folder"] / MODEL)


def last_pass(report: Report) -> Stage | None:
    """The last pass whose result was used."""
    return next((stage for stage in reversed(_used(report)) if stage["kind"] == "pass"), None)


def runnable_graph(folder: Path, report: Report) -> Path:
    """The graph that ONNX Runtime runs: the one for the CPU where the recipe had that target, else the fp32 one.

    Raises:
        DataError: no graph passed its gate.
    """
    for name in (CPU, "onnx"):
        for stage in _used(report):
            if stage["name"] == name and (folder / stage["folder"] / GRAPH).exists():
                return folder / str(stage["folder"]) / GRAPH
    raise DataError(
        f"{folder} holds no graph that passed its gate",
        expected="a run that got as far as the ONNX graph",
        fix="run headwise compress to its end, or name a file model.onnx",
    )


def stage_with_cache(report: Report) -> Stage | None:
    """The stage whose graph caches codes, the one for engines before that for the CPU; None where no graph does."""
    names = ("quantize", CPU)
    found = [stage for stage in _used(report) if "kv_bytes_per_token" in stage["cost"] and stage["name"] in names]
    return min(found, key=lambda stage: names.index(stage["name"]), default=None)


def _used(report: Report) -> list[Stage]:
    return [stage for stage in report["stages"] if stage["status"] in _USED]
