"""Quantization as nodes of the graph: Q/DQ pairs with constant scales, which is all that TensorRT reads.

Weights are stored as codes behind a DequantizeLinear; a quantized input goes through QuantizeLinear and
DequantizeLinear with one scale for the tensor. Nothing is left to a flag of the builder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from headwise.calibration.formats import GRIDS, input_scale
from headwise.export.matrices import Product, products
from headwise.export.precision import Precision, check_graph, to_precision
from headwise.model.quantization import Codes, Format, MatrixPlan, QuantPlan, scheme

Array = NDArray[Any]

SCALE_DTYPES: Mapping[Precision, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
"""Scales have the type of the graph: DequantizeLinear writes what its scale is."""


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
        multiplications: explicit scales in front of matrices that could not be folded away.
    """

    bytes: int
    promises: tuple[Promise, ...]
    multiplications: int


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

    Args:
        source: the fp32 graph that was planned on.
        dst: the new file.
        plan: what becomes of every matrix.
        codes: of every quantized matrix.
        precision: of everything else.
        keep_io: keep float inputs and outputs in fp32.

    Raises:
        ExportError: the graph cannot be converted, or the result is not valid.
    """
    model = onnx.load(str(source))
    added = smooth(model, plan)
    correct_biases(model, codes)
    model = to_precision(model, precision, keep_io=keep_io)
    writer = _Writer(model.graph, SCALE_DTYPES[precision])
    planned = plan.quantized()
    promises = [
        writer.quantize(product, planned[product.name], codes[product.name])
        for product in products(model.graph)
        if product.name in planned
    ]
    writer.finish()
    check_graph(model, "the quantized graph", fix="report this with the recipe: it is a bug in headwise")
    onnx.save(model, str(dst))
    return QuantizedGraph(bytes=dst.stat().st_size, promises=tuple(promises), multiplications=added)


def smooth(model: onnx.ModelProto, plan: QuantPlan) -> int:
    """Scale channels of activations and the weights behind them, in place, without a change to the outputs.

    Returns:
        The number of multiplications that were added.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    planned = plan.quantized()
    before: dict[str, list[NodeProto]] = {}
    added: set[str] = set()
    for product in products(graph):
        tap = product.node.input[0]
        if product.name not in planned or tap not in plan.smooth:
            continue
        exponents = np.asarray(plan.smooth[tap])
        weight = numpy_helper.to_array(constants[product.weight])
        scaled = np.ldexp(weight, exponents if product.transposed else exponents[:, None])
        name = f"{product.weight}_{product.node.name}_smoothed"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(scaled), name))
        product.node.input[1] = name
        if tap not in added:
            added.add(tap)
            factor = numpy_helper.from_array(np.ldexp(np.float32(1), -exponents).astype(np.float32), f"{tap}_factor")
            graph.initializer.append(factor)
            node = helper.make_node("Mul", [tap, factor.name], [f"{tap}_smoothed"], name=f"{tap}_smooth")
            before[product.node.output[0]] = [node]
        product.node.input[0] = f"{tap}_smoothed"
    insert_before(graph, before)
    drop_unused(graph)
    return len(added)


def correct_biases(model: onnx.ModelProto, codes: Mapping[str, Codes]) -> None:
    """Add to the biases what ``Codes`` say, in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for product in products(model.graph):
        delta = codes[product.name].bias_delta if product.name in codes else None
        if delta is not None and product.bias:
            tensor = constants[product.bias]
            changed = numpy_helper.to_array(tensor) + delta
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), product.bias))


class _Writer:
    """Adds Q/DQ nodes to one graph."""

    def __init__(self, graph: onnx.GraphProto, dtype: np.dtype[Any]) -> None:
        self.graph = graph
        self.dtype = dtype
        self.before: dict[str, list[NodeProto]] = {}
        self.inputs: dict[tuple[str, str, float], str] = {}

    def quantize(self, product: Product, plan: MatrixPlan, codes: Codes) -> Promise:
        """Replace the matrix by codes and, where the plan says so, quantize the input."""
        nodes = self.before.setdefault(product.node.output[0], [])
        if plan.input_largest is not None:
            product.node.input[0] = self._input(product.node.input[0], plan, nodes)
        assert plan.format is not None, "only quantized matrices come here"
        product.node.input[1] = self._weight(product, plan, codes, nodes)
        return Promise(
            matrix=product.name,
            node=product.node.name,
            decode=nodes[-1].name,
            format=plan.format,
            weights_only=plan.input_largest is None,
        )

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
            zero = np.zeros((), GRIDS[plan.format].dtype)
            names = [self._constant(scale, f"{stem}_scale"), self._constant(zero, f"{stem}_zero")]
            nodes.append(helper.make_node("QuantizeLinear", [tensor, *names], [f"{stem}_codes"], name=f"{stem}_q"))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"{stem}_codes", *names], [f"{stem}_values"], name=f"{stem}_dq")
            )
            self.inputs[key] = f"{stem}_values"
        return self.inputs[key]

    def _taken(self, tensor: str, number: str) -> bool:
        return any(known == (tensor, number) for known in (key[:2] for key in self.inputs))

    def _weight(self, product: Product, plan: MatrixPlan, codes: Codes, nodes: list[NodeProto]) -> str:
        stem = f"{product.name}.weight"
        values, scale = codes.values, codes.scale.astype(self.dtype)
        if product.transposed:
            values, scale = values.T, scale.T
        names = [self._constant(values, f"{stem}_codes"), self._constant(scale, f"{stem}_scale")]
        node = helper.make_node("DequantizeLinear", names, [f"{stem}_values"], name=f"{stem}_dq")
        outputs = 0 if product.transposed else 1
        attributes = {"axis": outputs} if plan.block is None else {"axis": 1 - outputs, "block_size": plan.block}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        nodes.append(node)
        return str(node.output[0])

    def _constant(self, value: Array, name: str) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


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
