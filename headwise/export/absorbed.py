"""Latent attention that is absorbed: what became of the up-projections that another graph multiplies latents with.

Queries meet latents through the one of the keys, mixed latents become values through that of the values: products of
one head at a time with a constant (K, width, r). Codes and scales of the matrix hold for it as they are.

Shape letters: K kv heads, r rank of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from headwise.export.edits import insert_before
from headwise.export.graph import module_path

_BETWEEN = frozenset({"Where", "Reshape", "Transpose", "Slice", "Cast", "Mul"})
"""What lies between an attention and the products on both of its sides: axes, casts in bf16, and
scales of ``smooth_absorbed``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorbed:
    """A product with an up-projection, one matrix per kv head.

    Attributes:
        name: of the matrix where it multiplies latents, see ``Matrix``.
        node: the ``Einsum``.
        weight: name of its constant.
        keys: latents are what comes out, with the queries of their heads; of values they are what goes in.
        latent: tensor that the attention reads, rotary keys left out.
        bias: constant (K, 1, width) that is added to values; empty where there is none.
    """

    name: str
    node: NodeProto
    weight: str
    keys: bool
    latent: str
    bias: str = ""


def find_absorbed(graph: onnx.GraphProto) -> list[Absorbed]:
    """Every up-projection of an attention that reads latents as they are, in the order of the graph."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    found = []
    for attention in graph.node:
        if attention.op_type != "Attention" or attention.input[1] != attention.input[2]:
            continue
        scope, latent = module_path(attention), _first_part(makers, attention.input[1])
        query = _back(makers, _first_part(makers, attention.input[0]))
        output = _forth(readers, attention.output[0])
        for name, node in (("k_up", query), ("v_up", output)):
            weight = "" if node is None else _without_cast(makers, node.input[1])
            if node is not None and ranks.get(weight) == 3:
                about = {"name": f"{scope}.{name}", "weight": weight, "latent": latent}
                bias = "" if node is query else _added(readers, ranks, node.output[0])
                found.append(Absorbed(**about, node=node, keys=node is query, bias=bias))
    return found


def smooth_absorbed(graph: onnx.GraphProto, scales: Mapping[str, Sequence[int]]) -> None:
    """Scale the latents' side of up-projections, and take it back where latents come out or go in, in place.

    Args:
        graph: in fp32.
        scales: matrix -> one exponent per number of the latent.
    """
    before: dict[str, list[NodeProto]] = {}
    members = [(found, np.asarray(scales[found.name])) for found in find_absorbed(graph) if found.name in scales]
    for found, exponents in members:
        scale_rows(graph, found, exponents)
        factor, node = f"{found.name}_factor", found.node
        inverse = np.ldexp(np.float32(1), -exponents).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(inverse, factor))
        if found.keys:
            read, node.output[0] = node.output[0], f"{found.name}_scaled"
            after = next(other for other in graph.node if read in other.input)
            multiply = helper.make_node("Mul", [node.output[0], factor], [read], name=f"{found.name}_smooth")
            before.setdefault(after.output[0], []).append(multiply)
        else:
            multiply = helper.make_node(
                "Mul", [node.input[0], factor], [f"{found.name}_smoothed"], name=f"{found.name}_smooth"
            )
            before.setdefault(node.output[0], []).append(multiply)
            node.input[0] = multiply.output[0]
    insert_before(graph, before)


def scale_rows(graph: onnx.GraphProto, found: Absorbed, exponents: NDArray[np.integer]) -> None:
    """Multiply the numbers of an up-projection that meet one number of the latent by a power of two, in place."""
    constant = next(tensor for tensor in graph.initializer if tensor.name == found.weight)
    value = np.ldexp(numpy_helper.to_array(constant), exponents).astype(np.float32)
    constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), found.weight))


def replace_weight(graph: onnx.GraphProto, found: Absorbed, weight: NDArray[np.float32]) -> None:
    """Put (r, K * width) numbers, as the matrix of the other graph has them, in the place of an up-projection's."""
    constant = next(tensor for tensor in graph.initializer if tensor.name == found.weight)
    value = np.ascontiguousarray(weight.T.reshape(constant.dims), np.float32)
    constant.CopyFrom(numpy_helper.from_array(value, found.weight))


def _first_part(makers: Mapping[str, NodeProto], tensor: str) -> str:
    """What a tensor has in front, where it is two side by side: the part of latents, then that of rotary keys."""
    maker = makers.get(tensor)
    return str(maker.input[0]) if maker is not None and maker.op_type == "Concat" and _last(maker) else tensor


def _without_cast(makers: Mapping[str, NodeProto], tensor: str) -> str:
    maker = makers.get(tensor)
    return str(maker.input[0]) if maker is not None and maker.op_type == "Cast" else tensor


def _last(node: NodeProto) -> bool:
    return any(item.name == "axis" and item.i in (-1, 3) for item in node.attribute)


def _back(makers: Mapping[str, NodeProto], tensor: str) -> NodeProto | None:
    maker = makers.get(tensor)
    while maker is not None and maker.op_type in _BETWEEN:
        maker = makers.get(maker.input[0])
    return maker if maker is not None and maker.op_type == "Einsum" else None


def _forth(readers: Mapping[str, list[NodeProto]], tensor: str) -> NodeProto | None:
    while True:
        following = [node for node in readers.get(tensor, []) if node.op_type != "Shape"]
        if len(following) != 1:
            return None
        if following[0].op_type == "Einsum":
            return following[0]
        if following[0].op_type not in _BETWEEN:
            return None
        tensor = following[0].output[0]


def _added(readers: Mapping[str, list[NodeProto]], ranks: Mapping[str, int], tensor: str) -> str:
    following = readers.get(tensor, [])
    if len(following) != 1 or following[0].op_type != "Add":
        return ""
    other = next((name for name in following[0].input if name != tensor), "")
    return other if ranks.get(other) == 3 and len(readers[other]) == 1 else ""
