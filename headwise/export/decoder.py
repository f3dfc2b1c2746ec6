"""Decoder -> ONNX with the cache as inputs and outputs: one graph reads a prompt (empty past) and continues it.

Shape letters: B batch, P tokens of the past, T tokens of a call, S all tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import Dim
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from headwise.calibration.tasks import Examples
from headwise.errors import ExportError
from headwise.export.graph import clean_up, save_graph, signature
from headwise.export.halves import check_halves
from headwise.export.onnx import Case, ExportInfo, Parity, compare, not_traceable, to_onnx
from headwise.export.ports import IDS, MASK, POSITIONS, axis_names, check_ports
from headwise.export.precision import ExportSpec
from headwise.export.stepping import Decoder, OrtDecoder, TorchDecoder
from headwise.export.tracing import caching, grouped_heads, quiet
from headwise.model.cache import CacheLayout, past_axis
from headwise.model.decoder import cache_slots, held, positions, prunes, why_no_cache
from headwise.model.finding import longest_sequence
from headwise.model.forward import to_torch
from headwise.model.latent_attention import LatentAttention
from headwise.model.latent_form import latent_form
from headwise.model.prompt_cache import PromptLayer
from headwise.model.prompt_tokens import single_tokens, takes_single
from headwise.model.view import ModelView
from headwise.model.window_cache import StreamingLayer
from headwise.tolerances import ONNX_PARITY

LOGITS = "logits"
DECODE = "decode.onnx"
"""The graph for calls of one token per row, beside that which reads prompts."""
_PAST, _NEW, _PAST_WINDOW = 4, 3, 5
"""Tokens that the graph is traced with: sizes of axes that vary must differ from each other, and from the batch's 2."""
_LONGEST_PROMPT = 128
"""Tokens of the prompts that a graph is checked with."""
_SINGLE = 5
"""How many tokens are read one by one when a graph is checked."""


def export_model(view: ModelView, examples: Examples, path: Path, spec: ExportSpec) -> ExportInfo:
    """Export a model as the recipe wants it: with its cache, see ``decoder_to_onnx``, or without, see ``to_onnx``."""
    batch = examples.example_batch()
    if caches(view, batch, spec.cache):
        return decoder_to_onnx(view, batch[IDS], path, opset=spec.opset)
    return to_onnx(view.module, batch, path, dynamic=examples.dynamic_axes(), opset=spec.opset)


def export_decode(view: ModelView, examples: Examples, prompts: Path, spec: ExportSpec) -> ExportInfo | None:
    """Export the graph for calls of one token per row, and check that it goes on where the other one has read.

    Its latent attention is absorbed: attention reads the latents of all tokens as they are, where the graph that reads
    prompts computes keys and values of all heads from them in every call. Layers that keep a share of every prompt
    choose nothing.

    Args:
        view: the model.
        examples: samples of the task.
        prompts: the graph that reads prompts; the new one lies beside it, as ``DECODE``.
        spec: the recipe's options.

    Returns:
        None where the recipe wants none, and where there is nothing to absorb and nothing that is chosen.

    Raises:
        ExportError: see ``decoder_to_onnx``.
    """
    ids = examples.example_batch().get(IDS)
    latents = [layer.module for layer in view.attention if isinstance(layer.module, LatentAttention)]
    differs = any(layer.absorbs for layer in latents) or any(map(prunes, view.layout.cache.layers))
    if spec.decode == "same" or not differs or ids is None or not caches(view, examples.example_batch(), spec.cache):
        return None
    path = prompts.with_name(DECODE)
    with latent_form("absorbed"), single_tokens():
        info = decoder_to_onnx(view, ids, path, opset=spec.opset)
    return replace(
        info, parity=(*info.parity, *check_decoder(view, prompts, _tokens(ids, _checked_length(view)), decode=path))
    )


def caches(view: ModelView, batch: Mapping[str, NDArray[Any]], wanted: Literal["auto"] | bool) -> bool:
    """Whether a model is to be exported with its cache.

    Args:
        view: the model.
        batch: what it is fed; token ids, with a mask or positions or without.
        wanted: ``export.cache`` of the recipe.

    Raises:
        ExportError: the recipe asks for a cache that the model does not have.
    """
    foreign = sorted(set(batch) - {IDS, MASK, POSITIONS})
    refusal = why_no_cache(view) or (f"it is fed {', '.join(foreign)} beside tokens" if foreign else "")
    if wanted is True and refusal:
        raise ExportError(
            f"export.cache is true, but {refusal}",
            expected="a causal language model whose layers cache keys and values",
            fix="set export.cache to auto or false",
        )
    found = bool(wanted) and not refusal
    if not found and any(map(prunes, view.layout.cache.layers)):
        raise ExportError(
            f"prune-tokens keeps a share of every prompt in a cache, but {refusal or 'export.cache is false'}",
            expected="a graph with a cache",
            fix="leave prune-tokens out" if refusal else "set export.cache to auto",
        )
    return found


def decoder_to_onnx(
    view: ModelView,
    ids: NDArray[Any],
    path: Path,
    *,
    opset: int = 23,
    tolerance: float = ONNX_PARITY,
) -> ExportInfo:
    """Export a decoder that caches, and check the graph against the module: prompts, single tokens, padding.

    The graph takes ``input_ids`` and ``position_ids`` (B, T), ``attention_mask`` (B, S) and the past of every layer. It
    returns ``logits`` (B, T, vocabulary) and the present: the past with the tokens of this call behind it.

    Args:
        view: a model that ``caches``, in eval mode, on the CPU, in fp32.
        ids: (B, T) token ids.
        path: the ONNX file; weights past the limit of protobuf go to a file beside it.
        opset: of the default domain; 23 is the first with ``Attention``.
        tolerance: largest absolute difference, relative to the largest output where that is above 1.

    Raises:
        ExportError: the exporter gave up, the graph's inputs and outputs are not those of the layout, or it disagrees
            with the module.
    """
    module: Any = view.module
    layout = view.layout.cache
    inputs = _behind_cached_tokens(view, ids)
    try:
        with quiet(), caching(module, True), grouped_heads(), _masks_of_tokens(view), torch.no_grad():
            program = OnnxExporter().export(module, inputs, config=_config(layout, opset)).program
    except Exception as error:  # the exporter raises anything, from TypeError to internal assertions
        raise not_traceable(module, error) from error
    _name_ports(program.graph, layout)
    names = axis_names(layout)
    dynamic = {name: tuple(axes) for name, axes in names.items()}
    clean_up(program, inputs=list(names), outputs=[LOGITS, *layout.present()], dynamic=dynamic, names=names)
    check_ports(program.graph, layout)
    save_graph(program, path)
    pruned, length = any(map(prunes, layout.layers)), _checked_length(view)
    return ExportInfo(
        inputs={str(value.name): signature(value) for value in program.graph.inputs},
        outputs={str(value.name): signature(value) for value in program.graph.outputs},
        opset=program.opset_imports[""],
        nodes=dict(sorted(Counter(node.op_type for node in program.graph).items())),
        # A graph for single tokens is checked together with the one that reads prompts.
        parity=() if pruned and takes_single() else check_decoder(view, path, _tokens(ids, length), tolerance),
    )


def check_decoder(
    view: ModelView,
    path: Path,
    ids: NDArray[Any],
    tolerance: float = ONNX_PARITY,
    *,
    decode: Path | None = None,
) -> tuple[Parity, ...]:
    """Compare a graph on ONNX Runtime with its module that reads all tokens at once, without a cache.

    Args:
        view: the model that was exported.
        path: the graph.
        decode: the graph that takes calls of one token, where there is one; then only these are compared.
        ids: (B, S) tokens; rows but the first are padded on the left, then on the right.
        tolerance: largest absolute difference, relative to the largest output where that is above 1.

    Raises:
        ExportError: logits of real tokens, or what is cached, differ by more.
    """
    if any(map(prunes, view.layout.cache.layers)):
        return check_halves(view, path, ids, tolerance, decode=decode)
    rows = len(ids)
    padding = np.minimum(np.arange(rows), ids.shape[1] - 1)[:, None]
    column = np.arange(ids.shape[1])[None]
    left, right = (column >= padding).astype(np.int64), (column < ids.shape[1] - padding).astype(np.int64)
    every, several = [ids.shape[1]], [_PAST, ids.shape[1] - _PAST]
    first = max(2, ids.shape[1] - _SINGLE)
    single = [first, *[1] * (ids.shape[1] - first)]
    cases = [
        ("prompt, padded on the left", ids, left, every),
        ("prompt, padded on the right", ids, right, every),
        ("in two parts", ids, left, several),
        ("token by token", ids, left, single),
        ("token by token, one row", ids[:1], left[:1], single),
    ]
    if decode is not None:
        cases = [(f"{label}, by two graphs", *case) for label, *case in cases[3:]]
    found = []
    with OrtDecoder(path, decode=decode) as graph:
        for label, tokens, mask, steps in cases:
            reference = TorchDecoder(view)
            expected = {LOGITS: _read(reference, tokens, mask, every), **reference.cached()}
            actual = {LOGITS: _read(graph, tokens, mask, steps), **graph.cached()}
            shape = f"{'x'.join(map(str, tokens.shape))} {label}"
            real = held(view.layout, mask)
            compared = [
                compare(Case(output=name, shape=shape), _real(array, known), _real(actual[name], known), tolerance)
                for name, array, known in ((name, array, real.get(name, mask)) for name, array in expected.items())
            ]
            # Of what is cached, the worst says enough.
            found += [compared[0], max(compared[1:], key=lambda parity: parity.max_abs)]
    return tuple(found)


def _read(decoder: Decoder, ids: NDArray[Any], mask: NDArray[Any], steps: Sequence[int]) -> NDArray[Any]:
    """(B, S, vocabulary) logits of all tokens, from calls with this many tokens each."""
    decoder.begin(len(ids))
    logits, start = [], 0
    for step in steps:
        end = start + step
        logits.append(decoder(ids[:, start:end], mask[:, :end], positions(mask[:, :end], step)))
        start = end
    return np.concatenate(logits, axis=1)


def _real(output: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """(tokens, ...) what an output, (B, S, ...) or (B, heads, S, width), says of tokens that are no padding."""
    tokens = np.moveaxis(output, -2, 1)
    return np.asarray(tokens[mask.astype(bool)]) if tokens.shape[:2] == mask.shape else output


def _tokens(ids: NDArray[Any], length: int) -> NDArray[np.int64]:
    """(2, length) tokens of the sample, repeated where its rows are shorter."""
    rows = ids[:2] if len(ids) > 1 else np.repeat(ids, 2, axis=0)
    return np.ascontiguousarray(rows[:, np.arange(length) % rows.shape[1]], dtype=np.int64)


def _checked_length(view: ModelView) -> int:
    """Tokens that show every way in which a graph is used: more than the caches of heads with a window hold."""
    tensors = [tensor for tensors in view.layout.cache.layers for tensor in tensors]
    length = max([_PAST + _NEW, *(tensor.longest + _NEW for tensor in tensors if tensor.longest is not None)])
    budgets = [tensor.budget for tensor in tensors if tensor.budget is not None]
    # Half of it is a prompt in which some of what is kept is chosen, and some of what is not.
    choices = [min(_LONGEST_PROMPT, int((b.first + b.last + _NEW) / b.keep)) for b in budgets]
    length = max([length, *(2 * tokens for tokens in choices)])
    return min(length, longest_sequence(view.module) or length)


def _behind_cached_tokens(view: ModelView, ids: NDArray[Any]) -> dict[str, Any]:
    """The inputs of a call behind ``_PAST`` cached tokens; the second row is padded on the left."""
    layout = view.layout.cache
    budgets = [tensors[0].budget for tensors in layout.layers if prunes(tensors)]
    # A size of 1 would be taken for a constant, also where it follows from another one.
    new = max([_NEW, *(int(2 / budget.keep) + 2 for budget in budgets if budget is not None)])
    ids = _tokens(ids, _PAST + new)
    mask = np.ones_like(ids)
    mask[1, 0] = 0
    decoder = TorchDecoder(view)
    _read(decoder, ids[:, :_PAST], mask[:, :_PAST], [_PAST])
    arrays = {IDS: ids[:, _PAST:], MASK: mask, POSITIONS: positions(mask, new)}
    longest = sorted({t.longest for tensors in layout.layers for t in tensors if t.longest is not None})
    shares = sorted({past_axis(tensors[0]) for tensors in layout.layers if prunes(tensors)})
    for layer, tensors in zip(decoder.cache.layers, layout.layers, strict=True):
        if isinstance(layer, StreamingLayer):
            lengths = [t.longest for t in tensors[::2] if t.longest is not None]
            layer.resize([_PAST_WINDOW + 4 * longest.index(tokens) for tokens in lengths])
        if isinstance(layer, PromptLayer):
            # Layers that keep the same share hold equally many.
            layer.resize(2 * new + _PAST_WINDOW + 4 * shares.index(past_axis(tensors[0])))
    return {**to_torch(arrays), "past_key_values": decoder.cache}


@contextmanager
def _masks_of_tokens(view: ModelView) -> Iterator[None]:
    """Give attention whole masks where every layer keeps a share, so that no cache says how many tokens there were."""

    def expand(
        _: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask, new = given[MASK], given[IDS].shape[1]
        total = mask.shape[1]
        query = torch.arange(new)[:, None] + (total - new)
        return args, {**given, MASK: ((torch.arange(total)[None] <= query) & mask.bool()[:, None])[:, None]}

    if not all(map(prunes, view.layout.cache.layers)):
        yield
        return
    hook = view.module.register_forward_pre_hook(expand, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _config(layout: CacheLayout, opset: int) -> OnnxConfig:
    names = axis_names(layout)
    axes = {name: dict.fromkeys(varying, Dim.AUTO) for name, varying in names.items()}
    shapes: dict[str, Any] = {name: axes[name] for name in (IDS, MASK, POSITIONS)}
    # A cache is traced as the list of its tensors.
    shapes["past_key_values"] = [axes[name] for name in layout.past()]
    return OnnxConfig(dynamic_shapes=shapes, opset_version=opset)


def _name_ports(graph: Any, layout: CacheLayout) -> None:
    """Give the tensors of the cache their names; the exporter's names are paths into transformers' cache."""
    slots = [
        f"past_key_values.layers.{index}.{slot}"
        for index, tensors in enumerate(layout.layers)
        for slot in cache_slots(tensors)
    ]
    for values, side, names in (
        (graph.inputs, "input", layout.past()),
        (graph.outputs, "output", layout.present()),
    ):
        ours = dict(zip(slots, names, strict=True))
        known = {prefix + slot: name for slot, name in ours.items() for prefix in ("", f"{side}.")}
        for value in values:
            value.name = known.get(str(value.name), value.name)
