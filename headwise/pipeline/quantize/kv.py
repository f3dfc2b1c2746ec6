"""The graph with its cache, or its keys and values, in 8 bits: what everything else is calibrated on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from headwise.calibration.formats import input_scale
from headwise.calibration.ranges import Observed, Tap, collect_ranges
from headwise.calibration.tasks import Examples
from headwise.export.decoder import DECODE
from headwise.export.graph import graph_inputs
from headwise.export.kv import Cached, find_cached, fold_channels, quantize_cached
from headwise.export.matrices import TapRunner
from headwise.export.smoothing import require_same
from headwise.model.cache import is_past
from headwise.passes.kv import channel_exponents
from headwise.passes.quantize import Quantize
from headwise.pipeline.graphs import GRAPH, Graph
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.workspace import Workspace

_SCALES = np.dtype(np.float16)
"""Scales that fp16 can hold are the same in the graph of every precision but bf16."""
_FOLDED = "folded.onnx"


def write_kv(
    workspace: Workspace,
    monitor: Monitor,
    graph: Graph,
    options: Quantize,
    folder: Path,
    *,
    examples: Examples,
    partial: Path,
) -> dict[str, Any]:
    """Scale the channels of what is cached, prove that this changes nothing, then quantize it.

    Args:
        workspace: has a batch to compare graphs on.
        monitor: receives progress.
        graph: in fp32.
        options: say which tensors get which format.
        folder: gets the graph, and that of single tokens where there is one.
        examples: calibration samples.
        partial: see ``collect_ranges``.

    Returns:
        What the report says: tensors, how many of them have a scale per channel, those that stay as they are, the error
        of the folded graph, and whether the graph has a cache.
    """
    source = graph.path
    model = onnx.load(str(source))
    every = find_cached(model, graph.scopes)
    wanted = options.kv_formats([entry.label for entry in every])
    cached = [entry for entry in every if entry.label in wanted]
    names = [entry.name for entry in cached]
    seen = _ranges(source, cached, workspace, monitor, examples, partial)
    exponents = {
        entry.name: channel_exponents(seen[entry.name].largest, width=entry.width, pairs=entry.pairs)
        for entry in cached
    }
    graphs = {GRAPH: source, **({} if graph.decode is None else {DECODE: graph.decode})}
    folded = _foldable(graphs.values(), exponents)
    largest = {
        name: float((seen[name].largest * np.exp2(-exponents[name] if name in folded else 0.0)).max()) for name in names
    }
    formats = {entry.name: wanted[entry.label] for entry in cached}
    scales = {name: input_scale(value or 1.0, formats[name], _SCALES) for name, value in largest.items()}
    error = 0.0
    for name, path in graphs.items():
        model, changed = _folded(path, {held: exponents[held] for held in folded}, folder, workspace)
        error = max(error, changed)
        quantize_cached(model, scales, formats)
        onnx.save(model, str(folder / name))
    return {
        "format": ", ".join(dict.fromkeys(formats.values())),
        "tensors": len(names),
        "per_channel": len(folded),
        "float": [entry.label for entry in every if entry.label not in wanted],
        "twin_error": error,
        "cache": any(map(is_past, graph_inputs(source))),
    }


def _ranges(
    source: Path, cached: Sequence[Cached], workspace: Workspace, monitor: Monitor, examples: Examples, partial: Path
) -> dict[str, Observed]:
    """What calibration sees of everything cached, by its name."""
    taps = [Tap(name=entry.tap, dims=("batch", "heads", "sequence", "width"), heads=True) for entry in cached]
    found = collect_ranges(
        TapRunner(source, [tap.name for tap in taps]),
        examples,
        taps,
        rows=1,
        batch_size=workspace.recipe.batch_size,
        progress=monitor.work("keys and values", len(examples)),
        partial=partial,
    )
    return {entry.name: found[entry.tap] for entry in cached}


def _folded(
    source: Path, exponents: Mapping[str, NDArray[np.float64]], folder: Path, workspace: Workspace
) -> tuple[onnx.ModelProto, float]:
    """A graph with its channels scaled, and by how much that changes its outputs."""
    model = onnx.load(str(source))
    fold_channels(model, exponents)
    path = folder / _FOLDED
    onnx.save(model, str(path))
    error = require_same(source, path, workspace.examples.example_batch())
    path.unlink()
    return model, error


def _foldable(graphs: Iterable[Path], exponents: Mapping[str, NDArray[np.float64]]) -> frozenset[str]:
    """The tensors whose channels every graph can scale: all of them cache the same numbers."""
    return frozenset.intersection(*(fold_channels(onnx.load(str(path)), exponents) for path in graphs))
