"""INT8 as ONNX Runtime runs it fastest on a CPU: integer products of inputs that are quantized anew in every call.

The weights have the codes and scales that a TensorRT graph would get; an input gets the scale and zero point of its own
range in this call, which TensorRT cannot do and which needs no calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from headwise.calibration.formats import restore
from headwise.export.absorbed import find_absorbed, replace_weight
from headwise.export.edits import drop_unused, insert_before
from headwise.export.matrices import Product, lookups, products
from headwise.export.precision import check_graph
from headwise.export.quantize import correct_biases
from headwise.model.quantization import Codes, QuantPlan

_REPLACED = frozenset({"MatMul", "Gemm", "Gather"})


def write_dynamic(source: Path, dst: Path, plan: QuantPlan, codes: Mapping[str, Codes]) -> None:
    """Write an fp32 graph whose quantized matrices multiply in int8.

    In the graph of single tokens, what became of the matrices of latents is multiplied in fp32 and has the numbers that
    their codes stand for: the product of one head is too small to gain from integers.

    Args:
        source: the fp32 graph that was planned on, or that of single tokens beside it.
        dst: the new file.
        plan: which matrices; they all are in int8 with one scale per output.
        codes: of every quantized matrix.

    Raises:
        ExportError: the result is not valid.
    """
    model = onnx.load(str(source))
    correct_biases(model, codes)
    graph = model.graph
    before: dict[str, list[NodeProto]] = {}
    inputs: dict[str, tuple[str, str, str]] = {}
    weights: dict[str, tuple[str, str]] = {}
    planned, tables = plan.quantized(), {entry.name for entry in plan.tables if entry.format is not None}
    rows = [(name, node) for name, node in lookups(graph) if name in tables]
    for product in products(graph):
        if product.name in planned:
            nodes = before.setdefault(product.node.output[0], [])
            nodes += _integer_product(graph, product, codes[product.name], inputs, weights)
    for name, lookup in rows:
        before[lookup.output[0]] = _stored_rows(graph, name, lookup, codes[name])
    for found in find_absorbed(graph):
        if found.name in planned:
            replace_weight(graph, found, restore(codes[found.name], None, np.dtype(np.float32)))
    gone = set(before)
    insert_before(graph, before)
    kept = [node for node in graph.node if not (node.op_type in _REPLACED and node.output[0] in gone)]
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)
    check_graph(model, "the int8 graph", fix="report this with the recipe: it is a bug in headwise")
    onnx.save(model, str(dst))


def _stored_rows(graph: onnx.GraphProto, name: str, node: NodeProto, codes: Codes) -> list[NodeProto]:
    """Nodes that look up codes and scales and decode the rows that were found, and no others."""
    stem, output = f"{name}.int8", node.output[0]
    constants = {f"{stem}_rows": codes.values.T, f"{stem}_scale": codes.scale.astype(np.float32)[:, None]}
    graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in constants.items()
    )
    rows, scale = constants
    return [
        helper.make_node("Gather", [rows, node.input[1]], [f"{stem}_found"], name=f"{stem}_found"),
        helper.make_node("Gather", [scale, node.input[1]], [f"{stem}_scales"], name=f"{stem}_scales"),
        helper.make_node("Cast", [f"{stem}_found"], [f"{stem}_float"], name=f"{stem}_float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{stem}_float", f"{stem}_scales"], [output], name=node.name),
    ]


def _integer_product(
    graph: onnx.GraphProto,
    product: Product,
    codes: Codes,
    inputs: dict[str, tuple[str, str, str]],
    weights: dict[str, tuple[str, str]],
) -> list[NodeProto]:
    """Nodes that end in the product's output. ``inputs`` and ``weights`` hold the quantized form of what has one."""
    nodes: list[NodeProto] = []
    node, stem = product.node, f"{product.name}.int8"
    tensor, output = node.input[0], node.output[0]
    if tensor not in inputs:
        inputs[tensor] = (f"{tensor}_codes", f"{tensor}_scale", f"{tensor}_zero")
        nodes.append(helper.make_node("DynamicQuantizeLinear", [tensor], inputs[tensor], name=f"{tensor}_quantize"))
    values, scale, zero = inputs[tensor]
    if product.stored not in weights:
        constants = {f"{stem}_weight": codes.values, f"{stem}_scale": codes.scale.astype(np.float32)}
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
        weights[product.stored] = (f"{stem}_weight", f"{stem}_scale")
    weight, weight_scale = weights[product.stored]
    multiply = helper.make_node("MatMulInteger", [values, weight, zero], [f"{stem}_sum"], name=node.name)
    multiply.metadata_props.extend(node.metadata_props)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    nodes += [
        helper.make_node("Mul", [scale, weight_scale], [f"{stem}_scales"], name=f"{stem}_scales"),
        multiply,
        helper.make_node("Cast", [f"{stem}_sum"], [f"{stem}_float"], name=f"{stem}_float", to=onnx.TensorProto.FLOAT),
        helper.make_node(
            "Mul",
            [f"{stem}_float", f"{stem}_scales"],
            [f"{stem}_product" if bias else output],
            name=f"{stem}_rescale",
        ),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [f"{stem}_product", bias], [output], name=f"{stem}_bias"))
    return nodes
