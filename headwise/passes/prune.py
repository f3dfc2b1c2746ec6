"""Spend one budget, of multiply-accumulates or of latency, over the heads and neurons of all layers together."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import DropHeads, EditPlan, refuse_clustered
from headwise.model.layout import AttentionLayout
from headwise.model.view import ModelView
from headwise.passes.base import Pass
from headwise.passes.elimination import Order
from headwise.passes.ladder import Ladder, climb, rungs, step_ends
from headwise.passes.orders import NEEDS, head_orders, neuron_edits, neuron_notes, neuron_orders
from headwise.passes.prices import Prices, Saved, in_macs, in_milliseconds
from headwise.passes.recovery import EVERY, Recovery


class Prune(Pass):
    """Remove heads and MLP neurons, each where it costs least for what it saves, until the budget is met."""

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = (
        "remove heads and MLP neurons of all layers together, to a share of the MACs or of the latency"
    )
    paper: ClassVar[str] = "arXiv 2204.09656, 2302.04089, 2504.21174"

    macs: float | None = Field(default=None, gt=0, lt=1)
    """The share of the model's multiply-accumulates that may stay, at ``export.sequence`` or else 128 tokens."""
    latency: float | None = Field(default=None, gt=0, lt=1)
    """Instead of macs: the share of the latency that may stay, by a table of what layers of every size take on this
    machine: ONNX Runtime, one thread, one sample of that length."""
    score: Literal["reconstruction", "gauss-newton", "fisher", "contribution"] = "gauss-newton"
    """What heads and neurons cost: ``gauss-newton`` (label-free, what the outputs lose when means take their places),
    ``fisher`` (the same for the loss, needs labels), ``reconstruction`` (label-free, what they lose after a refit),
    ``contribution`` to the layer output."""
    round_to: int = Field(default=8, ge=1)
    """Neurons that stay in an MLP are a multiple of this, so that kernels find whole tiles."""
    heads_round_to: int = Field(default=1, ge=1)
    """Query heads that stay in a layer are a multiple of this."""
    min_heads: int = Field(default=1, ge=1)
    """Query heads that every layer keeps."""
    fold_mean: bool = True
    """Add the mean output of what is removed to the bias behind it, where there is one."""
    refit: bool = True
    """Refit output and down projections in closed form afterwards, in the order in which they run."""
    ridge: float = Field(default=1.0, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared feature."""
    reconstruct: int = Field(default=0, ge=0)
    """With refit: how often every attention layer sees the calibration samples in a reconstruction by gradient descent,
    which also fits queries and keys."""

    @model_validator(mode="after")
    def _one_budget(self) -> Prune:
        if (self.macs is None) == (self.latency is None):
            raise ValueError("give either macs or latency")
        return self

    def requires(self, view: ModelView) -> None:
        for layer in view.attention:
            refuse_clustered(layer.index, layer.layout)

    def needs(self) -> frozenset[Stat]:
        return NEEDS[self.score] | (frozenset() if self.timed else {Stat.MACS})

    @property
    def timed(self) -> bool:
        return self.latency is not None

    def recovery(self) -> Recovery:
        return Recovery(
            fold_mean=self.fold_mean, refit=self.refit, ridge=self.ridge, epochs=self.reconstruct, parts=EVERY
        )

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        prices = in_milliseconds(view, stats) if self.timed else in_macs(stats)
        heads = head_orders(view, stats, self.score)
        neurons = neuron_orders(view, stats, self.score, seed=0, at_once=self.round_to)
        ladders = [
            self._head_ladder(order, layer.layout, saved)
            for order, layer, saved in zip(heads, view.attention, prices.heads, strict=True)
        ]
        ladders += [self._neuron_ladder(order, saved) for order, saved in zip(neurons, prices.neurons, strict=True)]
        share = self.latency or self.macs or 0.0
        _refuse_small(share, ladders, prices)
        taken = climb(ladders, (1 - share) * prices.total, at_least=True)
        gone = [sum(len(rung.units) for rung in ladder[:count]) for ladder, count in zip(ladders, taken, strict=True)]
        saved = [sum(rung.size for rung in ladder[:count]) for ladder, count in zip(ladders, taken, strict=True)]
        layers = len(view.attention)
        edits = [
            DropHeads(layer=layer.index, query=_query(layer.layout, order.units[:count]))
            for layer, order, count in zip(view.attention, heads, gone, strict=False)
            if count
        ]
        return EditPlan(
            edits=(*edits, *neuron_edits(view, neurons, gone[layers:])),
            mlp_notes=neuron_notes(view, neurons, gone[layers:], self.score),
            summary=prices.spent(sum(saved[:layers]), sum(saved[layers:])),
        )

    def _head_ladder(self, order: Order, layout: AttentionLayout, saved: Saved) -> Ladder:
        count, group = len(layout.query), layout.group
        ends = [
            units
            for units in range(1, len(order.units))
            if (count - units * group) % self.heads_round_to == 0 and count - units * group >= self.min_heads
        ]
        return rungs(order.units, order.costs, ends, saved)

    def _neuron_ladder(self, order: Order, saved: Saved) -> Ladder:
        return rungs(order.units, order.costs, step_ends(len(order.units), self.round_to, self.round_to), saved)


def _refuse_small(share: float, ladders: list[Ladder], prices: Prices) -> None:
    least = 1 - sum(rung.size for ladder in ladders for rung in ladder) / prices.total
    if share < least:
        raise PlanError(
            f"{prices.option}: {share:g}, but {least:.3g} of the {prices.whole} cannot go",
            expected=f"a share from {least:.3g} to 1",
            fix=f"raise {prices.option}, or lower round_to, heads_round_to or min_heads",
        )


def _query(layout: AttentionLayout, units: tuple[int, ...]) -> tuple[int, ...]:
    every = layout.units()
    return tuple(sorted(head for unit in units for head in every[unit]))
