"""Keys and values in 8 bits: one scale per tensor, which is what TensorRT takes, and one per channel in effect.

The scale of a channel of the keys goes into the projections of keys and queries, that of the values into the
projections of values and outputs. Scores and outputs stay what they were; the tensors between them get channels of
one size, so that one scale suits all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from headwise.calibration.formats import GRIDS
from headwise.errors import ExportError
from headwise.export.absorb import Channels, Edits, behind_past, heads_first
from headwise.export.edits import insert_before
from headwise.export.graph import module_path
from headwise.export.kv_cache import find_held, fold_latent, quantize_held
from headwise.export.matrices import products
from headwise.model.cache import read_port
from headwise.model.quantization import Format

_KEYS, _VALUES = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """Keys or values as an attention reads them, or whatever else a decoder caches.

    Attributes:
        name: of the (B, N, T, H) tensor; what is cached has that of an output.
        tap: of the tensor that has all tokens of a call. Of heads with a window, fewer go on being cached.
        heads: N.
        width: H.
        pairs: channels of a head that rotary positions mix, as (first, second).
        label: path of the attention layer, and ``key``, ``value`` or how the cache calls it.
    """

    name: str
    tap: str
    heads: int
    width: int
    pairs: tuple[tuple[int, int], ...] = ()
    label: str = ""


def find_cached(model: onnx.ModelProto, scopes: Sequence[str] = ()) -> tuple[Cached, ...]:
    """What a decoder's graph caches, or the keys and values of every attention, in the order of the graph.

    Args:
        model: an fp32 graph with the shapes that the exporter wrote.
        scopes: module paths of the attention layers, in their order.

    Raises:
        ExportError: a layer has no Attention operator on four axes, or its cache is filled in a way not known.
    """
    graph = Channels(model.graph)
    held = find_held(graph)
    return _in_cache(graph, held, scopes) if held else _behind_projections(graph, scopes)


def _in_cache(graph: Channels, held: Mapping[str, NodeProto], scopes: Sequence[str]) -> tuple[Cached, ...]:
    found = []
    for name, join in held.items():
        layer, kind = read_port(name)
        heads, width = graph.dims[name][1], graph.dims[name][3]
        scope = scopes[layer] if scopes else str(layer)
        pairs = _pairs(graph, name, width)
        about = {"heads": heads, "width": width, "pairs": pairs, "label": f"{scope}.{kind}"}
        found.append(Cached(name=name, tap=join.output[0], **about))
    return tuple(found)


def _behind_projections(graph: Channels, scopes: Sequence[str]) -> tuple[Cached, ...]:
    found: dict[str, Cached] = {}
    missing = list(scopes) or [""]
    for node in _attention(graph.graph):
        path = module_path(node)
        scope = next((scope for scope in scopes if f"{path}.".startswith(f"{scope}.")), path)
        for index, kind in ((_KEYS, "key"), (_VALUES, "value")):
            name = node.input[index]
            dims = graph.dims.get(name, [])
            if len(dims) == 4 and dims[1] and dims[3]:
                pairs = _pairs(graph, name, dims[3]) if index == _KEYS else ()
                about = {"heads": dims[1], "width": dims[3], "pairs": pairs, "label": f"{scope}.{kind}"}
                found.setdefault(name, Cached(name=name, tap=name, **about))
                missing = [other for other in missing if other and other != scope]
    if missing:
        raise ExportError(
            f"the keys and values of {missing[0] or 'the attention'} cannot be told in the graph",
            expected="an Attention node in every layer, which exports of opset 23 and later have",
            fix="leave quantize.kv out, or set export.opset to 23 and export.clusters to fused",
        )
    return tuple(found.values())


def fold_channels(model: onnx.ModelProto, scales: Mapping[str, NDArray[np.float64]]) -> frozenset[str]:
    """Divide channels of keys and values by ``2 ** scale`` where the graph can make up for it, in place.

    Args:
        model: an fp32 graph with the shapes that the exporter wrote.
        scales: tensor -> (N * H,) exponents.

    Returns:
        The tensors whose channels were scaled.
    """
    graph = Channels(model.graph)
    folded = set()
    for node in _attention(model.graph):
        for index, make_up in ((_KEYS, _queries), (_VALUES, _outputs)):
            name = node.input[index]
            if name not in scales:
                continue
            taken = graph.heads(name, node, -scales[name])
            made_up = make_up(graph, node, scales[name])
            if taken is not None and made_up is not None:
                graph.apply([*taken, *made_up])
                folded.add(name)
    left = [name for name in find_held(graph) if name in scales and name not in folded]
    return frozenset(folded | {name for name in left if fold_latent(graph, name, scales[name])})


def quantize_cached(model: onnx.ModelProto, scales: Mapping[str, float], formats: Mapping[str, Format]) -> None:
    """Make codes of what attention reads, in place: in a cache, or by a pair of QuantizeLinear and DequantizeLinear.

    Args:
        model: an fp32 graph.
        scales: tensor -> its one scale.
        formats: tensor -> format of its codes.
    """
    held = {name: node for name, node in find_held(Channels(model.graph)).items() if name in scales}
    quantize_held(model, held, scales, formats)
    _quantize_apart(model, {name: scale for name, scale in scales.items() if name not in held}, formats)


def _quantize_apart(model: onnx.ModelProto, scales: Mapping[str, float], formats: Mapping[str, Format]) -> None:
    graph = model.graph
    before: dict[str, list[NodeProto]] = {}
    readers = _attention(graph)
    for name, scale in scales.items():
        stem = f"{name}_kv"
        constants = {f"{stem}_scale": np.float32(scale), f"{stem}_zero": np.zeros((), GRIDS[formats[name]].dtype)}
        graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items())
        pair = [
            helper.make_node("QuantizeLinear", [name, *constants], [f"{stem}_codes"], name=f"{stem}_q"),
            helper.make_node("DequantizeLinear", [f"{stem}_codes", *constants], [f"{stem}_values"], name=f"{stem}_dq"),
        ]
        members = [node for node in readers if name in node.input[_KEYS : _VALUES + 1]]
        before.setdefault(members[0].output[0], []).extend(pair)
        for node in members:
            for index in (_KEYS, _VALUES):
                if node.input[index] == name:
                    node.input[index] = f"{stem}_values"
    insert_before(graph, before)


def _attention(graph: onnx.GraphProto) -> Sequence[NodeProto]:
    return [node for node in graph.node if node.op_type == "Attention" and len(node.input) > _VALUES]


def _pairs(graph: Channels, name: str, width: int) -> tuple[tuple[int, int], ...]:
    """Channels that rotary positions mix, where a RotaryEmbedding makes the tensor."""
    maker = graph.makers.get(name)
    if maker is not None and behind_past(maker):
        maker = graph.makers.get(maker.input[1])
    if maker is None or maker.op_type != "RotaryEmbedding":
        return ()
    attributes = {item.name: item.i for item in maker.attribute}
    turned = attributes.get("rotary_embedding_dim") or width
    half = turned // 2
    if attributes.get("interleaved"):
        return tuple((2 * index, 2 * index + 1) for index in range(half))
    return tuple((index, index + half) for index in range(half))


def _queries(graph: Channels, attention: NodeProto, exponents: NDArray[np.float64]) -> Edits | None:
    """Queries get the inverse of what keys got; all readers of a kv head the same."""
    spread = _for_readers(graph, attention, exponents)
    return None if spread is None else graph.heads(attention.input[0], attention, spread)


def _outputs(graph: Channels, attention: NodeProto, exponents: NDArray[np.float64]) -> Edits | None:
    """The matrices behind an attention: Transpose, Reshape, and constant products, with a Where between at most."""
    spread = _for_readers(graph, attention, exponents)
    node, tensor = attention, attention.output[0]
    for kind in ("Where", "Transpose", "Reshape"):
        readers = [reader for reader in graph.readers.get(tensor, []) if reader.op_type != "Shape"]
        if len(readers) != 1 or tensor in graph.outputs:
            return None
        if readers[0].op_type == kind:
            node, tensor = readers[0], readers[0].output[0]
            if kind == "Where" and not graph.zero(node.input[1]):
                return None
            if kind == "Transpose" and not heads_first(node):
                return None
        elif kind != "Where":
            return None
    members = {product.node.output[0]: product for product in products(graph.graph)}
    readers = [reader for reader in graph.readers.get(tensor, []) if reader.op_type != "Shape"]
    if spread is None or tensor in graph.outputs or graph.width(tensor) != len(spread):
        return None
    if not all(reader.output[0] in members and reader.input[0] == tensor for reader in readers):
        return None
    found = [members[reader.output[0]] for reader in readers]
    return [(product.node, 1, spread if product.transposed else spread[:, None]) for product in found]


def _for_readers(graph: Channels, attention: NodeProto, exponents: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(heads * H,) from (kv heads * H,): query heads read kv heads in groups."""
    query = graph.dims.get(attention.input[0], [])
    if len(query) != 4 or not query[1] or not query[3] or len(exponents) % query[3]:
        return None
    groups = exponents.reshape(-1, query[3])
    if query[1] % len(groups):
        return None
    return np.repeat(groups, query[1] // len(groups), axis=0).reshape(-1)
