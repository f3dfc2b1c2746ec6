"""The graph with keys and values in 8 bits, which everything else is calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from headwise.calibration.formats import input_scale
from headwise.calibration.ranges import Tap, collect_ranges
from headwise.export.kv import find_cached, fold_channels, quantize_cached
from headwise.export.matrices import TapRunner
from headwise.export.smoothing import require_same
from headwise.model.quantization import Format
from headwise.passes.kv import channel_exponents
from headwise.pipeline.graphs import GRAPH, Graph
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.workspace import Workspace

_SCALES = np.dtype(np.float16)
"""Scales that fp16 can hold are the same in the graph of every precision but bf16."""
_FOLDED = "folded.onnx"


def write_kv(workspace: Workspace, monitor: Monitor, graph: Graph, number: Format, folder: Path) -> dict[str, Any]:
    """Scale the channels of keys and values, prove that this changes nothing, then quantize them.

    Args:
        workspace: has the calibration samples.
        monitor: receives progress.
        graph: in fp32.
        number: the format.
        folder: gets the graph.

    Returns:
        What the report says: tensors, how many of them have a scale per channel, and the error of the folded graph.
    """
    source = graph.path
    model = onnx.load(str(source))
    cached = find_cached(model, graph.scopes)
    names = [entry.name for entry in cached]
    taps = [Tap(name=name, dims=("batch", "heads", "sequence", "width"), heads=True) for name in names]
    examples = workspace.calibration
    seen = collect_ranges(
        TapRunner(source, names),
        examples,
        taps,
        rows=1,
        batch_size=workspace.recipe.batch_size,
        progress=monitor.work("keys and values", len(examples)),
    )
    exponents = {
        entry.name: channel_exponents(seen[entry.name].largest, width=entry.width, pairs=entry.pairs)
        for entry in cached
    }
    folded = fold_channels(model, exponents)
    onnx.save(model, str(folder / _FOLDED))
    error = require_same(source, folder / _FOLDED, workspace.examples.example_batch())
    (folder / _FOLDED).unlink()
    largest = {
        name: float((seen[name].largest * np.exp2(-exponents[name] if name in folded else 0.0)).max()) for name in names
    }
    scales = {name: input_scale(value or 1.0, number, _SCALES) for name, value in largest.items()}
    quantize_cached(model, scales, number)
    onnx.save(model, str(folder / GRAPH))
    return {"format": number, "tensors": len(names), "per_channel": len(folded), "twin_error": error}
