"""What it costs when a head uses another one's attention weights: beside least squares on the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from test_stats import language_examples

from headwise.calibration import exchange, stats
from headwise.calibration.exchange import ExchangeSums
from headwise.calibration.stats import Stat, collect
from headwise.model.view import ModelView
from headwise.passes.cluster_heads import ClusterHeadsPass
from headwise.passes.clustering import by_cost

TOKENS, HEADS, WIDTH, MODEL = 400, 3, 4, 10


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, t, N, H): entry j is what all heads give with the weights of head j; (t, N, H) with their own; (D, N, H)."""
    torch.manual_seed(0)
    given = torch.randn(HEADS, TOKENS, HEADS, WIDTH) + 0.5
    own = torch.stack([given[head, :, head] for head in range(HEADS)], dim=1)
    return given, own, torch.randn(MODEL, HEADS, WIDTH)


def summed(given: torch.Tensor, own: torch.Tensor) -> ExchangeSums:
    sums = ExchangeSums(HEADS, WIDTH)
    for half in (slice(0, 150), slice(150, None)):
        for used in range(HEADS):
            sums.add(own[half], used, given[used, half])
    return sums


def least_squares(given: torch.Tensor, own: torch.Tensor, output: torch.Tensor, head: int, used: int) -> float:
    features = own.clone()
    features[:, head] = given[used, :, head]
    x = torch.cat([features.flatten(1), torch.ones(TOKENS, 1)], dim=1).double()
    y = own.flatten(1).double() @ output.flatten(1).T.double()
    return float((x @ torch.linalg.lstsq(x, y).solution - y).square().sum())


def test_the_cost_is_what_least_squares_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_DAMPING", 1e-9)
    given, own, output = drawn()
    cost = summed(given, own).cost(output)
    for head in range(HEADS):
        for used in range(HEADS):
            wanted = least_squares(given, own, output, head, used)
            assert float(cost[head, used]) == pytest.approx(wanted, rel=1e-3, abs=1e-2)


def test_a_head_that_others_can_stand_in_for_is_cheap_after_the_refit_alone() -> None:
    given, own, output = drawn()
    own[:, 2] = own[:, 0] + 0.1 * own[:, 2]
    given[2, :, 2] = own[:, 2]
    cost = summed(given, own).cost(output)

    def before(head: int, used: int) -> float:
        return float(((given[used, :, head] - own[:, head]) @ output[:, head].T).square().sum())

    assert float(cost[2, 1]) < 0.05 * before(2, 1)
    assert float(cost[1, 2]) > 0.2 * before(1, 2)
    assert not cost.diagonal().any()


def test_a_head_with_equal_weights_costs_nothing_and_is_taken_first() -> None:
    given, own, output = drawn()
    given[1, :, 0] = own[:, 0]
    cost = summed(given, own).cost(output)
    assert float(cost[0, 1]) < 1e-2 * float(cost[1, 0])
    assert by_cost(cost, 2) in ([[1, 0], [2]], [[0, 2], [1]])


def test_products_that_do_not_fit_fall_back_to_the_cost_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = language_examples(view)
    before = collect(view, task, examples, {Stat.EXCHANGE_COST})[Stat.EXCHANGE_COST]
    repaired = collect(view, task, examples, {Stat.REPAIRED_COST})[Stat.REPAIRED_COST]
    assert not torch.allclose(before[0], repaired[0])
    monkeypatch.setattr(stats, "LARGEST", 0)
    fallen = collect(view, task, examples, {Stat.REPAIRED_COST})[Stat.REPAIRED_COST]
    assert torch.equal(before[0], fallen[0])


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"clusters": 2}, {Stat.REPAIRED_COST}),
        ({"clusters": 2, "refit": False}, {Stat.EXCHANGE_COST}),
        ({"clusters": 2, "affinity": "maps"}, {Stat.MAP_SIMILARITY}),
        ({"clusters": "elbow", "affinity": "maps"}, {Stat.MAP_SIMILARITY, Stat.REPAIRED_COST}),
        ({"ratio": 0.5, "affinity": "maps"}, {Stat.MAP_SIMILARITY, Stat.REPAIRED_COST}),
    ],
)
def test_only_what_decides_is_collected(options: dict[str, object], needed: set[Stat]) -> None:
    assert ClusterHeadsPass.model_validate(options).needs() == needed
