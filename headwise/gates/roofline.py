"""A lower bound of the time of a graph on a GPU: operations and bytes counted in the file, by published peaks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from headwise.export.graph import module_path
from headwise.gates.cost import known_shapes
from headwise.gates.gpus import Gpu
from headwise.gates.macs import Shape, counts, macs

_NUMBERS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "fp16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}
_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "fp8": 8, "int4": 4, "fp4": 4}
_PASSES = frozenset({"Transpose", "Reshape", "Cast", "Identity", "Mul"})
"""Operators that a weight may pass on its way to a product."""
_LAYER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The products of one kind: those of the same module in all layers.

    Attributes:
        name: module path, with ``*`` for the layer, and operator.
        count: products.
        number: format of the operands.
        flops: operations, two per multiply-accumulate.
        weight_bytes: that have to be read; weights are too large to stay on the chip.
        activation_bytes: of inputs and outputs, which may stay on the chip and do not count in the bound.
        bound_ms: no kernel can be faster.
    """

    name: str
    count: int
    number: str
    flops: int
    weight_bytes: int
    activation_bytes: int
    bound_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The bound of a whole graph.

    Attributes:
        work: by kind of product, the slowest first.
        flops: of all products.
        bytes: weights of products, and inputs and outputs of the graph, a cache among them.
        compute_ms: operations by the peaks of their formats.
        memory_ms: bytes by the bandwidth.
    """

    work: tuple[Work, ...]
    flops: int
    bytes: int
    compute_ms: float
    memory_ms: float

    @property
    def bound_ms(self) -> float:
        """No engine of this graph can be faster; operations and transfers may overlap."""
        return max(self.compute_ms, self.memory_ms)


def roofline(path: Path, shapes: Mapping[str, Shape], gpu: Gpu) -> Roofline:
    """Count every product of a graph.

    Args:
        path: a graph of the default operator set.
        shapes: input name -> concrete shape.
        gpu: published peaks.

    Raises:
        ExportError: an input has no shape here, or a node's work cannot be counted.
    """
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for node in model.graph.node if counts(node)]
    sizes = known_shapes(path, model, shapes)
    weights = _Weights(model.graph)
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for node in nodes:
        stored = [weights.of(name) for name in node.input if name]
        number = weights.operands(node)
        plain = [name for name, held in zip(node.input, stored, strict=False) if held is None]
        moving = sum(prod(sizes.get(name, ())) for name in [*plain, *node.output] if name)
        numbers = (2 * macs(node, sizes), sum(filter(None, stored)), moving * _BITS[number] // 8)
        name = f"{_LAYER.sub('.*', module_path(node)) or 'graph'} {node.op_type}"
        found.setdefault((name, number), []).append(numbers)
    work = [_work(name, number, entries, gpu) for (name, number), entries in found.items()]
    ends = [*model.graph.input, *model.graph.output]
    moved = sum(prod(sizes.get(v.name, ())) * _width(v.type.tensor_type.elem_type) for v in ends)
    moved += sum(one.weight_bytes for one in work)
    return Roofline(
        work=tuple(sorted(work, key=lambda one: -one.bound_ms)),
        flops=sum(one.flops for one in work),
        bytes=moved,
        compute_ms=sum(1e3 * one.flops / gpu.peak(one.number) for one in work),
        memory_ms=moved / gpu.bandwidth / 1e6,
    )


def _work(name: str, number: str, entries: list[tuple[int, int, int]], gpu: Gpu) -> Work:
    flops, weight_bytes, activation_bytes = (sum(column) for column in zip(*entries, strict=True))
    return Work(
        name=name,
        count=len(entries),
        number=number,
        flops=flops,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        bound_ms=1e3 * max(flops / gpu.peak(number), weight_bytes / gpu.bandwidth / 1e9),
    )


def _width(dtype: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(dtype).itemsize)


class _Weights:
    """Which values of a graph are weights, in which format they are stored, and what products compute in."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        floats = [_NUMBERS[t.data_type] for t in graph.initializer if t.data_type in _NUMBERS and len(t.dims) == 2]
        self._own = "fp16" if "fp16" in floats else "fp32"

    def of(self, value: str) -> int | None:
        """Bytes of the stored weight behind a value; None where it is an activation."""
        tensor = self._stored(value)
        if tensor is None or tensor.data_type not in _NUMBERS:
            return None
        return int(prod(tensor.dims)) * _BITS[_NUMBERS[tensor.data_type]] // 8

    def operands(self, node: onnx.NodeProto) -> str:
        """The format that both operands of a product have behind their Q/DQ nodes; else that of the graph."""
        formats = {self._quantized(name) for name in node.input[:2]}
        found = formats.pop() if len(formats) == 1 else None
        return found or ("int8" if node.op_type == "MatMulInteger" else self._own)

    def _stored(self, value: str) -> onnx.TensorProto | None:
        while value not in self._tensors:
            node = self._makers.get(value)
            if node is None or node.op_type not in {"DequantizeLinear", *_PASSES}:
                return None
            value = node.input[0]
        return self._tensors[value]

    def _quantized(self, value: str) -> str | None:
        node = self._makers.get(value)
        while node is not None and node.op_type in _PASSES:
            node = self._makers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        source = self._makers.get(node.input[0])
        held = self._tensors.get(node.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            zero = self._tensors.get(source.input[2]) if len(source.input) > 2 else None
            kinds = [helper.get_attribute_value(a) for a in source.attribute if a.name == "output_dtype"]
            return _NUMBERS.get(zero.data_type if zero is not None else kinds[0] if kinds else TensorProto.UINT8)
        return None if held is None else _NUMBERS.get(held.data_type)
