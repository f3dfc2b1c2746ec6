"""Spend one budget of multiply-accumulates over the heads and neurons of all layers together."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import DropHeads, EditPlan, refuse_clustered
from headwise.model.layout import AttentionLayout
from headwise.model.view import ModelView
from headwise.passes.base import Pass
from headwise.passes.elimination import Order
from headwise.passes.ladder import Ladder, climb, rungs, step_ends
from headwise.passes.orders import NEEDS, head_orders, neuron_edits, neuron_notes, neuron_orders
from headwise.passes.recovery import Part, Recovery


class Prune(Pass):
    """Remove heads and MLP neurons, each where it costs least per multiply-accumulate, until the budget is met."""

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "remove heads and MLP neurons of all layers together, to a share of the model's MACs"
    paper: ClassVar[str] = "arXiv 2204.09656, 2302.04089, 2504.21174"

    macs: float = Field(gt=0, lt=1)
    """The share of the model's multiply-accumulates that may stay, at ``export.sequence`` or else 128 tokens."""
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

    def needs(self) -> frozenset[Stat]:
        return NEEDS[self.score] | {Stat.MACS}

    def recovery(self) -> Recovery:
        every = frozenset[Part]({"attention", "mlp"})
        return Recovery(fold_mean=self.fold_mean, refit=self.refit, ridge=self.ridge, parts=every)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        for layer in view.attention:
            refuse_clustered(layer.index, layer.layout)
        of_heads, of_neurons, (total,) = (macs.tolist() for macs in stats[Stat.MACS])
        heads = head_orders(view, stats, self.score)
        neurons = neuron_orders(view, stats, self.score, seed=0, at_once=self.round_to)
        ladders = [
            self._head_ladder(order, layer.layout, size)
            for order, layer, size in zip(heads, view.attention, of_heads, strict=True)
        ]
        ladders += [self._neuron_ladder(order, size) for order, size in zip(neurons, of_neurons, strict=True)]
        self._refuse_small(ladders, total)
        taken = climb(ladders, (1 - self.macs) * total, at_least=True)
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
            summary=_spent(total, sum(saved[:layers]), sum(saved[layers:])),
        )

    def _head_ladder(self, order: Order, layout: AttentionLayout, size: int) -> Ladder:
        count, group = len(layout.query), layout.group
        ends = [
            units
            for units in range(1, len(order.units))
            if (count - units * group) % self.heads_round_to == 0 and count - units * group >= self.min_heads
        ]
        return rungs(order.units, order.costs, ends, size)

    def _neuron_ladder(self, order: Order, size: int) -> Ladder:
        return rungs(order.units, order.costs, step_ends(len(order.units), self.round_to, self.round_to), size)

    def _refuse_small(self, ladders: list[Ladder], total: int) -> None:
        least = 1 - sum(rung.size for ladder in ladders for rung in ladder) / total
        if self.macs < least:
            raise PlanError(
                f"macs: {self.macs:g}, but {least:.3g} of the multiply-accumulates are outside of what can go",
                expected=f"a share from {least:.3g} to 1",
                fix="raise macs, or lower round_to, heads_round_to or min_heads",
            )


def _query(layout: AttentionLayout, units: tuple[int, ...]) -> tuple[int, ...]:
    every = layout.units()
    return tuple(sorted(head for unit in units for head in every[unit]))


def _spent(total: int, heads: float, neurons: float) -> str:
    left = total - heads - neurons
    return (
        f"{left:,.0f} of {total:,} multiply-accumulates per sample stay ({100 * left / total:.1f} %); "
        f"{100 * heads / total:.1f} % go with heads, {100 * neurons / total:.1f} % with neurons"
    )
