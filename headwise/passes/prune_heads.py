"""Remove attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import DropHeads, EditPlan, Scores
from headwise.model.view import ModelView
from headwise.passes import scores as importance
from headwise.passes.base import Pass
from headwise.passes.recovery import Recovery
from headwise.passes.select import Budget, Unit, by_cost, by_matrix

Score = Literal["contribution", "gauss-newton", "michel", "fisher", "weight-norm", "random"]

_NEEDS: dict[str, frozenset[Stat]] = {
    "contribution": frozenset({Stat.CONTRIBUTION}),
    "gauss-newton": frozenset({Stat.GAUSS_NEWTON}),
    "michel": frozenset({Stat.LOSS_GRADIENT}),
    "fisher": frozenset({Stat.LOSS_GRADIENT}),
    "weight-norm": frozenset(),
    "random": frozenset(),
}


class PruneHeads(Pass):
    """Remove the query heads that matter least, with the kv heads that nobody reads afterwards."""

    name: ClassVar[str] = "prune-heads"
    summary: ClassVar[str] = "remove the attention heads that matter least; whole kv groups under GQA"
    paper: ClassVar[str] = "arXiv 1905.10650, 2504.21174, 2204.09656"

    ratio: float = Field(ge=0, lt=1)
    """Share of all query heads to remove, from 0 to below 1."""
    score: Score = "contribution"
    """How important a head is: ``contribution`` through the output projection, ``gauss-newton`` (label-free, knows
    which heads replace each other), ``michel`` or ``fisher`` (need labels), ``weight-norm`` (no data), ``random``."""
    scope: Literal["model", "layer"] = "model"
    """Rank all heads of the model together, or remove the same share in every layer."""
    normalize: bool = False
    """Divide the scores by their norm within each layer before ranking (Michel et al.); not for gauss-newton."""
    min_heads: int = Field(default=1, ge=1)
    """Query heads that every layer keeps."""
    round_to: int = Field(default=1, ge=1)
    """Query heads that stay in a layer are a multiple of this, so that a later share-kv finds divisors."""
    fold_mean: bool = True
    """Add the mean output of removed heads to the output bias, where the layer has one."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    ridge: float = Field(default=1.0, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared head output."""
    reconstruct: int = Field(default=0, ge=0)
    """With refit: how often every attention layer sees the calibration samples in a reconstruction by gradient descent,
    which also fits queries and keys."""
    seed: int = 0
    """Seed of the ``random`` score."""

    @model_validator(mode="after")
    def _no_normalized_matrix(self) -> PruneHeads:
        if self.normalize and self.score == "gauss-newton":
            raise ValueError("normalize divides single scores, gauss-newton decides on a matrix: set normalize: false")
        return self

    def needs(self) -> frozenset[Stat]:
        return _NEEDS[self.score]

    def recovery(self) -> Recovery:
        return Recovery(fold_mean=self.fold_mean, refit=self.refit, ridge=self.ridge, epochs=self.reconstruct)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        units = _units(view)
        matrix = stats[Stat.GAUSS_NEWTON][0] if self.score == "gauss-newton" else None
        per_layer = self._scores(view, stats)
        costs = torch.cat(per_layer)
        dropped: list[Unit] = []
        for group in self._scopes(units):
            heads = round(self.ratio * sum(len(u.heads) for u in group))
            budget = Budget(heads=heads, keep=self.min_heads, multiple=self.round_to)
            if budget.heads == 0:
                continue
            if matrix is None:
                dropped += by_cost(group, [float(costs[list(u.index)].sum()) for u in group], budget)
            else:
                dropped += by_matrix(group, importance.unit_matrix(matrix, [list(u.index) for u in group]), budget)
        if self.ratio > 0 and not dropped:
            smallest = min(len(unit.heads) for unit in units)
            raise PlanError(
                f"ratio {self.ratio} of {len(costs)} query heads removes nothing",
                expected=f"a ratio that removes at least one unit of {smallest} query head(s)",
                fix="raise the ratio, or leave the pass out",
            )
        return EditPlan(edits=_edits(dropped), scores=self._named(view, per_layer))

    def _scores(self, view: ModelView, stats: HeadStats) -> list[torch.Tensor]:
        """Per layer (N,), higher is more important."""
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed)
            found = [importance.random(len(layer.layout.query), generator) for layer in view.attention]
        elif self.score == "weight-norm":
            found = [importance.weight_norm(layer.read()) for layer in view.attention]
        elif self.score == "gauss-newton":
            counts = [len(layer.layout.query) for layer in view.attention]
            found = list(stats[Stat.GAUSS_NEWTON][0].diagonal().split(counts))
        elif self.score == "contribution":
            found = list(stats[Stat.CONTRIBUTION])
        else:
            measure = importance.michel if self.score == "michel" else importance.fisher
            found = [measure(gradients) for gradients in stats[Stat.LOSS_GRADIENT]]
        return [importance.per_layer_normalized(layer) for layer in found] if self.normalize else found

    def _scopes(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """The sets of units that compete with each other."""
        if self.scope == "model":
            return [list(units)]
        layers = sorted({unit.layer for unit in units})
        return [[unit for unit in units if unit.layer == layer] for layer in layers]

    def _named(self, view: ModelView, per_layer: Sequence[torch.Tensor]) -> Scores:
        layers = tuple(
            dict(zip(layer.layout.query, values.tolist(), strict=True))
            for layer, values in zip(view.attention, per_layer, strict=True)
        )
        return Scores(name=self.score, layers=layers)


def _units(view: ModelView) -> list[Unit]:
    units, offset = [], 0
    for layer in view.attention:
        positions = {head: offset + i for i, head in enumerate(layer.layout.query)}
        for heads in layer.layout.units():
            units.append(Unit(layer=layer.index, heads=heads, index=tuple(positions[head] for head in heads)))
        offset += len(positions)
    return units


def _edits(dropped: Sequence[Unit]) -> tuple[DropHeads, ...]:
    """One edit per layer."""
    by_layer: dict[int, list[int]] = {}
    for unit in dropped:
        by_layer.setdefault(unit.layer, []).extend(unit.heads)
    return tuple(DropHeads(layer=layer, query=tuple(sorted(heads))) for layer, heads in sorted(by_layer.items()))
