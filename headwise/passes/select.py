"""Choose what goes under a budget: by independent costs, or by a matrix that knows which units replace each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Query heads that can only be removed together.

    Attributes:
        layer: index of their layer.
        heads: original ids.
        index: positions among the heads of all layers, for score vectors and matrices.
    """

    layer: int
    heads: tuple[int, ...]
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much goes.

    Attributes:
        heads: query heads to remove; a unit is taken while at least half of it fits.
        keep: per layer, query heads that have to stay.
    """

    heads: int
    keep: int


def by_cost(units: Sequence[Unit], costs: Sequence[float], budget: Budget) -> list[Unit]:
    """The cheapest units per head. Ties go to the earlier layer and head, so that equal inputs give equal plans."""
    order = sorted(range(len(units)), key=lambda u: (costs[u] / len(units[u].heads), u))
    room = _Room(units, budget)
    chosen = []
    for u in order:
        if room.fits(units[u]):
            room.take(units[u])
            chosen.append(u)
    room.require_spent()
    return [units[u] for u in sorted(chosen)]


def by_matrix(units: Sequence[Unit], matrix: torch.Tensor, budget: Budget) -> list[Unit]:
    """A set Z with small ``1_Z^T matrix 1_Z``: greedy, then swaps of one chosen for one free unit while that helps.

    Args:
        units: candidates.
        matrix: (U, U), symmetric, positive semi-definite.
        budget: as for ``by_cost``.
    """
    room = _Room(units, budget)
    chosen: list[int] = []
    reach = torch.zeros(len(units), dtype=matrix.dtype)  # matrix @ 1_Z
    diagonal = matrix.diagonal()
    while True:
        growth = (2 * reach + diagonal).tolist()
        free = [u for u in range(len(units)) if u not in chosen and room.fits(units[u])]
        if not free:
            break
        best = min(free, key=lambda u: (growth[u] / len(units[u].heads), u))
        chosen.append(best)
        room.take(units[best])
        reach = reach + matrix[best]
    room.require_spent()
    while swap := _best_swap(units, matrix, chosen, reach, room):
        out, into = swap
        chosen[chosen.index(out)] = into
        room.give_back(units[out])
        room.take(units[into])
        reach = reach - matrix[out] + matrix[into]
    return [units[u] for u in sorted(chosen)]


def _best_swap(
    units: Sequence[Unit], matrix: torch.Tensor, chosen: list[int], reach: torch.Tensor, room: _Room
) -> tuple[int, int] | None:
    """The exchange of equal-sized units that lowers the quadratic form most, or None."""
    tolerance = 1e-12 * max(float(matrix.diagonal().sum()), 1e-300)
    best, found = -tolerance, None
    for out in chosen:
        for into in range(len(units)):
            if into in chosen or len(units[into].heads) != len(units[out].heads):
                continue
            if units[into].layer != units[out].layer and not room.allows(units[into]):
                continue
            change = 2 * (reach[into] - reach[out] - matrix[into, out]) + matrix[into, into] + matrix[out, out]
            if float(change) < best:
                best, found = float(change), (out, into)
    return found


class _Room:
    """What is left of the budget, in all and per layer."""

    def __init__(self, units: Sequence[Unit], budget: Budget) -> None:
        self.left = budget.heads
        self.total = sum(len(unit.heads) for unit in units)
        self.per_layer = Counter[int]()
        for unit in units:
            self.per_layer[unit.layer] += len(unit.heads)
        self.layers = len(self.per_layer)
        self.keep = budget.keep
        self.budget = budget.heads
        self.smallest = min(len(unit.heads) for unit in units)

    def allows(self, unit: Unit) -> bool:
        """Whether the unit's layer keeps enough heads without it."""
        return self.per_layer[unit.layer] - len(unit.heads) >= self.keep

    def fits(self, unit: Unit) -> bool:
        return self.allows(unit) and 2 * self.left >= len(unit.heads) and self.left > 0

    def take(self, unit: Unit) -> None:
        self.left -= len(unit.heads)
        self.per_layer[unit.layer] -= len(unit.heads)

    def give_back(self, unit: Unit) -> None:
        self.left += len(unit.heads)
        self.per_layer[unit.layer] += len(unit.heads)

    def require_spent(self) -> None:
        """Raise PlanError when the budget could not be spent without emptying a layer."""
        if 2 * self.left >= self.smallest and self.left > 0:
            raise PlanError(
                f"{self.budget} of {self.total} query heads should go, but only {self.budget - self.left} can",
                expected=f"at least {self.keep} query head(s) left in each of the {self.layers} layers",
                fix="lower the ratio",
            )
