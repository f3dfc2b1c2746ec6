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
    merge_keys,
    merge_mean,
    restore_norm,
)
from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import EditPlan, ShareKV, refuse_clustered
from headwise.model.shared_kv import SharedKV
from headwise.model.surgery import Payloads
from headwise.model.view import AttentionView, ModelView
from headwise.passes.base import Pass
from headwise.passes.grouping import adjacent, cheapest
from headwise.passes.kv_weights import KVWeights
from headwise.passes.recovery import Recovery

Merge = Literal["subspace", "align", "mean", "first"]


class ShareKVHeads(Pass):
    """Let several kv heads become one (MHA to GQA or MQA, GQA to fewer kv heads)."""

    name: ClassVar[str] = "share-kv"
    summary: ClassVar[str] = "fewer key/value heads, all query heads kept (MHA to GQA or MQA)"
    paper: ClassVar[str] = "arXiv 2305.13245, 2412.20677"

    kv_heads: int | tuple[int, ...] | None = None
    """The most kv heads that stay: one number for all layers, of which those that have no more keep theirs, or one per
    layer."""
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Instead of kv_heads: the share of its kv heads that every layer saves, or more."""
    uneven: Literal["fewer", "more", "refuse"] = "fewer"
    """Where that number does not divide the kv heads of a layer, as after pruning: take the next smaller one that does,
    the next larger one, or refuse. Every shared head has to serve equally many query heads."""
    grouping: Literal["similar", "adjacent"] = "similar"
    """Which heads become one: those whose best shared head loses least, or neighbours."""
    merge: Merge = "subspace"
    """How: the best shared subspace, the mean after alignment, the plain mean, or the first head of the group."""
    merge_keys: Merge | None = None
    """Another way for keys, which models that normalise them ask for (mean or first); by default as ``merge``."""
    weighted: bool = True
    """Weight errors by what queries and output projection make of them (subspace, and grouping by similarity)."""
    fold_bias: bool = True
    """First move value biases into the output bias and drop key biases, where that is exact."""
    restore_norm: bool = False
    """Scale shared heads to the mean norm of their members (align, mean, first)."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    ridge: float = Field(default=0.01, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared head output; the fewer the
    calibration samples, the stronger it should be."""
    rounds: int = Field(default=3, ge=0)
    """How often the refit also solves the shared value heads, in turn with the output projections."""
    reconstruct: int = Field(default=0, ge=0)
    """With refit: how often every attention layer sees the calibration samples in a reconstruction by gradient descent,
    which also fits queries and keys."""
    seed: int = 0
    """Seed of the search for similar heads."""

    @model_validator(mode="after")
    def _fits_together(self) -> ShareKVHeads:
        if (self.kv_heads is None) == (self.ratio is None):
            raise ValueError("give either kv_heads or ratio")
        counts = self.kv_heads if isinstance(self.kv_heads, tuple) else (self.kv_heads,)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("every layer keeps at least one kv head")
        if self.restore_norm and {self.merge, self._keys} == {"subspace"}:
            raise ValueError("the best shared subspace has no norm to restore: set merge: align, mean or first")
        return self

    @property
    def _keys(self) -> Merge:
        return self.merge_keys or self.merge

    def requires(self, view: ModelView) -> None:
        for layer in view.attention:
            refuse_clustered(layer.index, layer.layout)

    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat.INPUT_MOMENT, Stat.QUERY_MOMENT})

    def recovery(self) -> Recovery:
        return Recovery(
            fold_mean=False, refit=self.refit, ridge=self.ridge, rounds=self.rounds, epochs=self.reconstruct
        )

    def by_layer(self, view: ModelView) -> tuple[Pass | None, ...]:
        targets = [target for target, _ in self._targets(view)]
        counts = [len(layer.kv) for layer in view.layout.attention]
        if targets == counts:
            raise self._idle(targets)
        return tuple(
            None if target == count else self.model_copy(update={"kv_heads": target, "ratio": None})
            for target, count in zip(targets, counts, strict=True)
        )

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        targets = self._targets(view)
        edits, notes = [], {}
        for layer, (target, why) in zip(view.attention, targets, strict=True):
            if target == len(layer.layout.kv):
                notes[layer.index] = why or f"keeps its {target} kv heads"
                continue
            self._refuse_normalized(layer)
            groups, lost = self._groups(layer, stats, target)
            edits.append(ShareKV(layer=layer.index, groups=tuple(tuple(layer.layout.kv[i] for i in g) for g in groups)))
            notes[layer.index] = f"{why}; {lost}" if why else lost
        if not edits:
            raise self._idle([target for target, _ in targets])
        return EditPlan(edits=tuple(edits), notes=notes)

    def payloads(self, view: ModelView, stats: HeadStats, plan: EditPlan) -> Payloads:
        found = {}
        for position, edit in enumerate(plan.edits):
            if isinstance(edit, ShareKV):
                layer = view.attention[edit.layer]
                groups = [[layer.layout.kv.index(head) for head in group] for group in edit.groups]
                found[position] = self._share(self._weights(layer, stats), groups, layer.rotated)
        return found

    @staticmethod
    def _idle(targets: Sequence[int]) -> PlanError:
        return PlanError(
            "no layer has more kv heads than are to stay",
            expected=f"a layer with more than {min(targets)} kv heads",
            fix="lower kv_heads, or leave the pass out",
        )

    def _targets(self, view: ModelView) -> list[tuple[int, str]]:
        """Kv heads per layer after the pass, and why where it is not the number that was asked for."""
        counts = [len(layer.kv) for layer in view.layout.attention]
        if self.ratio is not None:
            wanted = [count * (1 - self.ratio) for count in counts]
        elif isinstance(self.kv_heads, tuple):
            wanted = [*map(float, self.kv_heads)]
            if len(wanted) != len(counts):
                raise PlanError(
                    f"kv_heads has {len(wanted)} entries",
                    expected=f"one per attention layer: {len(counts)}",
                    fix="give one number for all layers, or one per layer",
                )
        else:
            assert self.kv_heads is not None, "validated: without a ratio there are kv_heads"
            wanted = [float(self.kv_heads)] * len(counts)
        return [self._target(*entry) for entry in zip(range(len(counts)), counts, wanted, strict=True)]

    def _target(self, layer: int, count: int, wanted: float) -> tuple[int, str]:
        """The number that divides ``count``; rounding errors of a ratio are no reason to take another one."""
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        exact = next((d for d in divisors if abs(d - wanted) < 1e-6), count if wanted > count else None)
        if exact is not None:
            return exact, ""
        if self.uneven == "refuse":
            raise PlanError(
                f"layer {layer} has {count} kv heads, which {wanted:g} does not divide",
                expected=f"one of {divisors}: every shared head serves equally many query heads",
                fix="choose one of these per layer with kv_heads: [...], or set uneven: fewer or more",
            )
        below = max((d for d in divisors if d < wanted), default=1)
        found = below if self.uneven == "fewer" else min(d for d in divisors if d > wanted)
        return found, f"{found} because {wanted:g} does not divide {count}"

    def _refuse_normalized(self, layer: AttentionView) -> None:
        if layer.family.qk_norm and self._keys in ("subspace", "align"):
            raise PlanError(
                f"layer {layer.index} ({layer.family.name}) normalises queries and keys behind their projections",
                expected="merge_keys: mean or first, because a change of basis cannot be moved through the norm",
                fix="set merge_keys: mean; values may be merged in any way",
            )

    def _weights(self, layer: AttentionView, stats: HeadStats) -> KVWeights:
        keys, queries = (stats[stat][layer.index] for stat in (Stat.INPUT_MOMENT, Stat.QUERY_MOMENT))
        return KVWeights.of(layer, keys, queries, fold=self.fold_bias, weighted=self.weighted)

    def _groups(self, layer: AttentionView, stats: HeadStats, target: int) -> tuple[list[list[int]], str]:
        """Positions of the kv heads that become one, and what is lost at least."""
        keys, values = self._weights(layer, stats).energies(layer.rotated)

        def cost(group: Sequence[int]) -> float:
            return keys.lost(group) / keys.total + values.lost(group) / values.total

        similar = self.grouping == "similar"
        count = len(layer.layout.kv)
        groups = cheapest(cost, count, target, self.seed) if similar else adjacent(count, target)
        lost = [sum(map(energy.lost, groups)) / energy.total for energy in (keys, values)]
        return groups, "a shared subspace loses {:.1%} of the keys and {:.1%} of the values".format(*lost)

    def _share(self, weights: KVWeights, groups: Sequence[Sequence[int]], rotated: int) -> SharedKV:
        keys = [
            self._merge(self._keys, weights.key[g], weights.key_moment, weights.key_weights[g], rotated)
            for g in map(list, groups)
        ]
        values = [
            self._merge(self.merge, weights.value[g], weights.value_moment, weights.value_weights[g], 0)
            for g in map(list, groups)
        ]
        return weights.assemble(keys, values, groups)

    def _merge(
        self, how: Merge, heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor, rotated: int
    ) -> Merged:
        if how == "subspace":
            return merge_keys(heads, moment, weights, rotated=rotated)
        if how == "align":
            merged = merge_aligned(heads, moment, rotated=rotated)
        else:
            merged = merge_mean(heads) if how == "mean" else merge_first(heads)
        return restore_norm(merged, heads) if self.restore_norm else merged
