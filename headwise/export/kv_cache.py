"""Caches of decoders in 8 bits: inputs and outputs of the graph are codes, and what reads the cache gets numbers.

New tokens are turned into codes once, by constant scales, and joined to the codes of earlier calls. TensorRT takes this
form; its nodes that update a cache in place take no codes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from headwise.calibration.formats import GRIDS
from headwise.errors import ExportError
from headwise.export.absorb import Channels, Edits, behind_past
from headwise.export.absorbed import find_absorbed
from headwise.export.edits import insert_before
from headwise.export.matrices import products
from headwise.model.cache import is_present, prunes_prompts
from headwise.model.quantization import Format

_MOVES = frozenset({"Reshape", "Gather"})
"""What chooses the tokens that heads with a window go on caching."""


def find_held(graph: Channels) -> dict[str, NodeProto]:
    """What a decoder's graph returns of its cache -> the node that joins past and new tokens; empty without a cache.

    Raises:
        ExportError: a cache is filled in another way.
    """
    found = {}
    if prunes_prompts([value.name for value in graph.graph.input]):
        raise ExportError(
            "a cache that keeps a share of every prompt has no codes",
            expected="a cache of all tokens, or of windows",
            fix="leave out quantize.kv or prune-tokens",
        )
    for name in (value.name for value in graph.graph.output if is_present(value.name)):
        maker = graph.makers.get(name)
        join = None if maker is None else _kept(graph.makers, name)[0]
        if join is None or not behind_past(join) or len(graph.dims[name]) != 4:
            raise ExportError(
                f"{name} does not come from a Concat of the past and the new tokens, on four axes",
                expected="a cache as headwise exports it",
                fix="leave quantize.kv out, or set export.cache to false to see what it would cost",
            )
        found[name] = join
    return found


def _kept(makers: Mapping[str, NodeProto], name: str) -> tuple[NodeProto, list[NodeProto]]:
    """What joins past and new tokens of a cached tensor, and the nodes that choose which of them go on being cached.

    Heads with a window keep some tokens only; what does not join is left to the caller.
    """
    node, moving = makers[name], []
    while node.op_type in _MOVES and node.input[0] in makers:
        moving.append(node)
        node = makers[node.input[0]]
    return node, moving


def fold_latent(graph: Channels, name: str, exponents: NDArray[np.float64]) -> bool:
    """Divide the channels of a cached latent by powers of two, and multiply the rows of the matrices that read it.

    Where attention reads the latents as they are, these are the up-projections that it has absorbed.

    Args:
        graph: changed in place.
        name: of the (B, 1, S, rank) latents.
        exponents: (rank,).

    Returns:
        Whether it was done.
    """
    maker = graph.makers[name]
    single = graph.makers.get(maker.input[1])
    if single is None or single.op_type != "Unsqueeze" or not graph.only_reader(maker.input[1], maker):
        return False
    made = graph.absorb(single.input[0], -exponents, [single.output[0]])
    readers = [node for node in graph.readers.get(name, []) if node.op_type != "Shape"]
    if len(readers) == 1 and readers[0].op_type == "Gather" and readers[0].input[0] == name:
        read = _rows(graph, readers[0].output[0], exponents)
    else:
        read = _absorbed_rows(graph, name, readers, exponents)
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


def _absorbed_rows(
    graph: Channels, name: str, readers: Sequence[NodeProto], exponents: NDArray[np.float64]
) -> Edits | None:
    """The same of up-projections; None where something else than attention on latents reads the tensor."""
    members = [entry for entry in find_absorbed(graph.graph) if entry.latent == name]
    joined = [node.output[0] for node in readers if node.op_type == "Concat"]
    reading = [node for tensor in (name, *joined) for node in graph.readers[tensor] if node.output[0] not in joined]
    attending = {node.output[0] for node in reading if node.op_type == "Attention"}
    if any(node.op_type not in ("Attention", "Shape") for node in reading) or not attending:
        return None
    if len(attending) != sum(not entry.keys for entry in members):
        return None
    return [(entry.node, 1, exponents) for entry in members]


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
        before[join.output[0]] = [
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
    ports = _types(graph)
    makers = {node.output[0]: node for node in graph.node}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    wanted = helper.np_dtype_to_tensor_dtype(GRIDS[number].dtype)
    numbers: dict[str, str] = {}
    behind: dict[str, NodeProto] = {}
    for held in (value.name for value in graph.output if is_present(value.name)):
        join, moving = _kept(makers, held)
        decode = makers.get(join.input[1])
        if decode is None or decode.op_type != "DequantizeLinear" or kinds[decode.input[2]] != wanted:
            continue
        joined = join.output[0]
        join.input[1], decode.input[0], decode.output[0] = decode.input[0], joined, f"{held}_kv_values"
        numbers[joined], behind[joined] = decode.output[0], decode
        for name in {join.input[0], joined, held} & set(ports):
            ports[name].elem_type = wanted
        if moving:
            # TensorRT gathers no fp8; numbers become the codes again that they came from.
            moving[0].output[0] = f"{held}_kept"
            scale = decode.input[1:]
            again = helper.make_node("QuantizeLinear", [f"{held}_kept", *scale], [held], name=f"{held}_kept_q")
            behind[again.input[0]] = again
    decoded = {node.output[0] for node in behind.values()}
    nodes = [node for node in graph.node if node.output[0] not in decoded]
    for node in nodes:
        if node.op_type != "Shape":
            node.input[:] = [numbers.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(other for node in nodes for other in (node, *filter(None, [behind.get(node.output[0])])))


def keep_apart(graph: onnx.GraphProto, names: Collection[str], dtype: np.dtype[Any]) -> None:
    """Put a multiplication by ones between cached latents and weights that are quantized without their input, in place.

    TensorRT would multiply the codes of both with each other, has no such product for most pairs of formats, and then
    refuses the graph or decodes the weights while it builds. One constant would be left out again, a vector is not.

    Args:
        graph: with codes in its cache.
        names: nodes that multiply with such weights.
        dtype: of the graph.
    """
    makers = {name: node for node in graph.node for name in node.output}
    widths = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in graph.output}
    before: dict[str, list[NodeProto]] = {}
    apart: dict[str, str] = {}
    for node in graph.node:
        chosen = makers.get(node.input[0]) if node.name in names else None
        decode = makers.get(chosen.input[0]) if chosen is not None and chosen.op_type == "Gather" else None
        if decode is None or decode.op_type != "DequantizeLinear" or not is_present(decode.input[0]):
            continue
        latent = node.input[0]
        if latent not in apart:
            ones = numpy_helper.from_array(np.ones(widths[decode.input[0]], dtype), f"{latent}_ones")
            graph.initializer.append(ones)
            apart[latent] = f"{latent}_apart"
            multiply = helper.make_node("Mul", [latent, ones.name], [apart[latent]], name=apart[latent])
            before[node.output[0]] = [multiply]
        node.input[0] = apart[latent]
    insert_before(graph, before)


def decode_caches(graph: onnx.GraphProto) -> bool:
    """Undo ``code_caches`` for fp8: join numbers, which every runtime can. Whether there was something to undo."""
    ports = _types(graph)
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    decoders = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    before: dict[str, list[NodeProto]] = {}
    names: dict[str, str] = {}
    for held in (value.name for value in graph.output if is_present(value.name)):
        if ports[held].elem_type != TensorProto.FLOAT8E4M3FN:
            continue
        again = makers[held] if makers[held].op_type == "QuantizeLinear" else None
        last, moving = _kept(makers, held if again is None else again.input[0])
        join = makers[last.input[0]] if last.op_type == "DequantizeLinear" else last
        joined, (past, codes) = join.output[0], join.input
        decode = decoders[joined]
        graph.node.remove(decode)
        if again is not None:
            graph.node.remove(again)
            moving[0].output[0] = held
        names[decode.output[0]] = joined
        decode.input[0], decode.output[0] = codes, f"{held}_kv_new"
        join.input[1] = f"{held}_kv_new"
        before[joined] = [decode]
        for name in {past, joined, held} & set(ports):
            ports[name].elem_type = kinds[decode.input[1]]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    insert_before(graph, before)
    return bool(before)


def _types(graph: onnx.GraphProto) -> dict[str, Any]:
    return {value.name: value.type.tensor_type for value in [*graph.input, *graph.output, *graph.value_info]}
