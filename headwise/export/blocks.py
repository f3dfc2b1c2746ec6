"""Activations in NVFP4: nodes of TensorRT, and the same arithmetic in nodes of ONNX.

A block of 16 channels gets its scale while the graph runs: an fp8 number times one constant of the tensor. ONNX Runtime
has no kernel for the node that does it, so that what is judged there is the arithmetic spelled out.
"""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx.parser
from onnx import NodeProto, TensorProto, helper

from headwise.calibration.formats import GRIDS

TRT, FP4_ENCODE = "trt", "TRT_FP4DynamicQuantize"
_GRID = GRIDS["nvfp4"]


def block_nodes(tensor: str, shared: str, stem: str) -> list[NodeProto]:
    """Nodes that end in ``{stem}_values``: codes and scales of blocks, the scales as numbers, the codes as numbers.

    Args:
        tensor: (..., K), K a multiple of 16.
        shared: name of the constant that the scales of all blocks share.
        stem: of the names.
    """
    codes, coded, scales = f"{stem}_codes", f"{stem}_scale_codes", f"{stem}_scales"
    encode = helper.make_node(FP4_ENCODE, [tensor, shared], [codes, coded], name=f"{stem}_q", domain=TRT)
    attributes = {"axis": -1, "block_size": _GRID.block, "scale_type": TensorProto.FLOAT8E4M3FN}
    encode.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return [
        encode,
        helper.make_node("DequantizeLinear", [coded, shared], [scales], name=f"{stem}_scales_dq"),
        helper.make_node(
            "DequantizeLinear", [codes, scales], [f"{stem}_values"], name=f"{stem}_dq", axis=-1, block_size=_GRID.block
        ),
    ]


def spell_out_blocks(model: onnx.ModelProto) -> bool:
    """Replace what ``block_nodes`` made by nodes of ONNX, in place. Whether there was such a node."""
    graph = model.graph
    readers = {name: node for node in graph.node for name in node.input}
    encoders = [node for node in graph.node if node.op_type == FP4_ENCODE]
    for encode in encoders:
        scales, decode = readers[encode.output[1]], readers[encode.output[0]]
        graph.node.remove(scales)
        graph.node.remove(decode)
        encode.CopyFrom(
            helper.make_node(_ROUND.name, encode.input, decode.output, name=encode.name, domain=_ROUND.domain)
        )
    if encoders:
        model.functions.append(_ROUND)
        model.opset_import.append(helper.make_opsetid(_ROUND.domain, 1))
        model.CopyFrom(onnx.inliner.inline_local_functions(model))
    return bool(encoders)


_ROUND = onnx.parser.parse_function(
    """
    <domain: "headwise", opset_import: ["" : 23]>
    RoundBlocks (x, shared) => (y) {
        numbers = Cast <to = 1> (x)
        factor = Cast <to = 1> (shared)
        split = Constant <value = int64[2] {-1, 16}> ()
        blocks = Reshape (numbers, split)
        sizes = Abs (blocks)
        last = Constant <value = int64[1] {-1}> ()
        largest = ReduceMax <keepdims = 1> (sizes, last)
        six = Constant <value = float {6.0}> ()
        unit = Mul (six, factor)
        wanted = Div (largest, unit)
        top = Constant <value = float {448.0}> ()
        inside = Min (wanted, top)
        coded = Cast <to = 17> (inside)
        decoded = Cast <to = 1> (coded)
        exact = Mul (decoded, factor)
        zero = Constant <value = float {0.0}> ()
        one = Constant <value = float {1.0}> ()
        vanished = Equal (exact, zero)
        divisor = Where (vanished, one, exact)
        steps = Div (blocks, divisor)
        minus_six = Neg (six)
        clipped = Clip (steps, minus_six, six)
        magnitudes = Abs (clipped)
        two = Constant <value = float {2.0}> ()
        four = Constant <value = float {4.0}> ()
        half = Constant <value = float {0.5}> ()
        below_two = Less (magnitudes, two)
        below_four = Less (magnitudes, four)
        coarse = Where (below_four, one, two)
        spacing = Where (below_two, half, coarse)
        counted = Div (clipped, spacing)
        whole = Round (counted)
        codes = Mul (whole, spacing)
        held = CastLike (exact, x)
        scales = Cast <to = 1> (held)
        rounded = Mul (codes, scales)
        shape = Shape (x)
        joined = Reshape (rounded, shape)
        y = CastLike (joined, x)
    }
    """
)
"""Codes are E2M1: multiples of 1/2 below 2, of 1 below 4, of 2 up to 6. A block whose scale vanishes becomes zeros."""
