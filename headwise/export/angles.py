"""Angles of rotary positions stay in fp32: fp16 tells tokens apart up to number 2048 only, bf16 up to 256."""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto

_COUNTS = ("Shape", "Size")
"""Operators whose results say nothing of the values in their inputs."""


def angle_nodes(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the nodes that compute cosines and sines, from positions and frequencies on."""
    makers = {name: node for node in graph.node for name in node.output}
    found: dict[str, NodeProto] = {}
    open_nodes = [node for node in graph.node if node.op_type in ("Cos", "Sin")]
    while open_nodes:
        node = open_nodes.pop()
        if node.name in found:
            continue
        found[node.name] = node
        if node.op_type not in _COUNTS:
            open_nodes += [makers[name] for name in node.input if name in makers]
    return frozenset(found)


def only_for(names: frozenset[str], graph: onnx.GraphProto) -> set[str]:
    """Initializers that these nodes read and no other."""
    read: dict[str, set[bool]] = {}
    for node in graph.node:
        for name in node.input:
            read.setdefault(name, set()).add(node.name in names)
    return {tensor.name for tensor in graph.initializer if read.get(tensor.name) == {True}}


def without_detours(graph: onnx.GraphProto, half: int) -> None:
    """Take out casts to ``half``, a type of ``TensorProto``, and back to fp32 between nodes that compute in fp32."""
    makers = {name: node for node in graph.node for name in node.output}

    def is_cast(node: NodeProto | None, to: int) -> bool:
        return node is not None and node.op_type == "Cast" and node.attribute[0].i == to

    renamed = {}
    for node in graph.node:
        before = makers.get(node.input[0]) if node.input else None
        if is_cast(node, TensorProto.FLOAT) and is_cast(before, half) and before is not None:
            renamed[node.output[0]] = before.input[0]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    kept = {value.name for value in graph.output} | {name for node in graph.node for name in node.input}
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] not in kept:
            graph.node.remove(node)
