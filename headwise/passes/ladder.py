"""Spend a budget over layers: each layer gives up its units in its own order, and the cheapest step goes next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of a layer: units that go together.

    Attributes:
        units: what goes, in the layer's own numbering.
        cost: what that costs, behind the rungs before it.
        size: what that saves, in the unit of the budget.
    """

    units: tuple[int, ...]
    cost: float
    size: float


Ladder = Sequence[Rung]
"""The steps of one layer, in the order in which they have to be taken."""


def step_ends(count: int, multiple: int, keep: int) -> list[int]:
    """After how many removed units a layer may stop, so that a multiple of ``multiple`` and at least ``keep`` stay.

    >>> step_ends(12, 4, 1)
    [4, 8]
    >>> step_ends(11, 4, 6)
    [3]
    """
    return [gone for gone in range(1, count) if (count - gone) % multiple == 0 and count - gone >= keep]


def rungs(
    order: Sequence[int], costs: Sequence[float], ends: Sequence[int], saved: Callable[[int], float]
) -> list[Rung]:
    """Steps of units.

    Args:
        order: units in the order in which they go.
        costs: of these units, in the same order.
        ends: see ``step_ends``.
        saved: what a layer saves without so many units, never falling.
    """
    starts = [0, *ends]
    return [
        Rung(units=tuple(order[a:b]), cost=sum(costs[a:b]), size=saved(b) - saved(a))
        for a, b in zip(starts, ends, strict=False)
    ]


def slopes(ladder: Ladder) -> list[float]:
    """Cost per saved unit of every rung, never falling: a dear rung in front of cheap ones is averaged with them.

    Infinite at the end of a ladder where nothing more is saved.

    These are the slopes of the lower convex hull of the cumulative cost, so that taking rungs of all layers in the
    order of their slopes is the best that can be done for every budget at which a segment of the hull ends.
    """
    segments: list[list[float]] = []
    for rung in ladder:
        segments.append([rung.cost, rung.size, 1])
        while len(segments) > 1 and segments[-2][0] * segments[-1][1] >= segments[-1][0] * segments[-2][1]:
            cost, size, count = segments.pop()
            segments[-1] = [segments[-1][0] + cost, segments[-1][1] + size, segments[-1][2] + count]
    return [cost / size if size > 0 else inf for cost, size, count in segments for _ in range(int(count))]


def climb(ladders: Sequence[Ladder], budget: float, *, at_least: bool) -> list[int]:
    """How many rungs of every ladder to take.

    Args:
        ladders: one per layer.
        budget: what has to be saved.
        at_least: save no less than the budget, and of the ways to do so one that overshoots little; otherwise come as
            near to the budget as a step allows, from either side.

    Returns:
        Rungs taken per ladder; all of them where the budget cannot be reached.
    """
    order = sorted(
        (slope, layer, position)
        for layer, ladder in enumerate(ladders)
        for position, slope in enumerate(slopes(ladder))
    )
    taken = [0] * len(ladders)
    left = budget
    for _, layer, position in order:
        size = ladders[layer][position].size
        if left <= 0 or (not at_least and 2 * left < size):
            if at_least:
                break
            continue
        if position == taken[layer]:
            taken[layer] += 1
            left -= size
    if at_least:
        _give_back(ladders, taken, -left)
    return taken


def _give_back(ladders: Sequence[Ladder], taken: list[int], spare: float) -> None:
    """Return the dearest last rungs for which there is room: the step that reached the budget may overshoot it."""
    while True:
        tops = [(ladders[i][count - 1], i) for i, count in enumerate(taken) if count]
        fitting = [(rung.cost, i) for rung, i in tops if rung.size <= spare]
        if not fitting:
            return
        _, layer = max(fitting)
        taken[layer] -= 1
        spare -= ladders[layer][taken[layer]].size
