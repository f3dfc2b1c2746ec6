"""Selection under a budget, against exhaustive search where that is possible."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from headwise.errors import PlanError
from headwise.passes.select import Budget, Unit, by_cost, by_matrix


def units(layers: int, per_layer: int, size: int = 1) -> list[Unit]:
    found = []
    for layer in range(layers):
        for u in range(per_layer):
            heads = tuple(range(u * size, (u + 1) * size))
            offset = layer * per_layer * size
            found.append(Unit(layer=layer, heads=heads, index=tuple(offset + head for head in heads)))
    return found


def test_the_cheapest_go_first() -> None:
    candidates = units(2, 3)
    chosen = by_cost(candidates, [5, 1, 4, 2, 6, 3], Budget(heads=3, keep=1))
    assert [(u.layer, u.heads[0]) for u in chosen] == [(0, 1), (1, 0), (1, 2)]


def test_no_layer_is_emptied_however_cheap() -> None:
    chosen = by_cost(units(2, 3), [0, 0, 0, 9, 9, 9], Budget(heads=3, keep=1))
    assert [u.layer for u in chosen] == [0, 0, 1]


def test_equal_costs_give_the_same_choice_every_time() -> None:
    candidates = units(3, 4)
    assert by_cost(candidates, [1.0] * 12, Budget(heads=5, keep=1)) == by_cost(
        candidates, [1.0] * 12, Budget(heads=5, keep=1)
    )


@pytest.mark.parametrize(("heads", "taken"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_whole_units_are_rounded_to_the_nearest_count(heads: int, taken: int) -> None:
    candidates = units(2, 4, size=2)
    assert len(by_cost(candidates, list(range(8)), Budget(heads=heads, keep=2))) == taken


def test_a_budget_that_would_empty_a_layer_is_refused() -> None:
    with pytest.raises(PlanError, match=r"8 of 8 query heads should go, but only 6 can"):
        by_cost(units(2, 4), [1.0] * 8, Budget(heads=8, keep=1))
    with pytest.raises(PlanError, match="only 6 can"):
        by_matrix(units(2, 4), torch.eye(8), Budget(heads=7, keep=1))


@pytest.mark.parametrize("seed", range(6))
def test_greedy_with_swaps_is_near_the_best_set(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T
    candidates = units(1, 10)

    def value(chosen: tuple[int, ...]) -> float:
        mask = torch.zeros(10, dtype=torch.float64)
        mask[list(chosen)] = 1
        return float(mask @ matrix @ mask)

    found = value(tuple(u.index[0] for u in by_matrix(candidates, matrix, Budget(heads=5, keep=1))))
    every = sorted(value(subset) for subset in combinations(range(10), 5))
    assert found <= every[len(every) // 20], "not among the best twentieth"
    diagonal = tuple(int(i) for i in matrix.diagonal().argsort()[:5])
    assert found <= value(diagonal)


def test_the_matrix_sees_heads_that_stand_in_for_each_other() -> None:
    """Removing one of two equal heads is cheap, removing both is not: single costs cannot tell."""
    jacobian = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.3], [0.0, 1.3 + 1e-3]], dtype=torch.float64)
    chosen = by_matrix(units(1, 4), jacobian @ jacobian.T, Budget(heads=2, keep=1))
    assert {u.index[0] for u in chosen} == {0, 2} or len({u.index[0] // 2 for u in chosen}) == 2


def test_swaps_respect_the_last_head_of_a_layer() -> None:
    matrix = torch.diag(torch.tensor([5.0, 6.0, 0.1, 0.2], dtype=torch.float64))
    chosen = by_matrix(units(2, 2), matrix, Budget(heads=2, keep=1))
    assert sorted(u.layer for u in chosen) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("multiple", "heads"), [(2, 10), (3, 12), (4, 12)])
def test_every_layer_keeps_a_multiple(seed: int, multiple: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(36, 20, generator=generator, dtype=torch.float64)
    budget = Budget(heads=heads, keep=1, multiple=multiple)
    for chosen in (
        by_matrix(units(3, 12), factor @ factor.T, budget),
        by_cost(units(3, 12), factor.square().sum(1).tolist(), budget),
    ):
        assert len(chosen) == heads
        assert all((12 - sum(u.layer == layer for u in chosen)) % multiple == 0 for layer in range(3))


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_near_the_best_counts_and_heads(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T

    def value(chosen: tuple[int, ...]) -> float:
        return float(matrix[list(chosen)][:, list(chosen)].sum())

    found = value(tuple(u.index[0] for u in by_matrix(units(2, 4), matrix, Budget(heads=2, keep=1, multiple=2))))
    pairs = [pair for pair in combinations(range(8), 2) if pair[0] // 4 == pair[1] // 4]
    assert found <= sorted(map(value, pairs))[2]


def test_a_layer_between_two_multiples_goes_down_to_the_next_one() -> None:
    candidates = [*units(1, 5), *[Unit(layer=1, heads=(h,), index=(5 + h,)) for h in range(4)]]
    costs = [9.0] * 5 + [1.0] * 4
    chosen = by_cost(candidates, costs, Budget(heads=3, keep=1, multiple=2))
    assert [u.layer for u in chosen] == [0, 1, 1]


def test_a_multiple_that_kv_groups_cannot_make_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 0 cannot keep a multiple of 3 of its 8 query heads"):
        by_cost(units(1, 2, size=4), [1.0, 2.0], Budget(heads=4, keep=1, multiple=3))
    with pytest.raises(PlanError, match="10 of 12 query heads should go, but only 6 can"):
        by_cost(units(1, 12), [1.0] * 12, Budget(heads=10, keep=5, multiple=6))
