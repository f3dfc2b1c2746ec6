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
from headwise.export.edits import drop_unused, insert_before
from headwise.export.matrices import products
from headwise.export.runners import OrtRunner
from headwise.tolerances import TWIN

Array = NDArray[Any]
Edits = list[tuple[NodeProto, int, Array]]
"""(node, index of one of its constant inputs, exponents that broadcast with the constant)."""

_HEADS_FIRST = [0, 2, 1, 3]
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """What became of the scales.

    Attributes:
        folded: tensors whose scale went into the weights that make them.
        explicit: tensors that got a multiplication.
    """

    folded: int
    explicit: int


def smooth(model: onnx.ModelProto, scales: Mapping[str, tuple[int, ...]], names: Collection[str]) -> Smoothed:
    """Scale channels of activations and the weights behind them, in place.

    Args:
        model: an fp32 graph with the shapes that the exporter wrote.
        scales: activation tensor -> one exponent per channel; channels are multiplied by ``2 ** -exponent``.
        names: matrices that shall read the scaled tensor; the others read it as it was.
    """
    found = [product for product in products(model.graph) if product.name in names]
    folded = 0
    before: dict[str, list[NodeProto]] = {}
    for tap, exponents in scales.items():
        members = [product for product in found if product.node.input[0] == tap]
        graph = _Graph(model.graph)
        shift = np.asarray(exponents)
        edits = graph.absorb(tap, -shift, {product.node.output[0] for product in members})
        if edits is None:
            before[members[0].node.output[0]] = [_multiplication(model.graph, tap, shift)]
        else:
            folded += 1
            for node, index, change in edits:
                graph.scale_constant(node, index, change)
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


class _Graph:
    """Who makes and who reads a tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.outputs = {value.name for value in graph.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        values = [*graph.value_info, *graph.input, *graph.output]
        self.dims = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}

    def width(self, tensor: str) -> int:
        """Size of the last axis; 0 where it is not known."""
        return int((self.dims.get(tensor) or [0])[-1])

    def absorb(self, tensor: str, exponents: Array, readers: Collection[str]) -> Edits | None:
        """Edits of constants that scale the last axis of ``tensor``, or None where that cannot be had.

        Args:
            tensor: its name.
            exponents: one per channel.
            readers: first outputs of the nodes that expect it scaled. Any other reader forbids it.
        """
        others = [n for n in self.readers.get(tensor, []) if n.op_type != "Shape" and n.output[0] not in readers]
        maker = self.makers.get(tensor)
        if others or maker is None or tensor in self.outputs:
            return None
        rule = _RULES.get(maker.op_type)
        return None if rule is None else rule(self, maker, tensor, exponents)

    def scale_constant(self, node: NodeProto, index: int, exponents: Array) -> None:
        """Multiply a constant input by powers of two; other readers of the constant keep it as it was."""
        name = node.input[index]
        value = np.ldexp(numpy_helper.to_array(self.constants[name]), exponents).astype(np.float32)
        if len(self.readers[name]) > 1:
            self.readers[name].remove(node)
            name = f"{name}_of_{node.name}"
            node.input[index] = name
            self.readers[name] = [node]
            self.constants[name] = self.graph.initializer.add()
        self.constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    def vector(self, name: str, width: int) -> bool:
        """Whether a constant has one number per channel."""
        return name in self.constants and list(self.constants[name].dims) == [width]

    def product(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """Columns of a constant matrix, and the bias of a Gemm."""
        del tensor
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        if node.input[1] not in self.constants or len(self.constants[node.input[1]].dims) != 2:
            return None
        edits: Edits = [(node, 1, exponents[:, None] if transposed else exponents)]
        if len(node.input) > 2:
            if not self.vector(node.input[2], len(exponents)):
                return None
            edits.append((node, 2, exponents))
        return edits

    def bias(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """A sum with a constant vector: both parts."""
        del tensor
        for index, other in ((0, 1), (1, 0)):
            if self.vector(node.input[index], len(exponents)):
                edits = self.absorb(node.input[other], exponents, [node.output[0]])
                return None if edits is None else [*edits, (node, index, exponents)]
        return None

    def gate(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """A product of two tensors of one width, or of a tensor and a constant: one factor."""
        del tensor
        if node.input[0] == node.input[1]:
            return None  # a square would be scaled twice
        for index in (1, 0):
            name = node.input[index]
            if self.vector(name, len(exponents)):
                return [(node, index, exponents)]
            if self.width(name) == len(exponents):
                edits = self.absorb(name, exponents, [node.output[0]])
                if edits is not None:
                    return edits
        return None

    def norm(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """The gain of a normalization, and its bias."""
        if tensor != node.output[0] or not all(self.vector(name, len(exponents)) for name in node.input[1:]):
            return None
        return [(node, index, exponents) for index in range(1, len(node.input))]

    def split(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """A part of a wider tensor: the channels of the other parts stay as they are."""
        axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
        whole, widths = self.dims.get(node.input[0], []), [self.width(name) for name in node.output]
        if axis not in (-1, len(whole) - 1) or not all(widths) or sum(widths) != whole[-1]:
            return None
        parts = [exponents if name == tensor else np.zeros(w, int) for name, w in zip(node.output, widths, strict=True)]
        return self.absorb(node.input[0], np.concatenate(parts), [node.output[0]])

    def reshape(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """Other leading axes, or the heads of an attention side by side."""
        if self.width(node.input[0]) == len(exponents):
            return self.absorb(node.input[0], exponents, [node.output[0]])
        return self._heads(node, tensor, exponents)

    def _heads(self, node: NodeProto, tensor: str, exponents: Array) -> Edits | None:
        """Reshape(Transpose(Attention)): the weighted sum is linear in the values, channel by channel."""
        del tensor
        chain = [node]
        for kind in ("Transpose", "Where", "Attention"):
            index = 2 if chain[-1].op_type == "Where" else 0
            maker = self.makers.get(chain[-1].input[index])
            if maker is None or (maker.op_type != kind and kind != "Where"):
                return None
            if maker.op_type == kind:
                if [n for n in self.readers[maker.output[0]] if n.op_type != "Shape"] != [chain[-1]]:
                    return None
                chain.append(maker)
        if not _heads_first(chain[1]) or (chain[2].op_type == "Where" and not self._zero(chain[2].input[1])):
            return None
        return self._values(chain[-1], exponents)

    def _values(self, attention: NodeProto, exponents: Array) -> Edits | None:
        """The values of an attention with (B, N, T, H) inputs; readers of one kv head must agree."""
        query, value = (self.dims.get(attention.input[index], []) for index in (0, 2))
        turned = self.makers.get(attention.input[2])
        if len(query) != 4 or len(value) != 4 or turned is None or not _heads_first(turned):
            return None
        heads, kv_heads, width = query[1], value[1], value[3]
        if heads * width != len(exponents) or not kv_heads or heads % kv_heads:
            return None
        grouped = exponents.reshape(kv_heads, heads // kv_heads, width)
        split = self.makers.get(turned.input[0])
        if (grouped != grouped[:, :1]).any() or split is None or split.op_type != "Reshape":
            return None
        used = [(turned.output[0], attention), (split.output[0], turned)]
        if any([n for n in self.readers[name] if n.op_type != "Shape"] != [reader] for name, reader in used):
            return None
        if self.width(split.input[0]) != kv_heads * width:
            return None
        return self.absorb(split.input[0], grouped[:, 0].reshape(-1), [split.output[0]])

    def _zero(self, name: str) -> bool:
        return name in self.constants and not numpy_helper.to_array(self.constants[name]).any()


def _heads_first(node: NodeProto) -> bool:
    perm = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
    return node.op_type == "Transpose" and perm == _HEADS_FIRST


_RULES = {
    "MatMul": _Graph.product,
    "Gemm": _Graph.product,
    "Add": _Graph.bias,
    "Mul": _Graph.gate,
    "Split": _Graph.split,
    "Reshape": _Graph.reshape,
    **dict.fromkeys(_NORMS, _Graph.norm),
}


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
