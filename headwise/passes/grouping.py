"""Partition heads into groups of one size: neighbours, or those that cost least together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch

_RESTARTS = 30
_SWAPS = 600
_JUDGED = 500
"""Groups of more than two that are looked at as a whole, at most."""

Cost = Callable[[Sequence[int]], float]
"""What a group of positions, in ascending order, costs."""


def adjacent(count: int, groups: int) -> list[list[int]]:
    """Neighbouring positions, as grouped-query conversion is usually done."""
    size = count // groups
    return [list(range(start, start + size)) for start in range(0, count, size)]


def cheapest(cost: Cost, count: int, groups: int, seed: int) -> list[list[int]]:
    """A partition with a small sum of costs, never larger than that of the neighbours.

    The costs of pairs, which are few, lead to a first partition. Groups of more than two are then judged as a whole:
    heads of two groups change places as long as that makes both together cheaper.

    Args:
        cost: see ``Cost``.
        count: number of heads.
        groups: number of groups; divides ``count``.
        seed: of starts and swaps.

    Returns:
        Groups of positions, each ascending, ordered by their first member.
    """
    neighbours = adjacent(count, groups)
    if groups in (1, count):
        return neighbours
    costs = [[0.0] * count for _ in range(count)]
    for i, j in combinations(range(count), 2):
        costs[i][j] = costs[j][i] = cost([i, j])
    paired = _by_pairs(costs, groups, seed)
    if count == 2 * groups:
        return paired
    judged = _Judged(cost)
    return min((judged.improved(start) for start in (paired, neighbours)), key=judged.total)


class _Judged:
    """Costs of whole groups, each looked at once; past the limit only known groups are compared."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, group: Sequence[int]) -> float:
        key = tuple(sorted(group))
        if key not in self.known:
            self.known[key] = self.cost(key)
        return self.known[key]

    def total(self, partition: Sequence[Sequence[int]]) -> float:
        return sum(map(self, partition))

    def improved(self, partition: Sequence[Sequence[int]]) -> list[list[int]]:
        """Swap members of two groups until no swap helps, or until enough groups were looked at."""
        groups = [list(group) for group in partition]
        limit = len(self.known) + _JUDGED // 2
        better = True
        while better:
            better = False
            for left, right in combinations(range(len(groups)), 2):
                for one, other in _swapped(groups[left], groups[right]):
                    if len(self.known) >= limit and not self.known.keys() >= {tuple(one), tuple(other)}:
                        continue
                    if self(one) + self(other) < self(groups[left]) + self(groups[right]) - 1e-12:
                        groups[left], groups[right], better = one, other, True
                        break
        return sorted(groups)


def _swapped(left: list[int], right: list[int]) -> list[tuple[list[int], list[int]]]:
    """The two groups after every exchange of one member."""
    return [(sorted({*left} - {a} | {b}), sorted({*right} - {b} | {a})) for a in left for b in right]


def _by_pairs(costs: list[list[float]], groups: int, seed: int) -> list[list[int]]:
    """The best partition by sums of pair costs, by random swaps from several starts; the neighbours are one of them."""
    count = len(costs)
    size = count // groups
    generator = torch.Generator().manual_seed(seed)
    best, lowest = list(range(count)), _total(costs, list(range(count)), size)
    for restart in range(_RESTARTS):
        order = list(range(count)) if restart == 0 else torch.randperm(count, generator=generator).tolist()
        total = _total(costs, order, size)
        for left, right in torch.randint(count, (_SWAPS, 2), generator=generator).tolist():
            change = _change(costs, order, size, left, right)
            if change < 0:
                order[left], order[right] = order[right], order[left]
                total += change
        if total < lowest - 1e-12:
            best, lowest = list(order), total
    return sorted(sorted(best[start : start + size]) for start in range(0, count, size))


def _total(costs: list[list[float]], order: list[int], size: int) -> float:
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(costs[a][b] for block in blocks for a, b in combinations(block, 2))


def _change(costs: list[list[float]], order: list[int], size: int, left: int, right: int) -> float:
    """How the total changes when two positions are exchanged."""
    if left // size == right // size:
        return 0.0
    a, b = order[left], order[right]
    with_a = [order[i] for i in _block(left, size) if i != left]
    with_b = [order[i] for i in _block(right, size) if i != right]
    return sum(costs[b][i] - costs[a][i] for i in with_a) + sum(costs[a][i] - costs[b][i] for i in with_b)


def _block(position: int, size: int) -> range:
    start = position // size * size
    return range(start, start + size)
