"""Latent attention of decoders: which keys stay rotary, and the latent of the rest.

Shape letters: D model width, K kv heads, H head_dim, P, R and M as in ``headwise.model.latent_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from headwise.calibration.merge import pair_power
from headwise.calibration.rotary import (
    Basis,
    RotaryParts,
    Select,
    head_components,
    importance,
    keep_rotary,
    merged_components,
    of_every_frequency,
)
from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.latent_surgery import LatentWeights
from headwise.model.latent_swap import RotaryLatent
from headwise.model.view import AttentionView, ModelView
from headwise.passes.kv_weights import error_weights
from headwise.passes.latent_weights import Reader

_MOVING = ("dynamic", "longrope")
"""Kinds of rotary positions in transformers whose frequencies depend on how long the text is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySplit:
    """How keys are split; ``merged`` has one rotary key for all heads, otherwise every head keeps its own.

    Attributes:
        numbers: per token, of all rotary keys of a layer; None: as many as one head has.
        every: keep equally many components of every frequency.
    """

    merged: bool
    numbers: int | None
    fold: int
    basis: Basis
    select: Select
    distance: int
    every: bool

    def parts(self, view: ModelView, layer: AttentionView, stats: HeadStats) -> RotaryParts:
        """Split the keys of a layer.

        Raises:
            PlanError: that many numbers cannot be kept.
        """
        old, moment = layer.read(), stats[Stat.INPUT_MOMENT][layer.index]
        weights, _ = error_weights(old, stats[Stat.QUERY_MOMENT][layer.index])
        bias = old.key.new_zeros(old.key.shape[:2]) if old.key_bias is None else old.key_bias
        keys = torch.cat([old.key, bias[..., None]], dim=-1).double()
        turned = layer.rotated
        if not turned:
            heads, H, width = keys.shape
            maps = torch.eye(H, dtype=torch.float64).repeat(heads, 1, 1)
            none = torch.zeros(1, 0, dtype=torch.long)
            return RotaryParts(rotary=keys.new_zeros(1, 0, width), frequencies=none, rest=keys, query_maps=maps)
        given = keys[:, :turned], moment, weights[:, :turned, :turned]
        if self.merged:
            components = merged_components(*given, fold=self.fold, basis=self.basis)
        else:
            components = head_components(*given)
        worth = importance(components, angles(view, turned // 2), self.distance, self.select)
        kept = self.kept(layer)
        if self.every:
            worth = of_every_frequency(components, worth, kept // turned)
        return keep_rotary(keys, components, worth, kept, turned)

    def kept(self, layer: AttentionView) -> int:
        """Numbers per token of the layer's rotary keys."""
        heads, turned = len(layer.layout.kv), layer.rotated
        if not turned:
            return 0
        step = 2 if self.merged else 2 * heads
        if self.every:
            step = turned if self.merged else turned * heads
        numbers = self.numbers if self.numbers is not None else (turned if self.merged else step)
        if numbers % step or not 0 < numbers <= heads * turned:
            raise PlanError(
                f"rotary: {numbers} in layer {layer.index} ({heads} kv heads, {turned} rotated coordinates in each)",
                expected=f"a multiple of {step} up to {heads * turned}",
                fix="rotated coordinates are pairs, of which every head keeps equally many under route: heads, and "
                "every frequency under frequencies: every",
            )
        return numbers


def angles(view: ModelView, pairs: int) -> torch.Tensor:
    """(F,) by how much each frequency turns from one token to the next."""
    for module in view.module.modules():
        found = getattr(module, "inv_freq", None)
        if isinstance(found, torch.Tensor) and len(found) == pairs and not isinstance(module, nn.ModuleList):
            return found.detach().double()
    raise PlanError(
        f"no module of the model holds {pairs} rotary frequencies",
        expected="a module with inv_freq, as in transformers",
        fix="use share-kv for this model",
    )


def refuse_cached(layer: AttentionView) -> None:
    """Raise PlanError where latent attention cannot be what the class computes."""
    family = layer.family
    reason = "normalises queries and keys behind their projections" if family.qk_norm else ""
    reason = reason or ("caps its scores" if family.soft_cap else "")
    if reason:
        raise PlanError(
            f"layer {layer.index} ({family.name}) {reason}",
            expected="scores that are products of projections, which can be moved from keys into queries",
            fix="use share-kv for this model",
        )


def refuse_turned(layer: AttentionView) -> None:
    """Raise PlanError where keys from a latent cannot be turned as the class turns them."""
    refuse_cached(layer)
    given = getattr(getattr(layer.module, "config", None), "rope_parameters", None) or {}
    if layer.rotated and given.get("rope_type", "default") in _MOVING:
        raise PlanError(
            f"layer {layer.index} has rotary positions of type {given['rope_type']}",
            expected="frequencies that do not depend on the length of the text: keys of the past are turned anew",
            fix="use share-kv, or latent-kv with another route, for this model",
        )


def rest_reader(layer: AttentionView, stats: HeadStats, parts: RotaryParts) -> Reader:
    """Values, and what is left of the keys, as the latent sees them."""
    reader = Reader.of(layer, stats)
    moment = stats[Stat.INPUT_MOMENT][layer.index]
    plain = parts.rest.shape[1]
    maps = parts.query_maps[:, :plain].double()
    return replace(
        reader,
        key=parts.rest[..., :-1],
        key_mean=parts.rest @ moment[-1],
        key_weights=maps @ reader.key_weights @ maps.mT,
        keeps=(False, True),
    )


def rotary_latent(layer: AttentionView, parts: RotaryParts, weights: LatentWeights) -> RotaryLatent:
    """The numbers of the edit."""
    has_bias = layer.read().key_bias is not None
    return RotaryLatent(
        projections=weights.projections,
        rotary=parts.rotary[..., :-1],
        rotary_bias=parts.rotary[..., -1] if has_bias else None,
        frequencies=parts.frequencies,
        query_maps=parts.query_maps,
    )


def turned_reader(reader: Reader) -> Reader:
    """Keys and values as a latent sees them whose keys are turned behind it, by whatever angle.

    A query that is some tokens away meets a pair of coordinates at any angle, so that an error counts by the size of
    the query's pair alone. Keys and values keep a bias where anybody sees it.
    """
    layer, weights = reader.layer, reader.key_weights.clone()
    turned = layer.rotated
    if turned:
        power = pair_power(weights[:, :turned, :turned]).repeat(1, 2) / 2
        weights[:, :turned], weights[:, :, :turned] = 0, 0
        weights[:, :turned, :turned] = torch.diag_embed(power)
    return replace(reader, key_weights=weights, keeps=(turned > 0, True))


def turned_latent(view: ModelView, layer: AttentionView, weights: LatentWeights) -> RotaryLatent:
    """The numbers of an edit whose keys come from the latent and are turned behind it."""
    heads, H, _ = weights.projections.value.shape
    pairs = layer.rotated // 2
    return RotaryLatent(
        projections=weights.projections,
        rotary=torch.zeros(1, 0, layer.read().query.shape[2]),
        rotary_bias=None if layer.read().key_bias is None else torch.zeros(1, 0),
        frequencies=torch.zeros(1, 0, dtype=torch.long),
        query_maps=torch.eye(H, dtype=torch.float64).repeat(heads, 1, 1),
        angles=angles(view, pairs) if pairs else None,
    )
