"""A bf16 graph in fp32 arithmetic: ONNX Runtime has no bf16 kernels for the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper


def widen(source: Path, target: Path) -> None:
    """Write a graph with every bf16 type as fp32. Weights keep the values that bf16 rounded them to.

    What differs from the bf16 graph is the rounding between its nodes.
    """
    model = onnx.load(str(source))
    widen_model(model)
    onnx.save(model, str(target))


def widen_model(model: onnx.ModelProto) -> None:
    """The same to a graph in memory, in place."""
    graph = model.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == AttributeProto.TENSOR:
            _widen(attribute.t)


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
