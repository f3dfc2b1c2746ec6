"""Small edits that every rewriting of a graph needs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import NodeProto


def insert_before(graph: onnx.GraphProto, before: Mapping[str, list[NodeProto]]) -> None:
    """Put nodes in front of those that read them, which are named by their first output."""
    ordered = [node for old in graph.node for node in (*before.get(old.output[0], ()), old)]
    del graph.node[:]
    graph.node.extend(ordered)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Drop constants that no node reads."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
