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
        multiple: per layer, the query heads that stay are a multiple of this.
    """

    heads: int
    keep: int
    multiple: int = 1


def by_cost(units: Sequence[Unit], costs: Sequence[float], budget: Budget) -> list[Unit]:
    """The cheapest units per head. Ties go to the earlier layer and head, so that equal inputs give equal plans."""
    if budget.multiple > 1:
        return by_steps(units, torch.diag(torch.tensor(costs, dtype=torch.float64)), budget)
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
    if budget.multiple > 1:
        return by_steps(units, matrix, budget)
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
    return _improved(units, matrix, chosen, room, across=True)


def by_steps(units: Sequence[Unit], matrix: torch.Tensor, budget: Budget) -> list[Unit]:
    """Like ``by_matrix``, in steps after each of which a layer keeps a multiple of ``budget.multiple`` query heads.

    Layers that start between two multiples take their first step whatever it costs.

    Raises:
        PlanError: a layer cannot keep such a multiple, or the budget cannot be spent.
    """
    room = _Room(units, budget)
    chosen: list[int] = []
    for layer, count in sorted(room.per_layer.items()):
        if count % budget.multiple:
            step = _step(units, matrix, chosen, room, layer)
            if not step:
                raise PlanError(
                    f"layer {layer} cannot keep a multiple of {budget.multiple} of its {count} query heads",
                    expected=f"a multiple that leaves at least {budget.keep}, in units of whole kv groups",
                    fix="choose a smaller round_to",
                )
            chosen += _taken(units, room, step)
    smallest = room.left + 1
    while True:
        steps = [step for layer in room.per_layer if (step := _step(units, matrix, chosen, room, layer))]
        sizes = [sum(len(units[u].heads) for u in step) for step in steps]
        smallest = min([smallest, *sizes])
        fitting = [i for i, size in enumerate(sizes) if 2 * room.left >= size and room.left > 0]
        if not fitting:
            break
        best = min(fitting, key=lambda i: (_growth(matrix, chosen, steps[i]) / sizes[i], steps[i]))
        chosen += _taken(units, room, steps[best])
    room.require_spent(smallest)
    return _improved(units, matrix, chosen, room, across=False)


def _step(units: Sequence[Unit], matrix: torch.Tensor, chosen: list[int], room: _Room, layer: int) -> list[int]:
    """The units that go next from a layer so that it keeps a multiple, found one by one; empty where none can go."""
    step: list[int] = []
    count = room.per_layer[layer]
    while not step or count % room.multiple:
        free = [u for u, unit in enumerate(units) if unit.layer == layer and u not in chosen and u not in step]
        free = [u for u in free if count - len(units[u].heads) >= max(room.keep, 1)]
        if not free:
            return []
        step.append(min(free, key=lambda u: (_growth(matrix, chosen, [*step, u]) / len(units[u].heads), u)))
        count -= len(units[step[-1]].heads)
    return step


def _growth(matrix: torch.Tensor, chosen: list[int], more: list[int]) -> float:
    """What the quadratic form gains when more units join the chosen ones."""
    return float(2 * matrix[chosen][:, more].sum() + matrix[more][:, more].sum())


def _taken(units: Sequence[Unit], room: _Room, step: list[int]) -> list[int]:
    for u in step:
        room.take(units[u])
    return step


def _improved(
    units: Sequence[Unit], matrix: torch.Tensor, chosen: list[int], room: _Room, *, across: bool
) -> list[Unit]:
    """Swap one chosen for one free unit while that helps; ``across`` layers, or within them."""
    reach = matrix[chosen].sum(0)
    while swap := _best_swap(units, matrix, chosen, reach, room, across=across):
        out, into = swap
        chosen[chosen.index(out)] = into
        room.give_back(units[out])
        room.take(units[into])
        reach = reach - matrix[out] + matrix[into]
    return [units[u] for u in sorted(chosen)]


def _best_swap(
    units: Sequence[Unit], matrix: torch.Tensor, chosen: list[int], reach: torch.Tensor, room: _Room, *, across: bool
) -> tuple[int, int] | None:
    """The exchange of equal-sized units that lowers the quadratic form most, or None."""
    tolerance = 1e-12 * max(float(matrix.diagonal().sum()), 1e-300)
    best, found = -tolerance, None
    for out in chosen:
        for into in range(len(units)):
            if into in chosen or len(units[into].heads) != len(units[out].heads):
                continue
            if units[into].layer != units[out].layer and not (across and room.allows(units[into])):
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
        self.multiple = budget.multiple
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

    def require_spent(self, smallest: int | None = None) -> None:
        """Raise PlanError when the budget could not be spent without emptying a layer."""
        if 2 * self.left >= (smallest or self.smallest) and self.left > 0:
            raise PlanError(
                f"{self.budget} of {self.total} query heads should go, but only {self.budget - self.left} can",
                expected=f"at least {self.keep} query head(s) left in each of the {self.layers} layers",
                fix="lower the ratio",
            )
