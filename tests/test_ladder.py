"""Budgets over layers, against trying everything."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from headwise.passes.ladder import Rung, climb, rungs, slopes, step_ends


def ladders_of(seed: int) -> list[list[Rung]]:
    """Three layers with rising costs and rungs of different size."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in (1.0, 2.0, 5.0):
        costs = torch.rand(4, generator=generator).sort().values * size
        found.append([Rung(units=(i,), cost=float(cost), size=size) for i, cost in enumerate(costs)])
    return found


def totals(ladders: list[list[Rung]], taken: tuple[int, ...] | list[int]) -> tuple[float, float]:
    gone = [rung for ladder, count in zip(ladders, taken, strict=True) for rung in ladder[:count]]
    return sum(rung.cost for rung in gone), sum(rung.size for rung in gone)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [3.0, 9.0, 16.0, 27.0])
def test_at_least_the_budget_is_saved_at_little_more_than_the_lowest_cost(seed: int, budget: float) -> None:
    ladders = ladders_of(seed)
    cost, size = totals(ladders, climb(ladders, budget, at_least=True))
    assert size >= budget
    every = [totals(ladders, taken) for taken in product(range(5), repeat=3)]
    best = min(found for found in every if found[1] >= budget)
    dearest = max(rung.cost for ladder in ladders for rung in ladder)
    assert best[0] <= cost <= best[0] + dearest


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1.0, 2.5, 11.0, 20.0])
def test_nothing_that_was_taken_could_be_given_back(seed: int, budget: float) -> None:
    ladders = ladders_of(seed)
    taken = climb(ladders, budget, at_least=True)
    for layer, count in enumerate(taken):
        if count:
            fewer = [n - (i == layer) for i, n in enumerate(taken)]
            assert totals(ladders, fewer)[1] < budget


def test_the_nearest_count_is_taken_where_nothing_has_to_be_reached() -> None:
    ladder = [Rung(units=(i,), cost=float(i), size=8) for i in range(4)]
    assert [climb([ladder], budget, at_least=False)[0] for budget in (0, 3, 4, 11, 12, 100)] == [0, 0, 1, 1, 2, 4]


def test_a_budget_out_of_reach_takes_everything() -> None:
    ladders = ladders_of(0)
    assert climb(ladders, 1e9, at_least=True) == [4, 4, 4]


def test_a_dear_rung_in_front_of_cheap_ones_is_averaged_with_them() -> None:
    ladder = [Rung(units=(i,), cost=cost, size=1) for i, cost in enumerate([3.0, 1.0, 2.0, 7.0])]
    assert slopes(ladder) == [2.0, 2.0, 2.0, 7.0]
    other = [Rung(units=(0,), cost=2.5, size=1)]
    assert climb([ladder, other], 3, at_least=True) == [3, 0]


def test_a_layer_gives_up_its_rungs_in_its_own_order() -> None:
    made = rungs([4, 2, 0, 1], [0.1, 0.2, 0.4, 0.8], [1, 3], lambda gone: 10 * gone)
    assert [(rung.units, rung.size) for rung in made] == [((4,), 10), ((2, 0), 20)]
    assert made[1].cost == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("count", "multiple", "keep", "ends"),
    [(12, 4, 1, [4, 8]), (11, 4, 6, [3]), (5, 1, 3, [1, 2]), (6, 8, 8, []), (8, 8, 1, []), (16, 8, 8, [8])],
)
def test_steps_end_where_a_multiple_is_left(count: int, multiple: int, keep: int, ends: list[int]) -> None:
    assert step_ends(count, multiple, keep) == ends
