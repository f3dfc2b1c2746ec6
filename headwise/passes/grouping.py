"""Partition heads into groups of one size: neighbours, or those that cost least together."""

from __future__ import annotations

import torch

_RESTARTS = 30
_SWAPS = 600


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
    generator = torch.Generator().manual_seed(seed)
    best, lowest = list(range(count)), _cost(costs, list(range(count)), size)
    for restart in range(_RESTARTS if 1 < groups < count else 0):
        order = list(range(count)) if restart == 0 else torch.randperm(count, generator=generator).tolist()
        total = _cost(costs, order, size)
        for left, right in torch.randint(count, (_SWAPS, 2), generator=generator).tolist():
            change = _swap_gain(costs, order, size, left, right)
            if change < 0:
                order[left], order[right] = order[right], order[left]
                total += change
        if total < lowest - 1e-12:
            best, lowest = list(order), total
    found = [sorted(best[start : start + size]) for start in range(0, count, size)]
    return sorted(found)


def _cost(costs: torch.Tensor, order: list[int], size: int) -> float:
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(float(costs[block][:, block].sum() - costs[block, block].sum()) / 2 for block in blocks)


def _swap_gain(costs: torch.Tensor, order: list[int], size: int, left: int, right: int) -> float:
    """How the total changes when two positions are exchanged."""
    if left // size == right // size:
        return 0.0
    a, b = order[left], order[right]
    with_a = [order[i] for i in _block(left, size) if i != left]
    with_b = [order[i] for i in _block(right, size) if i != right]
    after = costs[b, with_a].sum() + costs[a, with_b].sum()
    before = costs[a, with_a].sum() + costs[b, with_b].sum()
    return float(after - before)


def _block(position: int, size: int) -> range:
    start = position // size * size
    return range(start, start + size)
