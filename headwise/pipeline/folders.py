"""What the folder of a run holds that goes on being used: the compressed model, and the graph for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from headwise.errors import DataError
from headwise.export.targets import CPU
from headwise.pipeline.graphs import GRAPH, MODEL
from headwise.pipeline.report.document import REPORT, read_report
from headwise.pipeline.report.summary import Report, Stage

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


def bench_graph(folder: Path, report: Report, provider: str) -> Path:
    """The graph of a run to time on a provider: for a GPU the last one that was written for it, see ``runnable_graph``.

    Raises:
        DataError: no graph passed its gate.
    """
    kinds = {"cpu": (), "cuda": ("precision", "onnx"), "tensorrt": ("quantize", "precision", "onnx")}[provider]
    for kind in kinds:
        for stage in _used(report):
            if stage["kind"] == kind and (folder / stage["folder"] / GRAPH).exists():
                return folder / str(stage["folder"]) / GRAPH
    return runnable_graph(folder, report)


def dense_graph(folder: Path, report: Report) -> Path:
    """The untouched model's fp32 graph.

    Raises:
        DataError: the run did not get as far.
    """
    path = folder / str(report["stages"][0]["folder"]) / GRAPH
    if not path.exists():
        raise DataError(
            f"{folder} holds no graph of the untouched model",
            expected="a run whose first stage has ended",
            fix="run headwise compress to its end",
        )
    return path


def usual_tokens(path: Path) -> int | None:
    """Tokens that the run around a graph counts costs for; None where it is in no run, or its inputs have no tokens."""
    folder = path.resolve().parent.parent
    if not is_run(folder):
        return None
    for stage in read_report(folder)["stages"]:
        tokens = ((stage.get("cost") or {}).get("latency") or {}).get("tokens")
        if tokens:
            return int(tokens)
    return None


def stage_with_cache(report: Report) -> Stage | None:
    """The stage whose graph caches codes, the one for engines before that for the CPU; None where no graph does."""
    names = ("quantize", CPU)
    found = [stage for stage in _used(report) if "kv_bytes_per_token" in stage["cost"] and stage["name"] in names]
    return min(found, key=lambda stage: names.index(stage["name"]), default=None)


def _used(report: Report) -> list[Stage]:
    return [stage for stage in report["stages"] if stage["status"] in _USED]
