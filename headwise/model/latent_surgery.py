"""Latents and borrowed keys and values, put into a model; part of surgery.

Shape letters: D model width, N query heads, K kv heads, H head_dim, r rank of the latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from headwise.model.access import attribute, hooked
from headwise.model.latent import LatentProjections, lend, read_from
from headwise.model.latent_attention import LatentAttention
from headwise.model.latent_edits import LatentKV, ShareLayers
from headwise.model.latent_swap import RotaryLatent, empty_swap, swap, swapped_twin
from headwise.model.layout import AttentionLayout
from headwise.model.lent_cache import lend_cache
from headwise.model.projections import Projections
from headwise.model.view import AttentionView, ModelView
from headwise.model.writing import separate, separated, write, written


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentWeights:
    """The numbers of a ``LatentKV`` edit, or of a ``ShareLayers`` edit that reads a latent.

    Attributes:
        projections: keys and values by way of the latent.
        output_bias: (D,) to add to the output bias; None where there is none.
    """

    projections: LatentProjections
    output_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LentHeads:
    """Keys and values that the owner gets before a ``ShareLayers`` edit lends them as they are.

    Attributes:
        key: (K, H, D); ``value`` likewise.
        key_bias: (K, H) or None; ``value_bias`` likewise.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None

    def put_into(self, old: Projections) -> Projections:
        """The layer's weights with these keys and values."""
        return replace(old, key=self.key, value=self.value, key_bias=self.key_bias, value_bias=self.value_bias)


def affine(view: AttentionView) -> bool:
    """Whether approximate keys and values can be right on average: a constant has a place, or none is seen.

    Queries do not see a constant in keys, which adds the same to all their scores, unless keys are rotated or
    normalised or scores capped. A constant in values is one in the output.
    """
    old = view.read()
    keys = unseen_in_keys(view) or old.key_bias is not None
    return keys and (old.output_bias is not None or old.value_bias is not None)


def unseen_in_keys(view: AttentionView) -> bool:
    """Whether queries cannot see a constant that is added to all keys."""
    family = view.family
    return not (family.rotary or family.qk_norm or family.soft_cap)


def latent_biases(view: AttentionView) -> tuple[bool, bool]:
    """Whether keys, and values, keep a bias behind a latent; otherwise it is dropped, or part of the output bias."""
    old = view.read()
    return (
        old.key_bias is not None and not unseen_in_keys(view),
        old.value_bias is not None and old.output_bias is None,
    )


def latent_kv(view: AttentionView, layout: AttentionLayout, weights: LatentWeights | RotaryLatent) -> None:
    """Put latent projections in the place of those of keys and values, or latent attention in that of the module."""
    if isinstance(weights, RotaryLatent):
        swap(view, layout, weights)
        return
    write(view, _with_latent(view.read(), weights), layout)


def share_layers(model: ModelView, edit: ShareLayers, payload: LatentWeights | RotaryLatent | LentHeads | None) -> None:
    """Let a layer read its owner's latent, or its keys and values."""
    view, owner = model.attention[edit.layer], model.attention[edit.owner]
    layout = edit.apply(view.layout)
    if isinstance(payload, LatentWeights | RotaryLatent):
        latent_kv(view, layout, payload)
    elif isinstance(payload, LentHeads):
        write(owner, payload.put_into(owner.read()), owner.layout)
    connect(view, owner, layout)


def connect(view: AttentionView, owner: AttentionView, layout: AttentionLayout) -> None:
    """Let a layer read what its owner leaves; its own weights are there already."""
    if isinstance(owner.module, LatentAttention) and isinstance(view.module, LatentAttention):
        owner.module.lend_to(view.module)
        return
    if layout.latent:
        read_from(owner.module, view.module, (view.family.key, view.family.value))
        return
    if view.caches:
        separate(view)
    old, paths = view.read(), (view.family.key, view.family.value)
    if view.caches:
        lend_cache(owner.module, view.module, paths)
    else:
        lend(owner.module, paths, view.module)
    write(view, old, layout)


def _with_latent(old: Projections, weights: LatentWeights) -> Projections:
    return replace(old, latent=weights.projections, output_bias=_bias(old, weights))


def _bias(old: Projections, weights: LatentWeights) -> torch.Tensor | None:
    if weights.output_bias is None:
        return old.output_bias
    assert old.output_bias is not None, "a constant is only folded where there is an output bias"
    return old.output_bias.double() + weights.output_bias


def reshape_compressed(model: ModelView, view: AttentionView, layout: AttentionLayout) -> None:
    """Give a layer with plain projections the shapes of a compressed one, with zeros in them."""
    if layout.unrotated or layout.rotary:
        empty_swap(view, layout)
    elif layout.latent:
        old = view.read()
        write(view, replace(old, latent=_empty(view, layout, old.key.shape[2])), layout)
    if layout.owner is not None:
        connect(view, model.attention[layout.owner], layout)


def _empty(view: AttentionView, layout: AttentionLayout, width: int) -> LatentProjections:
    """Zeros in the shapes of latent projections of inputs of this width."""
    zeros = view.read().output.new_zeros
    heads, H, r = len(layout.kv), layout.head_dim, layout.latent
    key_bias, value_bias = latent_biases(view)
    owns = layout.owner is None
    return LatentProjections(
        owns=owns,
        down=zeros(r, width) if owns and r != width else None,
        key=zeros(heads, H, r),
        value=zeros(heads, H, r),
        key_bias=zeros(heads, H) if key_bias else None,
        value_bias=zeros(heads, H) if value_bias else None,
    )


@contextmanager
def compressed_twins(model: ModelView, edits: Sequence[Any], payloads: Mapping[int, Any]) -> Iterator[None]:
    """The exact twins of all ``LatentKV`` and ``ShareLayers`` edits of a plan."""
    down = {e.layer: payloads[i].projections.down for i, e in enumerate(edits) if isinstance(e, LatentKV)}
    with ExitStack() as stack:
        for position, edit in enumerate(edits):
            if isinstance(edit, LatentKV):
                view, payload = model.attention[edit.layer], payloads[position]
                if isinstance(payload, RotaryLatent):
                    stack.enter_context(swapped_twin(view, edit.apply(view.layout), payload, down[edit.layer]))
                else:
                    stack.enter_context(latent_twin(view, payload, down[edit.layer]))
            if isinstance(edit, ShareLayers):
                stack.enter_context(shared_twin(model, edit, payloads.get(position), down.get(edit.owner)))
        yield


@contextmanager
def latent_twin(view: AttentionView, weights: LatentWeights, down: torch.Tensor | None) -> Iterator[None]:
    """The products of the latent projections as dense weights of the original layer.

    Args:
        view: the layer.
        weights: the numbers of its edit.
        down: (r, D) that computes the latent; None where it is the input.
    """
    old = view.read()
    key, value = weights.projections.dense(down)
    found = weights.projections
    dense = replace(
        old,
        key=key,
        value=value,
        key_bias=_or_zeros(found.key_bias, old.key_bias),
        value_bias=_or_zeros(found.value_bias, old.value_bias),
        output_bias=_bias(old, weights),
    )
    with written(view, dense, view.layout):
        yield


def _or_zeros(bias: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    return torch.zeros_like(like) if bias is None and like is not None else bias


@contextmanager
def shared_twin(
    model: ModelView,
    edit: ShareLayers,
    payload: LatentWeights | RotaryLatent | LentHeads | None,
    down: torch.Tensor | None,
) -> Iterator[None]:
    """The unedited layer, given its owner's input for keys and values, and weights of its own for that input.

    Args:
        model: the model.
        edit: the edit.
        payload: its numbers.
        down: (r, D) of the owner's latent, see ``latent_twin``.
    """
    view, owner = model.attention[edit.layer], model.attention[edit.owner]
    with ExitStack() as stack:
        if isinstance(payload, RotaryLatent):
            stack.enter_context(swapped_twin(view, edit.apply(view.layout), payload, down))
        elif isinstance(payload, LatentWeights):
            stack.enter_context(latent_twin(view, payload, down))
        else:
            if view.caches:
                stack.enter_context(separated(view))
            lent = owner.read()
            if isinstance(payload, LentHeads):
                lent = payload.put_into(lent)
                stack.enter_context(written(owner, lent, owner.layout))
            heads = {name: getattr(lent, name) for name in ("key", "value", "key_bias", "value_bias")}
            stack.enter_context(written(view, replace(view.read(), **heads), view.layout))
        stack.enter_context(_fed(view, owner))
        yield


@contextmanager
def _fed(view: AttentionView, owner: AttentionView) -> Iterator[None]:
    """Keys and values of a layer projected from what those of another one were projected from."""
    seen: dict[str, torch.Tensor] = {}

    def other(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (seen["input"], *args[1:])

    with ExitStack() as stack:
        stack.enter_context(owner.watch_input(lambda inputs: seen.__setitem__("input", inputs)))
        # Behind latent attention's first projection there is no input of the layer.
        latent = isinstance(view.module, LatentAttention)
        for path in (view.family.key,) if latent else (view.family.key, view.family.value):
            stack.enter_context(hooked(attribute(view.module, path).register_forward_pre_hook(other)))
        yield
