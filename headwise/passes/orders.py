"""The order in which heads and neurons of every layer go, and what they cost, by any score that compares both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from headwise.calibration.stats import HeadStats, Stat
from headwise.model.edits import DropNeurons
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView, ModelView
from headwise.passes import scores as importance
from headwise.passes.elimination import Order, by_growth, by_reconstruction, cheapest_first

UnitScore = Literal["reconstruction", "gauss-newton", "fisher", "contribution", "weight-norm", "random"]

NEEDS: Mapping[UnitScore, frozenset[Stat]] = {
    "reconstruction": frozenset({Stat.FEATURE_MOMENT, Stat.OUTPUT_CURVATURE}),
    "gauss-newton": frozenset({Stat.UNIT_GAUSS_NEWTON}),
    "fisher": frozenset({Stat.UNIT_FISHER}),
    "contribution": frozenset({Stat.CONTRIBUTION, Stat.NEURON_SIZE}),
    "weight-norm": frozenset(),
    "random": frozenset(),
}


def head_orders(view: ModelView, stats: HeadStats, score: UnitScore) -> list[Order]:
    """Per attention layer, its ``layout.units()`` by position."""
    return [_head_order(view, layer, stats, score) for layer in view.attention]


def _head_order(view: ModelView, layer: AttentionView, stats: HeadStats, score: UnitScore) -> Order:
    group = layer.layout.group
    units = [list(range(start, start + group)) for start in range(0, len(layer.layout.query), group)]
    if score == "reconstruction":
        H = layer.layout.head_dim
        features = [[head * H + i for head in unit for i in range(H)] for unit in units]
        return _reconstructed(layer, stats, layer.index, features, at_once=1)
    if score == "contribution":
        costs = stats[Stat.CONTRIBUTION][layer.index].double()
        return cheapest_first(torch.stack([costs[unit].sum() for unit in units]))
    stat = Stat.UNIT_FISHER if score == "fisher" else Stat.UNIT_GAUSS_NEWTON
    return by_growth(importance.unit_matrix(stats[stat][layer.index], units))


def neuron_orders(view: ModelView, stats: HeadStats, score: UnitScore, *, seed: int, at_once: int) -> list[Order]:
    """Per MLP, its neurons by position.

    Args:
        view: the model.
        stats: what the score needs.
        score: how important a neuron is.
        seed: of the random score.
        at_once: neurons that go before the reconstruction of the others is brought up to date.
    """
    if score == "reconstruction":
        first = len(view.attention)
        return [_reconstructed(mlp, stats, first + mlp.index, _single(mlp), at_once=at_once) for mlp in view.mlp]
    return [cheapest_first(costs) for costs in _neuron_costs(view, stats, score, seed)]


def _reconstructed(
    layer: AttentionView | MlpView, stats: HeadStats, place: int, units: Sequence[Sequence[int]], *, at_once: int
) -> Order:
    moment, curvature = stats[Stat.FEATURE_MOMENT][place], stats[Stat.OUTPUT_CURVATURE][place]
    weight, bias = layer.linear()
    return by_reconstruction(moment, weight, curvature, units, biased=bias is not None, at_once=at_once)


def _single(mlp: MlpView) -> list[list[int]]:
    return [[neuron] for neuron in range(len(mlp.layout.neurons))]


def _neuron_costs(view: ModelView, stats: HeadStats, score: UnitScore, seed: int) -> list[torch.Tensor]:
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return [importance.random(len(mlp.layout.neurons), generator) for mlp in view.mlp]
    if score == "weight-norm":
        return [importance.neuron_weight_norm(mlp.read()) for mlp in view.mlp]
    if score == "contribution":
        return [importance.neuron_contribution(m.read(), stats[Stat.NEURON_SIZE][m.index]) for m in view.mlp]
    stat = Stat.UNIT_FISHER if score == "fisher" else Stat.UNIT_GAUSS_NEWTON
    return list(stats[stat][len(view.attention) :])


def neuron_edits(view: ModelView, orders: Sequence[Order], gone: Sequence[int]) -> tuple[DropNeurons, ...]:
    """The first so many neurons of every MLP go."""
    return tuple(
        DropNeurons(layer=mlp.index, neurons=tuple(sorted(mlp.layout.neurons[i] for i in order.units[:count])))
        for mlp, order, count in zip(view.mlp, orders, gone, strict=True)
        if count
    )


def neuron_notes(view: ModelView, orders: Sequence[Order], gone: Sequence[int], score: UnitScore) -> dict[int, str]:
    """Per MLP that loses neurons, which part of its score they have: an even share would be that of their number."""
    notes = {}
    for mlp, order, count in zip(view.mlp, orders, gone, strict=True):
        whole = sum(order.costs)
        if count and whole > 0:
            notes[mlp.index] = f"{100 * sum(order.costs[:count]) / whole:.2g} % of the {score} score of its neurons"
    return notes
