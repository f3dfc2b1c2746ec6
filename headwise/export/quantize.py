"""Quantization as nodes of the graph: Q/DQ pairs with constant scales, which is all that TensorRT reads.

Weights are stored as codes behind a DequantizeLinear; a quantized input goes through QuantizeLinear and
DequantizeLinear with one scale for the tensor. Nothing is left to a flag of the builder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from headwise.calibration.formats import GRIDS, input_scale
from headwise.export.absorbed import Absorbed, find_absorbed
from headwise.export.blocks import TRT, block_nodes
from headwise.export.edits import drop_unused, insert_before
from headwise.export.kv_cache import code_caches, keep_apart
from headwise.export.matrices import Product, lookups, products
from headwise.export.precision import Precision, check_graph, to_precision
from headwise.model.quantization import Codes, Format, MatrixPlan, QuantPlan, scheme

Array = NDArray[Any]

SCALE_DTYPES: Mapping[Precision, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
"""Scales have the type of the graph: DequantizeLinear writes what its scale is."""
MXFP8_DECODE = "TRT_MXFP8DequantizeLinear"
"""ONNX has no scales that are powers of two only; TensorRT has a node of its own for them."""
_E8M0_BIAS = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One matrix that an engine must not run in the precision of the graph.

    Attributes:
        matrix: its name.
        node: the node that multiplies with it.
        decode: the node that turns its codes into numbers.
        format: of its weights.
        weights_only: whether its input keeps the precision of the graph.
    """

    matrix: str
    node: str
    decode: str
    format: Format
    weights_only: bool

    @property
    def scheme(self) -> str:
        """See ``model.quantization.scheme``."""
        return scheme(self.format, weights_only=self.weights_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGraph:
    """What was written.

    Attributes:
        bytes: size of the file.
        promises: one per quantized matrix.
    """

    bytes: int
    promises: tuple[Promise, ...]


def write_quantized(
    source: Path,
    dst: Path,
    plan: QuantPlan,
    codes: Mapping[str, Codes],
    *,
    precision: Precision,
    keep_io: bool = False,
) -> QuantizedGraph:
    """Write the graph as the plan says.

    The graph of single tokens gets what was planned on the one that reads prompts: matrices have the same names. Where
    it multiplies queries and outputs with the matrices of latents, these are quantized and their new inputs are not.

    Args:
        source: the fp32 graph that was planned on, or that of single tokens beside it.
        dst: the new file.
        plan: what becomes of every matrix.
        codes: of every quantized matrix.
        precision: of everything else.
        keep_io: keep float inputs and outputs in fp32.

    Raises:
        ExportError: the graph cannot be converted, or the result is not valid.
    """
    model = onnx.load(str(source))
    correct_biases(model, codes)
    model = to_precision(model, precision, keep_io=keep_io)
    writer = _Writer(model.graph, SCALE_DTYPES[precision])
    planned, tables = plan.quantized(), {entry.name: entry for entry in plan.tables if entry.format is not None}
    rows = [(name, node) for name, node in lookups(model.graph) if name in tables]
    promises = [
        writer.quantize(product, planned[product.name], codes[product.name])
        for product in products(model.graph)
        if product.name in planned
    ]
    promises += [
        writer.absorb(found, replace(planned[found.name], input_largest=None), codes[found.name])
        for found in find_absorbed(model.graph)
        if found.name in planned
    ]
    promises += [writer.store(name, node, tables[name], codes[name]) for name, node in rows]
    writer.finish()
    if any(node.domain == TRT for node in model.graph.node):
        model.opset_import.append(helper.make_opsetid(TRT, 1))
    check_graph(model, "the quantized graph", fix="report this with the recipe: it is a bug in headwise")
    code_caches(model.graph, "fp8")
    alone = {promise.node for promise in promises if promise.weights_only}
    keep_apart(model.graph, alone, SCALE_DTYPES[precision])
    onnx.save(model, str(dst))
    return QuantizedGraph(bytes=dst.stat().st_size, promises=tuple(promises))


def correct_biases(model: onnx.ModelProto, codes: Mapping[str, Codes]) -> None:
    """Add to the biases what ``Codes`` say, in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = {entry.name: entry.bias for entry in products(model.graph)}
    biases |= {entry.name: entry.bias for entry in find_absorbed(model.graph)}
    for name, bias in biases.items():
        delta = codes[name].bias_delta if name in codes else None
        if delta is not None and bias:
            tensor = constants[bias]
            changed = numpy_helper.to_array(tensor) + delta.reshape(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), bias))


class _Writer:
    """Adds Q/DQ nodes to one graph."""

    def __init__(self, graph: onnx.GraphProto, dtype: np.dtype[Any]) -> None:
        self.graph = graph
        self.dtype = dtype
        self.before: dict[str, list[NodeProto]] = {}
        self.inputs: dict[tuple[str, str, float], str] = {}
        self.weights: dict[tuple[str, MatrixPlan], tuple[str, str]] = {}

    def quantize(self, product: Product, plan: MatrixPlan, codes: Codes) -> Promise:
        """Replace the matrix by codes and, where the plan says so, quantize the input."""
        nodes = self.before.setdefault(product.node.output[0], [])
        if plan.input_largest is not None:
            product.node.input[0] = self._input(product.node.input[0], plan, nodes)
        assert plan.format is not None, "only quantized matrices come here"
        # Layers that share a constant share its codes; what only their inputs differ in does not matter here.
        key = (product.stored, replace(plan, name="", input_largest=None))
        if key not in self.weights:
            values = self._weight(product.name, plan, codes, nodes, transposed=product.transposed)
            self.weights[key] = (values, nodes[-1].name)
        product.node.input[1], decode = self.weights[key]
        return Promise(
            matrix=product.name,
            node=product.node.name,
            decode=decode,
            format=plan.format,
            weights_only=plan.input_largest is None,
        )

    def absorb(self, found: Absorbed, plan: MatrixPlan, codes: Codes) -> Promise:
        """Replace an up-projection by the codes of its matrix, those of one head after the other."""
        assert plan.format is not None, "only quantized matrices come here"
        shape = next(list(tensor.dims) for tensor in self.graph.initializer if tensor.name == found.weight)
        reader = next(node for node in self.graph.node if found.weight in node.input)
        nodes = self.before.setdefault(reader.output[0], [])
        values = self._weight(found.name, plan, codes, nodes, transposed=True)
        decode, heads = nodes[-1].name, f"{found.name}.weight_heads"
        sizes = self._constant(np.asarray(shape), f"{heads}_sizes")
        nodes.append(helper.make_node("Reshape", [values, sizes], [heads], name=heads))
        reader.input[:] = [heads if name == found.weight else name for name in reader.input]
        return Promise(matrix=found.name, node=found.node.name, decode=decode, format=plan.format, weights_only=True)

    def store(self, name: str, node: NodeProto, plan: MatrixPlan, codes: Codes) -> Promise:
        """Replace the table that a node reads rows of by codes."""
        nodes = self.before.setdefault(node.output[0], [])
        assert plan.format is not None, "only quantized tables come here"
        node.input[0] = self._weight(name, plan, codes, nodes, transposed=True)
        return Promise(matrix=name, node=node.name, decode=nodes[-1].name, format=plan.format, weights_only=True)

    def finish(self) -> None:
        """Put the new nodes in place, and drop the weights that nobody reads any more."""
        insert_before(self.graph, self.before)
        drop_unused(self.graph)

    def _input(self, tensor: str, plan: MatrixPlan, nodes: list[NodeProto]) -> str:
        assert plan.format is not None, "only quantized matrices come here"
        assert plan.input_largest is not None, "only quantized inputs come here"
        key = (tensor, plan.format, plan.input_largest)
        if key not in self.inputs:
            stem = f"{tensor}_{plan.format}" + (f"_{len(self.inputs)}" if self._taken(tensor, plan.format) else "")
            scale = np.asarray(input_scale(plan.input_largest, plan.format, self.dtype)).astype(self.dtype)
            self.inputs[key] = f"{stem}_values"
            if plan.format == "nvfp4":
                nodes += block_nodes(tensor, self._constant(scale, f"{stem}_scale"), stem)
                return self.inputs[key]
            zero = np.zeros((), GRIDS[plan.format].dtype)
            names = [self._constant(scale, f"{stem}_scale"), self._constant(zero, f"{stem}_zero")]
            nodes.append(helper.make_node("QuantizeLinear", [tensor, *names], [f"{stem}_codes"], name=f"{stem}_q"))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"{stem}_codes", *names], [f"{stem}_values"], name=f"{stem}_dq")
            )
        return self.inputs[key]

    def _taken(self, tensor: str, number: str) -> bool:
        return any(known == (tensor, number) for known in (key[:2] for key in self.inputs))

    def _weight(self, name: str, plan: MatrixPlan, codes: Codes, nodes: list[NodeProto], *, transposed: bool) -> str:
        stem = f"{name}.weight"
        inputs = 1 if transposed else 0
        values, scale = (codes.values.T, codes.scale.T) if transposed else (codes.values, codes.scale)
        coded = self._constant(values, f"{stem}_codes")
        if plan.format == "mxfp8":
            exponents = (np.rint(np.log2(scale)) + _E8M0_BIAS).astype(np.uint8)
            node = helper.make_node(
                MXFP8_DECODE, [coded, self._constant(exponents, f"{stem}_scale")], [f"{stem}_values"], domain=TRT
            )
            attributes = {"axis": inputs, "block_size": plan.block, "output_dtype": _onnx_type(self.dtype)}
        else:
            node = helper.make_node("DequantizeLinear", [coded, self._scale(stem, plan, codes, scale, nodes)], [])
            node.output.append(f"{stem}_values")
            attributes = {"axis": 1 - inputs} if plan.block is None else {"axis": inputs, "block_size": plan.block}
        node.name = f"{stem}_dq"
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        nodes.append(node)
        return str(node.output[0])

    def _scale(self, stem: str, plan: MatrixPlan, codes: Codes, scale: Array, nodes: list[NodeProto]) -> str:
        """The scales as a constant; those of nvfp4 are themselves fp8 codes with one scale."""
        if plan.format != "nvfp4":
            return self._constant(scale.astype(self.dtype), f"{stem}_scale")
        coded = self._constant(scale.astype(GRIDS["fp8"].dtype), f"{stem}_scale_codes")
        shared = self._constant(np.asarray(codes.shared).astype(self.dtype), f"{stem}_scale_scale")
        nodes.append(helper.make_node("DequantizeLinear", [coded, shared], [f"{stem}_scale"], name=f"{stem}_scale_dq"))
        return f"{stem}_scale"

    def _constant(self, value: Array, name: str) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name


def _onnx_type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))
