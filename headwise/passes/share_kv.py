"""Convert multi-head or grouped-query attention to fewer key/value heads; every query head stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from headwise.calibration.merge import (
    Merged,
    merge_aligned,
    merge_first,
    merge_mean,
    merge_rotary,
    merge_subspace,
    restore_norm,
)
from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.layout import EditPlan, ShareKV
from headwise.model.surgery import Payloads, SharedKV
from headwise.model.view import AttentionView, ModelView
from headwise.passes.base import Pass
from headwise.passes.grouping import adjacent, cheapest
from headwise.passes.kv_weights import KVWeights
from headwise.passes.recovery import Recovery


class ShareKVHeads(Pass):
    """Let several kv heads become one (MHA to GQA or MQA, GQA to fewer kv heads)."""

    name: ClassVar[str] = "share-kv"
    summary: ClassVar[str] = "fewer key/value heads, all query heads kept (MHA to GQA or MQA)"
    paper: ClassVar[str] = "arXiv 2305.13245, 2412.20677"

    kv_heads: int | tuple[int, ...] | None = None
    """Kv heads that stay: one number for all layers (layers that have fewer keep theirs), or one per layer."""
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Instead of kv_heads: the share of kv heads to save, per layer rounded to a number that divides its heads."""
    grouping: Literal["similar", "adjacent"] = "similar"
    """Which heads become one: those that lose least together, or neighbours."""
    merge: Literal["subspace", "align", "mean", "first"] = "subspace"
    """How: the best shared subspace, the mean after alignment, the plain mean, or the first head of the group."""
    weighted: bool = True
    """Weight errors by what queries and output projection make of them (subspace)."""
    fold_bias: bool = True
    """First move value biases into the output bias and drop key biases, where that is exact."""
    restore_norm: bool = False
    """Scale shared heads to the mean norm of their members (align, mean)."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    ridge: float = Field(default=1.0, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared head output."""
    seed: int = 0
    """Seed of the search for similar heads."""

    @model_validator(mode="after")
    def _one_size(self) -> ShareKVHeads:
        if (self.kv_heads is None) == (self.ratio is None):
            raise ValueError("give either kv_heads or ratio")
        counts = self.kv_heads if isinstance(self.kv_heads, tuple) else (self.kv_heads,)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("every layer keeps at least one kv head")
        return self

    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat.INPUT_MOMENT})

    def recovery(self) -> Recovery:
        return Recovery(fold_mean=False, refit=self.refit, ridge=self.ridge)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        targets = self._targets(view)
        edits = []
        for layer, target in zip(view.attention, targets, strict=True):
            if target == len(layer.layout.kv):
                continue
            self._refuse_normalized(layer)
            if self.grouping == "adjacent":
                groups = adjacent(len(layer.layout.kv), target)
            else:
                groups = cheapest(self._pair_costs(layer, stats), target, self.seed)
            edits.append(ShareKV(layer=layer.index, groups=tuple(tuple(layer.layout.kv[i] for i in g) for g in groups)))
        if not edits:
            raise PlanError(
                "no layer has more kv heads than are to stay",
                expected=f"a layer with more than {min(targets)} kv heads",
                fix="lower kv_heads, or leave the pass out",
            )
        return EditPlan(edits=tuple(edits))

    def payloads(self, view: ModelView, stats: HeadStats, plan: EditPlan) -> Payloads:
        found = {}
        for position, edit in enumerate(plan.edits):
            if isinstance(edit, ShareKV):
                layer = view.attention[edit.layer]
                groups = [[layer.layout.kv.index(head) for head in group] for group in edit.groups]
                found[position] = self._share(self._weights(layer, stats), groups, rotary=layer.family.rotary)
        return found

    def _targets(self, view: ModelView) -> list[int]:
        """Kv heads per layer after the pass."""
        counts = [len(layer.kv) for layer in view.layout.attention]
        if self.ratio is not None:
            return [_nearest_divisor(count, count * (1 - self.ratio)) for count in counts]
        if isinstance(self.kv_heads, tuple) and len(self.kv_heads) != len(counts):
            raise PlanError(
                f"kv_heads has {len(self.kv_heads)} entries",
                expected=f"one per attention layer: {len(counts)}",
                fix="give one number for all layers, or one per layer",
            )
        assert self.kv_heads is not None, "validated: without a ratio there are kv_heads"
        wanted = self.kv_heads if isinstance(self.kv_heads, tuple) else (self.kv_heads,) * len(counts)
        targets = [min(want, count) for want, count in zip(wanted, counts, strict=True)]
        for layer, (target, count) in enumerate(zip(targets, counts, strict=True)):
            if count % target:
                divisors = [d for d in range(1, count + 1) if count % d == 0]
                raise PlanError(
                    f"layer {layer} has {count} kv heads, which {target} does not divide",
                    expected=f"one of {divisors}: every shared head serves equally many query heads",
                    fix="choose one of these per layer with kv_heads: [...], or use ratio",
                )
        return targets

    def _refuse_normalized(self, layer: AttentionView) -> None:
        if layer.family.qk_norm and self.merge in ("subspace", "align"):
            raise PlanError(
                f"layer {layer.index} ({layer.family.name}) normalises queries and keys behind their projections",
                expected="merge: mean or first: a basis change of the keys cannot be moved through the norm",
                fix="set merge: mean with grouping: similar, or convert another model",
            )

    def _weights(self, layer: AttentionView, stats: HeadStats) -> KVWeights:
        return KVWeights.of(layer, stats[Stat.INPUT_MOMENT][layer.index], fold=self.fold_bias, weighted=self.weighted)

    def _pair_costs(self, layer: AttentionView, stats: HeadStats) -> torch.Tensor:
        """(K, K) energy of keys and values that two heads lose when they become one."""
        weights, count = self._weights(layer, stats), len(layer.layout.kv)
        merge_keys = merge_rotary if layer.family.rotary else merge_subspace
        costs = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i):
                pair = [i, j]
                keys = merge_keys(weights.key[pair], weights.key_moment, weights.key_weights[pair])
                values = merge_subspace(weights.value[pair], weights.value_moment, weights.value_weights[pair])
                costs[i, j] = costs[j, i] = keys.lost + values.lost
        return costs

    def _share(self, weights: KVWeights, groups: Sequence[Sequence[int]], *, rotary: bool) -> SharedKV:
        keys = [
            self._merge(weights.key[g], weights.key_moment, weights.key_weights[g], rotary=rotary)
            for g in map(list, groups)
        ]
        values = [
            self._merge(weights.value[g], weights.value_moment, weights.value_weights[g], rotary=False)
            for g in map(list, groups)
        ]
        return weights.assemble(keys, values, groups)

    def _merge(self, heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor, *, rotary: bool) -> Merged:
        if self.merge == "subspace":
            return merge_rotary(heads, moment, weights) if rotary else merge_subspace(heads, moment, weights)
        if self.merge == "align":
            merged = merge_aligned(heads, moment, rotary=rotary)
        else:
            merged = merge_mean(heads) if self.merge == "mean" else merge_first(heads)
        return restore_norm(merged, heads) if self.restore_norm else merged


def _nearest_divisor(count: int, wanted: float) -> int:
    """The divisor of ``count`` nearest to ``wanted``; the larger of two equally near ones."""
    return min((d for d in range(1, count + 1) if count % d == 0), key=lambda d: (abs(d - wanted), -d))
