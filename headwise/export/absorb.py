"""Scales of channels taken over by the constants that make a tensor: which ones, and how.

A scale is the exponent of a power of two, one per channel of the last axis; whole exponents change no bit of a result.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from headwise.model.cache import is_past, is_present

Array = NDArray[Any]
Edits = list[tuple[NodeProto, int, Array]]
"""(node, index of one of its constant inputs, exponents that broadcast with the constant)."""

_HEADS_FIRST = [0, 2, 1, 3]
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


class Channels:
    """The channels of the tensors of one graph: who makes and who reads them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.node for name in node.output}
        # What a decoder caches is read by the same graph only: scaled on the way out, it comes back scaled.
        self.outputs = {value.name for value in graph.output if not is_present(value.name)}
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
        """Multiply a constant input by powers of two, in place; other readers of the constant keep it as it was."""
        name = node.input[index]
        value = (numpy_helper.to_array(self.constants[name]) * powers(exponents)).astype(np.float32)
        if len(self.readers[name]) > 1:
            self.readers[name].remove(node)
            name = f"{name}_of_{node.name}"
            node.input[index] = name
            self.readers[name] = [node]
            self.constants[name] = self.graph.initializer.add()
        self.constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    def apply(self, edits: Edits) -> None:
        """Make edits."""
        for node, index, exponents in edits:
            self.scale_constant(node, index, exponents)

    def only_reader(self, tensor: str, node: NodeProto) -> bool:
        """Whether nobody else reads a tensor, apart from its shape."""
        return tensor not in self.outputs and [n for n in self.readers[tensor] if n.op_type != "Shape"] == [node]

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
                if not self.only_reader(maker.output[0], chain[-1]):
                    return None
                chain.append(maker)
        if not heads_first(chain[1]) or (chain[2].op_type == "Where" and not self.zero(chain[2].input[1])):
            return None
        return self._values(chain[-1], exponents)

    def _values(self, attention: NodeProto, exponents: Array) -> Edits | None:
        """The values of an attention with (B, N, T, H) inputs; readers of one kv head must agree."""
        query, value = (self.dims.get(attention.input[index], []) for index in (0, 2))
        if len(query) != 4 or len(value) != 4:
            return None
        heads, kv_heads, width = query[1], value[1], value[3]
        if heads * width != len(exponents) or not kv_heads or heads % kv_heads:
            return None
        grouped = exponents.reshape(kv_heads, heads // kv_heads, width)
        if (grouped != grouped[:, :1]).any():
            return None
        return self.heads(attention.input[2], attention, grouped[:, 0].reshape(-1))

    def heads(self, tensor: str, reader: NodeProto, exponents: Array) -> Edits | None:
        """Edits that scale (B, N, T, H) heads, before rotary positions where there are such.

        Args:
            tensor: its name.
            reader: the one node that expects it scaled.
            exponents: (N * H,); the two channels that a rotary position mixes must have the same one.
        """
        if not self.only_reader(tensor, reader) or tensor not in self.makers:
            return None
        maker = self.makers[tensor]
        if maker.op_type == "RotaryEmbedding":
            return self.heads(maker.input[0], maker, exponents)
        if behind_past(maker):
            return self.heads(maker.input[1], maker, exponents)
        split = self.makers.get(maker.input[0])
        if not heads_first(maker) or split is None or split.op_type != "Reshape":
            return None
        if not self.only_reader(split.output[0], maker) or self.width(split.input[0]) != len(exponents):
            return None
        return self.absorb(split.input[0], exponents, [split.output[0]])

    def zero(self, name: str) -> bool:
        """Whether a constant is zero everywhere."""
        return name in self.constants and not numpy_helper.to_array(self.constants[name]).any()


def behind_past(node: NodeProto) -> bool:
    """Whether a node puts the keys or values of a call behind those of earlier calls."""
    return node.op_type == "Concat" and len(node.input) == 2 and is_past(node.input[0])


def powers(exponents: Array) -> Array:
    """Two to these powers; exact for whole ones."""
    whole = np.floor(exponents)
    return np.asarray(np.ldexp(np.exp2(exponents - whole), whole.astype(int)))


def heads_first(node: NodeProto) -> bool:
    """Whether a node exchanges the axes of tokens and heads."""
    perm = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
    return node.op_type == "Transpose" and perm == _HEADS_FIRST


_RULES = {
    "MatMul": Channels.product,
    "Gemm": Channels.product,
    "Add": Channels.bias,
    "Mul": Channels.gate,
    "Split": Channels.split,
    "Reshape": Channels.reshape,
    **dict.fromkeys(_NORMS, Channels.norm),
}
