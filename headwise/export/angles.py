"""Angles of rotary positions stay in fp32: fp16 tells tokens apart up to number 2048 only, bf16 up to 256."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from graphlib import TopologicalSorter

import onnx
from onnx import NodeProto, TensorProto, helper

_MARK = "_fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Angles:
    """The nodes of a graph that compute cosines and sines, from positions and frequencies on, as they are in fp32.

    Attributes:
        nodes: in their order.
        constants: what they read that is stored in the graph.
        given: their float inputs that are inputs of the graph.
    """

    nodes: tuple[NodeProto, ...]
    constants: tuple[TensorProto, ...]
    given: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Angles:
        """Find them; every cosine of a graph counts as one of an angle."""
        graph = model.graph
        left = [node.output[0] for node in graph.node if node.op_type in ("Cos", "Sin")]
        if not left:
            return cls(nodes=(), constants=(), given=frozenset())
        inferred = onnx.shape_inference.infer_shapes(model).graph
        known = [*inferred.input, *inferred.output, *inferred.value_info]
        floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        makers = {name: node for node in graph.node for name in node.output}
        found: set[str] = set()
        while left:
            name = left.pop()
            if name in makers and name in floats and name not in found:
                found.add(name)
                left += makers[name].input
        nodes = [node for node in graph.node if found.intersection(node.output)]
        read = {name for node in nodes for name in node.input}
        return cls(
            nodes=tuple(deepcopy(node) for node in nodes),
            constants=tuple(deepcopy(tensor) for tensor in graph.initializer if tensor.name in read),
            given=frozenset(value.name for value in graph.input if value.name in read & floats),
        )

    def put_back(self, graph: onnx.GraphProto, half: int) -> None:
        """Put them into the graph in a half precision, in the place of what they have become there.

        Args:
            graph: the graph, whose nodes still have their names.
            half: its type, of ``TensorProto``.
        """
        if not self.nodes:
            return
        names = {node.name for node in self.nodes}
        kept = [node for node in graph.node if node.name not in names]
        del graph.node[:]
        graph.node.extend([*self._exact(half), *kept])
        graph.initializer.extend(_renamed(tensor) for tensor in self.constants if tensor.data_type == TensorProto.FLOAT)
        _drop_unused(graph)
        _sort(graph)

    def _exact(self, half: int) -> Iterator[NodeProto]:
        """The nodes under names of their own, and casts between them and the rest."""
        floats = {tensor.name for tensor in self.constants if tensor.data_type == TensorProto.FLOAT}
        floats |= {name for node in self.nodes for name in node.output} | self.given
        for name in sorted(self.given):
            yield helper.make_node("Cast", [name], [name + _MARK], name=f"{name}{_MARK}_in", to=TensorProto.FLOAT)
        for node in self.nodes:
            exact = deepcopy(node)
            exact.input[:] = [name + _MARK if name in floats else name for name in node.input]
            exact.output[:] = [name + _MARK for name in node.output]
            yield exact
            for name in node.output:
                yield helper.make_node("Cast", [name + _MARK], [name], name=f"{name}{_MARK}_out", to=half)


def _renamed(tensor: TensorProto) -> TensorProto:
    made = deepcopy(tensor)
    made.name += _MARK
    return made


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that nothing reads any more."""
    makers = {name: node for node in graph.node for name in node.output}
    left, used = [value.name for value in graph.output], set[str]()
    while left:
        name = left.pop()
        if name not in used:
            used.add(name)
            left += _reads(makers[name]) if name in makers else []
    nodes = [node for node in graph.node if used.intersection(node.output)]
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    values = [value for value in graph.value_info if value.name in used]
    for field, kept in ((graph.node, nodes), (graph.initializer, constants), (graph.value_info, values)):
        del field[:]
        field.extend(kept)


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node behind those whose results it reads."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    reads = {i: {makers[name] for name in _reads(node) if name in makers} for i, node in enumerate(graph.node)}
    nodes = [graph.node[index] for index in TopologicalSorter(reads).static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def _reads(node: NodeProto) -> list[str]:
    """Names that a node reads, in its branches and loops too."""
    inner = [name for attribute in node.attribute for inside in attribute.g.node for name in _reads(inside)]
    inner += [value.name for attribute in node.attribute for value in attribute.g.output]
    return [*node.input, *inner]
