"""Partition heads into groups of one size: neighbours, or those that cost least together."""

from __future__ import annotations

from itertools import combinations

import torch

_RESTARTS = 30
_SWAPS = 600

Table = list[list[float]]


def adjacent(count: int, groups: int) -> list[list[int]]:
    """Neighbouring positions, as grouped-query conversion is usually done."""
    size = count // groups
    return [list(range(start, start + size)) for start in range(0, count, size)]


def cheapest(costs: torch.Tensor, groups: int, seed: int) -> list[list[int]]:
    """A partition with small sums of pairwise costs inside its groups, by random swaps from several starts.

    Args:
        costs: (K, K) symmetric, cost of two heads in one group.
        groups: number of groups; divides K.
        seed: of starts and swaps; the neighbours are one of the starts, so that the result is never worse.

    Returns:
        Groups of positions, each ascending, ordered by their first member.
    """
    count = len(costs)
    size = count // groups
    table: Table = costs.tolist()  # thousands of small sums: numbers are far faster than tensors here
    generator = torch.Generator().manual_seed(seed)
    best, lowest = list(range(count)), _cost(table, list(range(count)), size)
    for restart in range(_RESTARTS if 1 < groups < count else 0):
        order = list(range(count)) if restart == 0 else torch.randperm(count, generator=generator).tolist()
        total = _cost(table, order, size)
        for left, right in torch.randint(count, (_SWAPS, 2), generator=generator).tolist():
            change = _swap_gain(table, order, size, left, right)
            if change < 0:
                order[left], order[right] = order[right], order[left]
                total += change
        if total < lowest - 1e-12:
            best, lowest = list(order), total
    found = [sorted(best[start : start + size]) for start in range(0, count, size)]
    return sorted(found)


def _cost(costs: Table, order: list[int], size: int) -> float:
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(costs[a][b] for block in blocks for a, b in combinations(block, 2))


def _swap_gain(costs: Table, order: list[int], size: int, left: int, right: int) -> float:
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
