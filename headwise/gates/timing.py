"""Measure what heads and neurons cost in milliseconds, on the graphs of smaller copies of a model.

Layers that differ in nothing but their sizes are made smaller together: they share what the whole graph saves, which is
larger than the noise of one measurement, and is measured where the layers run, behind and before each other.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.isotonic import isotonic_regression

from headwise.calibration.timing import Curve, LatencyTable
from headwise.export.runners import OrtRunner
from headwise.gates.cost import Latency, latency
from headwise.model import surgery
from headwise.model.edits import DropHeads, DropNeurons, Edit, EditPlan
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView, ModelView

Write = Callable[[ModelView, Path], object]
"""Exports a model to a path."""
Clock = Callable[[Path, Path], tuple[Latency, Latency]]
"""Latencies of two graphs, measured in turn."""
Layers = Sequence[AttentionView] | Sequence[MlpView]

_SHARES = (1.0, 3 / 4, 1 / 2, 1 / 3, 1 / 6, 0.0)
"""Shares of the units of the largest layer at which latency is measured; at least one unit stays."""
_ROUNDS = 40


def ort_clock(row: Mapping[str, Any], *, rounds: int = _ROUNDS) -> Clock:
    """Interleaved calls of both graphs on ONNX Runtime, on one thread.

    Args:
        row: the input of every call.
        rounds: measured calls of each graph.
    """

    def measure(first: Path, second: Path) -> tuple[Latency, Latency]:
        with ExitStack() as stack:
            runners = {
                str(index): stack.enter_context(OrtRunner(path, threads=1))
                for index, path in enumerate((first, second))
            }
            found = latency(runners, row, rounds=rounds)
        return found["0"], found["1"]

    return measure


def measure_table(
    view: ModelView, write: Write, clock: Clock, progress: Callable[[int], None] | None = None
) -> LatencyTable:
    """Export the model, and copies of it with smaller layers, and time each against the whole one.

    Args:
        view: the model, which is left as it is.
        write: how to export.
        clock: how to measure.
        progress: called with the number of graphs that were measured since the last call.

    Raises:
        PlanError: a layer cannot be made smaller, because it is clustered, say.
    """
    kinds = _kinds(view)
    curves: dict[tuple[str, int], Curve] = {}
    with tempfile.TemporaryDirectory() as scratch:
        whole, smaller = Path(scratch, "whole.onnx"), Path(scratch, "smaller", "model.onnx")
        smaller.parent.mkdir()
        write(view, whole)
        found = [clock(whole, whole)[0]]
        for layers in kinds:
            points = [_Point(keep=_grid(layers)[0], share=1.0)]
            for keep in _grid(layers)[1:]:
                write(_shrunk(view, layers, keep), smaller)
                before, after = clock(whole, smaller)
                found.append(before)
                points.append(_Point(keep=keep, share=after.median_ms / before.median_ms))
                if progress is not None:
                    progress(1)
            curve = _curve(layers, points)
            curves.update({_name(layer): curve for layer in layers})
    total = float(np.median([each.median_ms for each in found]))
    return LatencyTable(
        total=total,
        heads=tuple(_scaled(curves[_name(layer)], total) for layer in view.attention),
        neurons=tuple(_scaled(curves[_name(mlp)], total) for mlp in view.mlp),
        device=found[0].device,
        threads=found[0].threads,
        method=found[0].method,
    )


def count_graphs(view: ModelView) -> int:
    """How many smaller copies ``measure_table`` makes."""
    return sum(len(_grid(layers)) - 1 for layers in _kinds(view))


class _Point(NamedTuple):
    """Latency of the whole graph, as a share, when no layer of a kind keeps more than ``keep`` units."""

    keep: int
    share: float


def _kinds(view: ModelView) -> list[Layers]:
    """Layers that have the same latency when they have the same number of units."""
    attention: dict[Hashable, list[AttentionView]] = {}
    for layer in view.attention:
        key = (layer.family.name, layer.layout.group, layer.layout.head_dim, layer.linear()[0].shape[0], layer.runs)
        attention.setdefault(key, []).append(layer)
    mlps: dict[Hashable, list[MlpView]] = {}
    for mlp in view.mlp:
        mlps.setdefault((len(mlp.paths), mlp.linear()[0].shape[0], mlp.runs), []).append(mlp)
    return [*attention.values(), *mlps.values()]


def _name(layer: AttentionView | MlpView) -> tuple[str, int]:
    return type(layer).__name__, layer.index


def _size(layer: AttentionView | MlpView) -> int:
    return len(layer.layout.neurons) if isinstance(layer, MlpView) else len(layer.layout.units())


def _grid(layers: Layers) -> list[int]:
    """Units to keep, falling, from those of the largest layer to one."""
    largest = max(map(_size, layers))
    return sorted({max(1, round(share * largest)) for share in _SHARES}, reverse=True)


def _shrunk(view: ModelView, layers: Layers, keep: int) -> ModelView:
    """A copy whose layers of one kind keep at most so many units."""
    edits: list[Edit] = []
    for layer in layers:
        if _size(layer) <= keep:
            continue
        if isinstance(layer, MlpView):
            edits.append(DropNeurons(layer=layer.index, neurons=layer.layout.neurons[keep:]))
        else:
            query = layer.layout.query[keep * layer.layout.group :]
            edits.append(DropHeads(layer=layer.index, query=query))
    fewer = ModelView.of(copy.deepcopy(view.module))
    fewer.rename(view.layout)
    surgery.apply(fewer, EditPlan(edits=tuple(edits)))
    return fewer


def _curve(layers: Layers, points: Sequence[_Point]) -> Curve:
    """Latency of one layer as a share of the whole model's, from what all layers save together.

    Between two points every layer loses the units that it has between them, and all units there save alike. A smaller
    layer that measured slower is noise: the nearest curve that never falls is taken.
    """
    sizes = list(map(_size, layers))
    shares = [0.0]
    rising = points[::-1]
    for below, above in pairwise(rising):
        units = sum(min(size, above.keep) - min(size, below.keep) for size in sizes)
        shares.append(shares[-1] + (above.share - below.share) * (above.keep - below.keep) / units)
    smooth = isotonic_regression(shares)
    return Curve(counts=tuple(point.keep for point in rising), ms=tuple(float(ms - smooth[0]) for ms in smooth))


def _scaled(curve: Curve, total: float) -> Curve:
    return Curve(counts=curve.counts, ms=tuple(total * share for share in curve.ms))
