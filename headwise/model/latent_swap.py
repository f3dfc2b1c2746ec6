"""``LatentAttention`` put in the place of a decoder's attention modules; part of surgery.

Shape letters: D model width, N query heads, K kv heads, H head_dim, r, P, R and M as in ``LatentAttention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from headwise.model.access import assign
from headwise.model.attend import bind
from headwise.model.latent import LatentProjections
from headwise.model.latent_attention import LatentAttention, LatentAttentionWeights
from headwise.model.layout import AttentionLayout
from headwise.model.view import AttentionView


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryLatent:
    """The numbers of a ``LatentKV`` or ``ShareLayers`` edit of a layer that has a kv cache.

    Attributes:
        projections: from the input to the latent, and from there to keys (K, P, r) and values (K, H, r).
        rotary: (M, R, D) rotary keys; ``rotary_bias`` (M, R), or None where keys have no bias.
        frequencies: (M, R / 2).
        query_maps: (K, P + R, H) from the old queries of the readers of a kv head to the new ones.
        angles: (F,) where positions turn the keys that come from the latent; None where they do not.
    """

    projections: LatentProjections
    rotary: torch.Tensor
    rotary_bias: torch.Tensor | None
    frequencies: torch.Tensor
    query_maps: torch.Tensor
    angles: torch.Tensor | None = None


def swap(view: AttentionView, layout: AttentionLayout, payload: RotaryLatent) -> None:
    """Put latent attention in the place of a layer's module."""
    old = view.read()
    like = old.output
    maps = payload.query_maps.double().repeat_interleave(view.layout.group, dim=0)
    bias = old.query_bias
    found = payload.projections

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(like)

    def given(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(like)

    weights = LatentAttentionWeights(
        query=given(maps @ old.query.double()),
        query_bias=None if bias is None else given((maps @ bias.double()[..., None])[..., 0]),
        latent=replace(
            found,
            down=cast(found.down),
            key=given(found.key),
            value=given(found.value),
            key_bias=cast(found.key_bias),
            value_bias=cast(found.value_bias),
        ),
        rotary=given(payload.rotary),
        rotary_bias=cast(payload.rotary_bias),
        frequencies=payload.frequencies,
        angles=payload.angles,
    )
    trainable = next(view.module.parameters()).requires_grad
    module = LatentAttention(view.module, (old.output.flatten(1), old.output_bias), weights)
    assign(view.block, view.family.attention, module.requires_grad_(trainable))
    view.module, view.family, view.layout = module, view.family.with_latent(), layout
    bind(module, layout)


@contextmanager
def swapped_twin(
    view: AttentionView, layout: AttentionLayout, payload: RotaryLatent, down: torch.Tensor | None
) -> Iterator[None]:
    """Latent attention whose latent is the layer's input: the projections by way of the latent, multiplied out.

    Args:
        view: the layer.
        layout: where its edit lands.
        payload: the numbers of the edit.
        down: (r, D) that computes the latent, in this layer or in its owner; None where it is the input.
    """
    module, family, before = view.module, view.family, view.layout
    key, value = payload.projections.dense(down)
    dense = replace(payload.projections, owns=True, down=None, key=key, value=value)
    swap(view, replace(layout, latent=key.shape[2], owner=None), replace(payload, projections=dense))
    try:
        yield
    finally:
        assign(view.block, family.attention, module)
        view.module, view.family, view.layout = module, family, before


def empty_swap(view: AttentionView, layout: AttentionLayout) -> None:
    """Latent attention with zeros in it, in the shapes that a layout says."""
    old = view.read()
    zeros = old.output.new_zeros
    heads, H, width = len(layout.kv), layout.head_dim, old.key.shape[2]
    M, r, P = layout.rotary_heads, layout.latent, layout.unrotated
    R = layout.rotary // M
    owns, turned = layout.owner is None, 0 if layout.rotary else view.rotated
    projections = LatentProjections(
        owns=owns,
        down=zeros(r, width) if owns and r != width else None,
        key=zeros(heads, P, r),
        value=zeros(heads, H, r),
        # Queries see a constant in keys that are turned behind it.
        key_bias=zeros(heads, P) if turned else None,
        value_bias=zeros(heads, H),
    )
    swap(
        view,
        layout,
        RotaryLatent(
            projections=projections,
            rotary=zeros(M, R, width),
            rotary_bias=None if old.key_bias is None else zeros(M, R),
            frequencies=torch.zeros(M, R // 2, dtype=torch.long),
            query_maps=zeros(heads, P + R, H),
            angles=torch.zeros(turned // 2) if turned else None,
        ),
    )
