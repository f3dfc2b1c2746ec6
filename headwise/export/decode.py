"""The same graph for a runtime that lacks its formats: ONNX Runtime has no fp4 and no MX, and joins no fp8 tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from headwise.export.blocks import TRT, spell_out_blocks
from headwise.export.edits import drop_unused
from headwise.export.kv_cache import decode_caches
from headwise.export.quantize import MXFP8_DECODE

Array = NDArray[Any]


def decode_for_onnxruntime(source: Path, target: Path) -> bool:
    """Write ``source`` with numbers in the place of codes that ONNX Runtime cannot compute with.

    Weights become constants, by the codes and scales of the file. A cache of fp8 codes becomes one of the numbers that
    these codes stand for: every call rounds its new tokens as the graph for TensorRT does. Activations in blocks are
    rounded by the arithmetic of the node that does it in TensorRT.

    Returns:
        Whether there was something to decode; otherwise nothing is written.
    """
    model = onnx.load(str(source))
    if not (_decode_weights(model.graph) | decode_caches(model.graph) | spell_out_blocks(model)):
        return False
    kept = [entry for entry in model.opset_import if entry.domain != TRT]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    drop_unused(model.graph)
    onnx.save(model, str(target))
    return True


def _decode_weights(graph: onnx.GraphProto) -> bool:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    decoded: list[NodeProto] = []
    needed = [node for node in graph.node if _unknown(node, constants)]
    scales = {name for node in needed for name in node.input[1:]}
    for node in graph.node:
        if node in needed or (node.op_type == "DequantizeLinear" and node.output[0] in scales):
            values, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
            tensor = numpy_helper.from_array(_decode(node, values, scale), node.output[0])
            graph.initializer.append(tensor)
            constants[tensor.name] = tensor
            decoded.append(node)
    for node in decoded:
        graph.node.remove(node)
    return bool(decoded)


def _unknown(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether a node decodes constants in a way that ONNX Runtime has no kernel for."""
    four_bit = node.op_type == "DequantizeLinear" and node.input[0] in constants
    return node.op_type == MXFP8_DECODE or (four_bit and constants[node.input[0]].data_type == TensorProto.FLOAT4E2M1)


def _decode(node: NodeProto, codes: Array, scale: Array) -> Array:
    """Codes times scales, rounded to the type that the node writes."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    dtype = scale.dtype
    factors = scale.astype(np.float32)
    if node.op_type == MXFP8_DECODE:
        dtype = helper.tensor_dtype_to_np_dtype(attributes["output_dtype"])
        factors = np.exp2(factors - 127)
    if factors.ndim:
        factors = np.repeat(factors, attributes["block_size"], axis=attributes["axis"])
    return np.asarray((codes.astype(np.float32) * factors).astype(dtype))
