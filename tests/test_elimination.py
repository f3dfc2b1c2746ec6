"""The order in which units go: against least squares done for every set, the slow and obvious way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from headwise.passes import elimination
from headwise.passes.elimination import by_growth, by_reconstruction, cheapest_first

TOKENS, WIDTH, FEATURES = 400, 5, 12


class Layer:
    """Correlated features with a mean, a projection, and how much its output matters."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.features = draw(TOKENS, FEATURES) @ draw(FEATURES, FEATURES) + 3 * draw(FEATURES)
        self.weight, factor = draw(WIDTH, FEATURES), draw(WIDTH, WIDTH)
        self.curvature = factor @ factor.T
        ones = torch.cat([self.features, torch.ones(TOKENS, 1, dtype=torch.float64)], dim=1)
        self.moment = ones.T @ ones / TOKENS

    def error(self, gone: Sequence[int], *, biased: bool) -> float:
        """What is left, mean over tokens and weighted, after a least-squares fit with the other features."""
        left = [feature for feature in range(FEATURES) if feature not in gone]
        known = self.features[:, left]
        if biased:
            known = torch.cat([known, torch.ones(TOKENS, 1, dtype=torch.float64)], dim=1)
        target = self.features @ self.weight.T
        rest = target - known @ torch.linalg.lstsq(known, target).solution
        return float(torch.einsum("td,de,te->", rest, self.curvature, rest)) / TOKENS


@pytest.fixture(autouse=True)
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "DAMPING", 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("width", [1, 3])
def test_costs_are_the_growth_of_the_error_after_a_refit(seed: int, biased: bool, width: int) -> None:
    layer = Layer(seed)
    units = [list(range(start, start + width)) for start in range(0, FEATURES, width)]
    order = by_reconstruction(layer.moment, layer.weight, layer.curvature, units, biased=biased)
    assert sorted(order.units) == list(range(len(units)))
    gone: list[int] = []
    total = 0.0
    for unit, cost in zip(order.units[:-1], order.costs[:-1], strict=True):
        rivals = [u for u in order.units if not set(units[u]) & set(gone)]
        best = min(rivals, key=lambda u: layer.error([*gone, *units[u]], biased=biased))
        assert unit == best, "another unit would have cost less"
        gone += units[unit]
        total += cost
        assert total == pytest.approx(layer.error(gone, biased=biased), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_units_that_go_together_cost_what_they_cost_together(seed: int) -> None:
    layer = Layer(seed)
    units = [[feature] for feature in range(FEATURES)]
    order = by_reconstruction(layer.moment, layer.weight, layer.curvature, units, biased=True, at_once=4)
    for count in (4, 8):
        assert sum(order.costs[:count]) == pytest.approx(layer.error(order.units[:count], biased=True), rel=1e-5)


def test_a_unit_that_others_can_replace_goes_first() -> None:
    """By itself it writes most; only a fit sees that nothing would be lost."""
    layer = Layer(0)
    layer.features[:, 7] = layer.features[:, 2] - 2 * layer.features[:, 5]
    layer.weight[:, 7] *= 100
    ones = torch.cat([layer.features, torch.ones(TOKENS, 1, dtype=torch.float64)], dim=1)
    units = [[feature] for feature in range(FEATURES)]
    order = by_reconstruction(ones.T @ ones / TOKENS, layer.weight, layer.curvature, units, biased=True)
    assert order.units[0] in (2, 5, 7)
    assert order.costs[0] < 1e-6 * order.costs[1]


def test_directions_that_nothing_depends_on_cost_nothing() -> None:
    layer = Layer(0)
    layer.curvature = torch.diag(torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))
    layer.weight[0, 3] = 0.0
    units = [[feature] for feature in range(FEATURES)]
    order = by_reconstruction(layer.moment, layer.weight, layer.curvature, units, biased=True)
    assert order.units[0] == 3
    assert order.costs[0] < 1e-9 * order.costs[1]


def test_a_layer_that_nothing_depends_on_has_an_order_all_the_same() -> None:
    layer = Layer(0)
    zero = torch.zeros_like(layer.curvature)
    order = by_reconstruction(layer.moment, layer.weight, zero, [[f] for f in range(FEATURES)], biased=True, at_once=5)
    assert sorted(order.units) == list(range(FEATURES))
    assert order.costs == (0.0,) * FEATURES


@pytest.mark.parametrize("seed", range(3))
def test_growth_adds_up_to_the_quadratic_form(seed: int) -> None:
    factor = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = factor @ factor.T
    order = by_growth(matrix)
    for count in range(1, 7):
        chosen = list(order.units[:count])
        assert sum(order.costs[:count]) == pytest.approx(float(matrix[chosen][:, chosen].sum()))
    assert order.units[0] == int(matrix.diagonal().argmin())


def test_ties_keep_the_order_of_storage() -> None:
    assert cheapest_first(torch.tensor([2.0, 1.0, 1.0])).units == (1, 2, 0)
    assert by_growth(torch.eye(3)).units == (0, 1, 2)
