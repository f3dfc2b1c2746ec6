"""Channel scales between an activation and the weights behind it: folded into what makes the activation, or explicit.

Scales are powers of two, so that the graph gives the same numbers as before, bit for bit, until something is quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from headwise.errors import ExportError
from headwise.export.absorb import Channels
from headwise.export.edits import drop_unused, insert_before
from headwise.export.matrices import products
from headwise.export.runners import OrtRunner
from headwise.tolerances import TWIN

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """What became of the scales.

    Attributes:
        folded: tensors whose scale went into the weights that make them.
        explicit: tensors that got a multiplication.
    """

    folded: int
    explicit: int


def smooth(
    model: onnx.ModelProto,
    scales: Mapping[str, tuple[int, ...]],
    names: Collection[str],
    *,
    fixed: Collection[str] = (),
) -> Smoothed:
    """Scale channels of activations and the weights behind them, in place.

    Args:
        model: an fp32 graph with the shapes that the exporter wrote.
        scales: activation tensor -> one exponent per channel; channels are multiplied by ``2 ** -exponent``.
        names: matrices that shall read the scaled tensor; the others read it as it was.
        fixed: matrices that no scale may be folded into.
    """
    kept = {product.node.output[0] for product in products(model.graph) if product.name in fixed}
    found = [product for product in products(model.graph) if product.name in names]
    folded = 0
    before: dict[str, list[NodeProto]] = {}
    for tap, exponents in scales.items():
        members = [product for product in found if product.node.input[0] == tap]
        graph = Channels(model.graph)
        shift = np.asarray(exponents)
        edits = graph.absorb(tap, -shift, {product.node.output[0] for product in members})
        if edits is not None and any(node.output[0] in kept for node, _, _ in edits):
            edits = None
        if edits is None:
            before[members[0].node.output[0]] = [_multiplication(model.graph, tap, shift)]
        else:
            folded += 1
            graph.apply(edits)
        for product in members:
            graph.scale_constant(product.node, 1, shift if product.transposed else shift[:, None])
            if edits is None:
                product.node.input[0] = f"{tap}_smoothed"
    insert_before(model.graph, before)
    drop_unused(model.graph)
    return Smoothed(folded=folded, explicit=len(before))


def _multiplication(graph: onnx.GraphProto, tap: str, exponents: Array) -> NodeProto:
    factor = np.ldexp(np.float32(1), -exponents).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(factor, f"{tap}_factor"))
    return helper.make_node("Mul", [tap, f"{tap}_factor"], [f"{tap}_smoothed"], name=f"{tap}_smooth")


def require_same(reference: Path, smoothed: Path, batch: Mapping[str, Array]) -> float:
    """The largest difference between two graphs on one batch, relative to the largest output.

    Raises:
        ExportError: it is larger than rounding explains.
    """
    with OrtRunner(reference) as first, OrtRunner(smoothed) as second:
        expected, found = first(batch), second(batch)
    worst = 0.0
    for name, values in expected.items():
        scale = max(float(np.abs(values).max(initial=0.0)), 1e-6)
        worst = max(worst, float(np.abs(found[name] - values).max(initial=0.0)) / scale)
    if not worst <= TWIN:
        raise ExportError(
            f"scaling channels changed the graph by {worst:.2g} of its largest output",
            expected=f"at most {TWIN:g}",
            fix="this is a bug in headwise; please report it with the model type and the recipe, or set smooth: null",
        )
    return worst
