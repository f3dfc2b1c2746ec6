"""Multiply-accumulates of one ONNX node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from onnx import NodeProto, helper

from headwise.errors import ExportError

Shape = tuple[int, ...]

_NOT_COUNTED = frozenset(
    {"QLinearMatMul", "ConvInteger", "QLinearConv", "DeformConv", "LSTM", "GRU", "RNN"} | {"If", "Loop", "Scan"}
)


def counts(node: NodeProto) -> bool:
    """Whether a node multiplies; a node that may do so in a way not known here is an error."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _NOT_COUNTED:
        raise ExportError(
            f"node {node.name} ({node.domain or 'ai.onnx'}:{node.op_type}) has no rule to count its work",
            expected="the operators that the exporter writes: " + ", ".join(sorted(_RULES)),
            fix="count the graph before it is rewritten for one runtime",
        )
    return node.op_type in _RULES


def macs(node: NodeProto, sizes: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of a node that :func:`counts`, from the shapes of its inputs and outputs."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    inputs = [sizes.get(name, ()) for name in node.input]
    return _RULES[node.op_type](attributes, inputs, sizes[node.output[0]])


def _matmul(_: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> int:
    return prod(output) * inputs[0][-1]


def _gemm(attributes: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> int:
    return prod(output) * inputs[0][0 if attributes.get("transA") else 1]


def _conv(_: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> int:
    return prod(output) * prod(inputs[1][1:])


def _conv_transpose(_: Mapping[str, Any], inputs: Sequence[Shape], __: Shape) -> int:
    return prod(inputs[0]) * prod(inputs[1][1:])


def _attention(attributes: Mapping[str, Any], inputs: Sequence[Shape], _: Shape) -> int:
    """Scores and weighted sum: (B, H, S, D) x (B, H, T, D), then (B, H, S, T) x (B, H, T, Dv)."""
    query, key, value = inputs[:3]
    length = key[-2] + (inputs[4][-2] if len(inputs) > 4 and inputs[4] else 0)
    if len(query) == 4:
        heads, width, value_width = query[1], query[-1], value[-1]
    else:  # (B, S, H * D), with the head counts as attributes
        heads = attributes["q_num_heads"]
        width, value_width = query[-1] // heads, value[-1] // attributes["kv_num_heads"]
    return query[0] * heads * query[-2] * length * (width + value_width)


def _einsum(attributes: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> int:
    """One multiplication per point of the index space of two operands; more operands are counted as one product."""
    terms = attributes["equation"].decode().replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    ellipsis = 1
    for term, shape in zip(terms, inputs, strict=True):
        head, dots, tail = term.partition("...")
        sizes |= dict(zip(head, shape, strict=False))
        sizes |= dict(zip(reversed(tail), reversed(shape), strict=False))
        if dots:
            ellipsis = max(ellipsis, prod(shape[len(head) : len(shape) - len(tail)]))
    return prod(sizes.values()) * ellipsis if len(terms) > 1 else 0


_RULES: Mapping[str, Callable[[Mapping[str, Any], Sequence[Shape], Shape], int]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "Einsum": _einsum,
}
