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

from headwise.export.matrices import Product, products
from headwise.export.precision import check_graph
from headwise.export.quantize import correct_biases, drop_unused, insert_before, smooth
from headwise.model.quantization import Codes, QuantPlan


def write_dynamic(source: Path, dst: Path, plan: QuantPlan, codes: Mapping[str, Codes]) -> int:
    """Write an fp32 graph whose quantized matrices multiply in int8.

    Args:
        source: the fp32 graph that was planned on.
        dst: the new file.
        plan: which matrices; they all are in int8 with one scale per output.
        codes: of every quantized matrix.

    Returns:
        The number of explicit scales in front of matrices.

    Raises:
        ExportError: the result is not valid.
    """
    model = onnx.load(str(source))
    added = smooth(model, plan)
    correct_biases(model, codes)
    graph = model.graph
    before: dict[str, list[NodeProto]] = {}
    inputs: dict[str, tuple[str, str, str]] = {}
    planned = plan.quantized()
    for product in products(graph):
        if product.name in planned:
            nodes = before.setdefault(product.node.output[0], [])
            nodes += _integer_product(graph, product, codes[product.name], inputs)
    gone = set(before)
    insert_before(graph, before)
    kept = [node for node in graph.node if not (node.op_type in ("MatMul", "Gemm") and node.output[0] in gone)]
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)
    check_graph(model, "the int8 graph", fix="report this with the recipe: it is a bug in headwise")
    onnx.save(model, str(dst))
    return added


def _integer_product(
    graph: onnx.GraphProto, product: Product, codes: Codes, inputs: dict[str, tuple[str, str, str]]
) -> list[NodeProto]:
    """Nodes that end in the product's output. ``inputs`` holds the quantized form of tensors that have one."""
    nodes: list[NodeProto] = []
    node, stem = product.node, f"{product.name}.int8"
    tensor, output = node.input[0], node.output[0]
    if tensor not in inputs:
        inputs[tensor] = (f"{tensor}_codes", f"{tensor}_scale", f"{tensor}_zero")
        nodes.append(helper.make_node("DynamicQuantizeLinear", [tensor], inputs[tensor], name=f"{tensor}_quantize"))
    values, scale, zero = inputs[tensor]
    constants = {f"{stem}_weight": codes.values, f"{stem}_scale": codes.scale.astype(np.float32)}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    weight, weight_scale = constants
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
