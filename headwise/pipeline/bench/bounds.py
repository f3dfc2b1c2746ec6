"""``headwise bench --roofline``: what a named GPU could reach with a graph at best."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from onnx import helper
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.device.arrays import Port
from headwise.errors import DataError
from headwise.export.graph import graph_inputs
from headwise.export.random_inputs import Case, random_inputs
from headwise.gates.gpus import find_gpu
from headwise.gates.roofline import roofline
from headwise.model.cache import is_past
from headwise.pipeline.folders import bench_graph, is_run, usual_tokens
from headwise.pipeline.report.document import read_report
from headwise.pipeline.report.summary import amount

_TOKENS, _SHOWN = 128, 12


def bound(artifact: str, gpu: str | None, *, batch: int, tokens: int | None, past: int | None) -> dict[str, Any]:
    """The lower bound of a graph's time on a GPU, as plain data.

    Args:
        artifact: a file ``.onnx``, or the folder of a run: its last graph for TensorRT.
        gpu: see ``gpus.GPUS``.
        batch: rows.
        tokens: of a row.
        past: tokens in the cache of a decoder that adds one; None for a whole input.

    Raises:
        DataError: there is no such graph, it takes no cache, or no GPU was named.
        TargetError: the GPU is not known.
    """
    if gpu is None:
        raise DataError("no GPU was named", expected="the GPU that the bound is for", fix="add --gpu rtx-3060")
    path = Path(artifact)
    path = bench_graph(path, read_report(path), "tensorrt") if is_run(path) else path
    if path.suffix != ".onnx" or not path.exists():
        raise DataError(
            f"{artifact} is no graph", expected="a file .onnx or the folder of a run", fix="name the graph of a run"
        )
    model = onnx.load(str(path), load_external_data=False)
    dtypes = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    dims = graph_inputs(path)
    inputs = {n: Port(str(helper.tensor_dtype_to_np_dtype(dtype)), dims[n]) for n, dtype in dtypes.items()}
    if past is not None and not any(map(is_past, dims)):
        raise DataError(
            f"--past {past}, but {path} takes no cache", expected="the graph of a decoder", fix="leave --past out"
        )
    length = 1 if past is not None else tokens or usual_tokens(path) or _TOKENS
    # The ids do not matter, only how many there are.
    arrays = random_inputs(inputs, Case(batch=batch, tokens=length, past=past, vocabulary=1))
    shapes = {name: array.shape for name, array in arrays.items()}
    found = roofline(path, shapes, find_gpu(gpu))
    return {
        "graph": str(path),
        "gpu": gpu,
        "is": "a bound by published peaks, not a measurement",
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        **asdict(found),
        "bound_ms": found.bound_ms,
    }


def bound_table(found: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{found['graph']} on {found['gpu']}: a bound", title_justify="left")
    for heading in ("Products", "", "Format", "FLOPs", "Weights", "Activations", "At best"):
        table.add_column(heading, justify="left" if heading in ("Products", "Format") else "right", overflow="fold")
    for work in found["work"][:_SHOWN]:
        sizes = (amount("file_bytes", work[key]) for key in ("weight_bytes", "activation_bytes"))
        flops = amount("macs", work["flops"])
        table.add_row(work["name"], f"{work['count']}×", work["number"], flops, *sizes, _time(work["bound_ms"]))
    rest = found["work"][_SHOWN:]
    if rest:
        table.add_row(f"{len(rest)} more", "", "", amount("macs", sum(work["flops"] for work in rest)), "", "", "")
    limit = "computing" if found["compute_ms"] > found["memory_ms"] else "reading weights, inputs and outputs"
    words = (
        f"No engine of this graph takes less than {_time(found['bound_ms'])} on {found['gpu']}, limited by {limit} "
        f"({_time(found['compute_ms'])} to compute {amount('macs', found['flops'])} operations, "
        f"{_time(found['memory_ms'])} to move {amount('file_bytes', found['bytes'])})."
    )
    note = "By published peaks, which nothing reaches: a bound, never a measurement. Other operators count as free."
    return Group(table, Text(words, style="bold"), Text(note, style="dim"))


def _time(ms: float) -> str:
    return f"{1e3 * ms:.3g} µs" if ms < 1 else f"{ms:.3g} ms"
