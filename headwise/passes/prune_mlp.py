"""Remove MLP neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import EditPlan
from headwise.model.view import ModelView
from headwise.passes.base import Pass
from headwise.passes.elimination import Order
from headwise.passes.ladder import climb, rungs, step_ends
from headwise.passes.orders import NEEDS, UnitScore, neuron_edits, neuron_notes, neuron_orders
from headwise.passes.recovery import Recovery


class PruneMlp(Pass):
    """Remove the MLP neurons that matter least from all matrices of their layer."""

    name: ClassVar[str] = "prune-mlp"
    summary: ClassVar[str] = "remove the MLP neurons that matter least, from up, gate and down projection"
    paper: ClassVar[str] = "arXiv 2204.09656, 2302.04089, 2504.21174"

    ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all neurons to remove, from 0 to below 1."""
    widths: int | tuple[int, ...] | None = None
    """Instead of ratio: neurons that stay, one number for all MLPs (those that have fewer keep theirs) or one each."""
    score: UnitScore = "gauss-newton"
    """How important a neuron is: ``gauss-newton`` (label-free, what the outputs lose when its mean takes its place),
    ``fisher`` (the same for the loss, needs labels), ``reconstruction`` (label-free, what they lose after a refit),
    ``contribution`` through the down projection, ``weight-norm`` (no data), ``random``."""
    scope: Literal["model", "layer"] = "model"
    """With ratio: rank all neurons of the model together, or remove the same share in every layer."""
    round_to: int = Field(default=8, ge=1)
    """With ratio: neurons that stay in a layer are a multiple of this, so that kernels find whole tiles."""
    fold_mean: bool = True
    """Add the mean output of removed neurons to the bias of the down projection, where there is one."""
    refit: bool = True
    """Refit the down projections in closed form afterwards."""
    ridge: float = Field(default=1.0, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared neuron output."""
    seed: int = 0
    """Seed of the ``random`` score."""

    @model_validator(mode="after")
    def _one_size(self) -> PruneMlp:
        if (self.ratio is None) == (self.widths is None):
            raise ValueError("give either ratio or widths")
        widths = self.widths if isinstance(self.widths, tuple) else (self.widths,)
        if any(width is not None and width < 1 for width in widths):
            raise ValueError("every MLP keeps at least one neuron")
        return self

    def needs(self) -> frozenset[Stat]:
        return NEEDS[self.score]

    def recovery(self) -> Recovery:
        return Recovery(fold_mean=self.fold_mean, refit=self.refit, ridge=self.ridge, parts=frozenset({"mlp"}))

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        if not view.mlp:
            raise PlanError(
                "no block of this model has an MLP that headwise knows",
                expected="a family record with an mlp entry, or linear1 and linear2 in the block of a plain module",
                fix="see `headwise inspect`; prune-heads works on this model",
            )
        orders = neuron_orders(view, stats, self.score, seed=self.seed, at_once=self.round_to)
        gone = self._by_width(view) if self.ratio is None else self._by_ratio(orders)
        edits = neuron_edits(view, orders, gone)
        if not edits and self.ratio != 0:
            raise PlanError(
                "no MLP would lose a neuron",
                expected=f"a ratio that removes at least one step of {self.round_to} neurons, or smaller widths",
                fix="raise the ratio, lower widths or round_to, or leave the pass out",
            )
        return EditPlan(edits=edits, mlp_notes=neuron_notes(view, orders, gone, self.score))

    def _by_ratio(self, orders: Sequence[Order]) -> list[int]:
        """Neurons to remove per MLP."""
        assert self.ratio is not None, "validated: without widths there is a ratio"
        ladders = [
            rungs(order.units, order.costs, step_ends(len(order.units), self.round_to, self.round_to), float)
            for order in orders
        ]
        groups = [[index] for index in range(len(ladders))] if self.scope == "layer" else [list(range(len(ladders)))]
        gone = [0] * len(ladders)
        for group in groups:
            budget = round(self.ratio * sum(len(orders[index].units) for index in group))
            for index, count in zip(group, climb([ladders[i] for i in group], budget, at_least=False), strict=True):
                gone[index] = sum(len(rung.units) for rung in ladders[index][:count])
        return gone

    def _by_width(self, view: ModelView) -> list[int]:
        have = [len(mlp.layout.neurons) for mlp in view.mlp]
        if isinstance(self.widths, tuple) and len(self.widths) != len(have):
            raise PlanError(
                f"widths has {len(self.widths)} entries",
                expected=f"one per MLP: {len(have)}",
                fix="give one number for all MLPs, or one each",
            )
        widths = self.widths if isinstance(self.widths, tuple) else (self.widths or 0,) * len(have)
        return [max(count - width, 0) for count, width in zip(have, widths, strict=True)]
