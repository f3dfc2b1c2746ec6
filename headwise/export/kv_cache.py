"""Caches of decoders in 8 bits: inputs and outputs of the graph are codes, and what reads the cache gets numbers.

New tokens are turned into codes once, by constant scales, and joined to the codes of earlier calls. TensorRT takes this
form; its nodes that update a cache in place take no codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from headwise.calibration.formats import GRIDS
from headwise.errors import ExportError
from headwise.export.absorb import Channels, Edits, behind_past
from headwise.export.edits import insert_before
from headwise.export.matrices import products
from headwise.model.cache import is_present
from headwise.model.quantization import Format


def find_held(graph: Channels) -> dict[str, NodeProto]:
    """What a decoder's graph returns of its cache -> the node that joins past and new tokens; empty without a cache.

    Raises:
        ExportError: a cache is filled in another way.
    """
    found = {}
    for name in (value.name for value in graph.graph.output if is_present(value.name)):
        maker = graph.makers.get(name)
        if maker is None or not behind_past(maker) or len(graph.dims[name]) != 4:
            raise ExportError(
                f"{name} does not come from a Concat of the past and the new tokens, on four axes",
                expected="a cache as headwise exports it",
                fix="leave quantize.kv out, or set export.cache to false to see what it would cost",
            )
        found[name] = maker
    return found


def fold_latent(graph: Channels, name: str, exponents: NDArray[np.float64]) -> bool:
    """Divide the channels of a cached latent by powers of two, and multiply the rows of the matrices that read it.

    Args:
        graph: changed in place.
        name: of the (B, 1, S, rank) latents.
        exponents: (rank,).

    Returns:
        Whether it was done.
    """
    reader, maker = graph.readers.get(name, []), graph.makers[name]
    single = graph.makers.get(maker.input[1])
    if len(reader) != 1 or reader[0].op_type != "Gather" or reader[0].input[0] != name:
        return False
    if single is None or single.op_type != "Unsqueeze" or not graph.only_reader(maker.input[1], maker):
        return False
    made = graph.absorb(single.input[0], -exponents, [single.output[0]])
    read = _rows(graph, reader[0].output[0], exponents)
    if made is None or read is None:
        return False
    graph.apply([*made, *read])
    return True


def _rows(graph: Channels, tensor: str, exponents: NDArray[np.float64]) -> Edits | None:
    """The rows of all matrices that multiply a tensor; None where something else reads it."""
    members = {product.node.output[0]: product for product in products(graph.graph)}
    readers = [node for node in graph.readers.get(tensor, []) if node.op_type != "Shape"]
    if not all(node.output[0] in members and node.input[0] == tensor for node in readers):
        return None
    found = [members[node.output[0]] for node in readers]
    return [(product.node, 1, exponents if product.transposed else exponents[:, None]) for product in found]


def quantize_held(
    model: onnx.ModelProto, joined: Mapping[str, NodeProto], scales: Mapping[str, float], formats: Mapping[str, Format]
) -> None:
    """Round what the graph caches to codes, in place. A cache of int8 holds codes from here on, see ``code_caches``.

    Args:
        model: an fp32 graph with a cache.
        joined: see ``find_held``; those that shall be rounded.
        scales: of each of them.
        formats: likewise.
    """
    graph = model.graph
    before: dict[str, list[NodeProto]] = {}
    for held, join in joined.items():
        stem, zero = f"{held}_kv", np.zeros((), GRIDS[formats[held]].dtype)
        constants = {f"{stem}_scale": np.asarray(np.float32(scales[held])), f"{stem}_zero": zero}
        graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
        new, codes, rounded = join.input[1], f"{stem}_codes", f"{stem}_new"
        before[held] = [
            helper.make_node("QuantizeLinear", [new, *constants], [codes], name=f"{stem}_q"),
            helper.make_node("DequantizeLinear", [codes, *constants], [rounded], name=f"{stem}_dq"),
        ]
        join.input[1] = rounded
    insert_before(graph, before)
    code_caches(graph, "int8")


def code_caches(graph: onnx.GraphProto, number: Format) -> None:
    """Let the graph take and return codes where it joins rounded numbers of this format, in place.

    ONNX joins no fp8 tensors and TensorRT does: a graph with a cache of fp8 is no valid ONNX any more.
    """
    ports = {value.name: value.type.tensor_type for value in [*graph.input, *graph.output, *graph.value_info]}
    makers = {node.output[0]: node for node in graph.node}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    wanted = helper.np_dtype_to_tensor_dtype(GRIDS[number].dtype)
    behind: dict[str, NodeProto] = {}
    for held in (value.name for value in graph.output if is_present(value.name)):
        join = makers[held]
        decode = makers.get(join.input[1])
        if decode is None or decode.op_type != "DequantizeLinear" or kinds[decode.input[2]] != wanted:
            continue
        join.input[1], decode.input[0], decode.output[0] = decode.input[0], held, f"{held}_kv_values"
        for name in (join.input[0], held):
            ports[name].elem_type = wanted
        behind[held] = decode
    nodes = [node for node in graph.node if not any(node is decode for decode in behind.values())]
    for node in nodes:
        if node.op_type != "Shape":
            node.input[:] = [f"{name}_kv_values" if name in behind else name for name in node.input]
    del graph.node[:]
    graph.node.extend(other for node in nodes for other in (node, *filter(None, [behind.get(node.output[0])])))


def decode_caches(graph: onnx.GraphProto) -> bool:
    """Undo ``code_caches`` for fp8: join numbers, which every runtime can. Whether there was something to undo."""
    ports = {value.name: value.type.tensor_type for value in [*graph.input, *graph.output, *graph.value_info]}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    decoders = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    before: dict[str, list[NodeProto]] = {}
    names: dict[str, str] = {}
    for held in (value.name for value in graph.output if is_present(value.name)):
        if ports[held].elem_type != TensorProto.FLOAT8E4M3FN:
            continue
        join, decode = makers[held], decoders[held]
        past, codes = join.input
        graph.node.remove(decode)
        names[decode.output[0]] = held
        decode.input[0], decode.output[0] = codes, f"{held}_kv_new"
        join.input[1] = f"{held}_kv_new"
        before[held] = [decode]
        for name in (past, held):
            ports[name].elem_type = kinds[decode.input[1]]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    insert_before(graph, before)
    return bool(before)
