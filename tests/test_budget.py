"""Budgets: what stays as it is, from prices and from measured drops."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from headwise.calibration.tasks import Examples, FidelityOptions, RegressionOptions, make_task
from headwise.errors import PlanError
from headwise.gates.drift import drift
from headwise.gates.measure import Predictions
from headwise.passes.budget import Budget, Offer, left_alone

DROPS = {"a": 3.0, "b": 0.1, "c": 0.5, "d": -0.05, "e": 0.5}
SAVED = {"a": 100, "b": 100, "c": 400, "d": 50, "e": 100}
OFFERS = [Offer(name=name, drop=DROPS[name], saved=SAVED[name]) for name in DROPS]
"""By price: a, e, c, b, d."""


def never(names: Collection[str]) -> float:
    raise AssertionError("a size needs no measurement")


def test_a_size_is_filled_with_what_is_dearest() -> None:
    total = 1000
    for room, kept in ((0, ""), (99, ""), (100, "a"), (200, "ae"), (300, "abe"), (600, "ace"), (750, "abce")):
        found = left_alone(OFFERS, Budget(size=(total + room) / 1e6), total=total, measure=never)
        assert found == set(kept), room
    with pytest.raises(PlanError, match=r"all matrices in the format of the recipe are 0\.00 MB"):
        left_alone(OFFERS, Budget(size=999 / 1e6), total=total, measure=never)


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(10.0, ""), (4.1, ""), (3.0, "a"), (0.7, "ae"), (0.6, "ae"), (0.5, "aec"), (0.05, "aec"), (0.0, "aecb")],
)
def test_a_drop_is_measured_and_the_fewest_stay(limit: float, kept: str) -> None:
    asked: list[int] = []

    def measure(names: Collection[str]) -> float:
        asked.append(len(names))
        return sum(DROPS[name] for name in names)

    assert left_alone(OFFERS, Budget(max_drop=limit), total=0, measure=measure) == set(kept)
    assert len(asked) <= 3


def test_what_adds_up_to_more_than_its_parts_is_noticed() -> None:
    """No matrix costs anything alone, all together they do."""
    offers = [Offer(name=name, drop=0.0, saved=10) for name in "abcdefgh"]
    kept = left_alone(offers, Budget(max_drop=1), total=0, measure=lambda names: 0.3 * len(names))
    assert len(kept) == 5


def test_one_limit_and_not_two() -> None:
    for wrong in ({}, {"max_drop": 1, "size": 1}):
        with pytest.raises(ValueError, match="give either max_drop or size"):
            Budget.model_validate(wrong)


def predictions(**values: Any) -> Predictions:
    return Predictions(values={name: np.asarray(array) for name, array in values.items()})


def test_drift_needs_no_labels_but_something_to_compare() -> None:
    options = RegressionOptions.model_validate({"type": "regression", "metric": "mse", "data": {"path": "x.npz"}})
    task = make_task(options)
    rows = [{"x": np.zeros(2)} for _ in range(3)]
    samples = Examples.of(rows, source="made up")
    values = predictions(**{name: np.ones((3, 1)) for name in task.outputs})
    with pytest.raises(PlanError, match="cannot be compared without labels"):
        drift(task, samples, values, values)
    vectors = predictions(pooled=np.eye(3))
    turned = predictions(pooled=np.eye(3) + 0.1)
    without = FidelityOptions.model_validate({"data": {"path": "x.npz"}})
    found, metric = drift(make_task(without), samples, vectors, turned)
    assert metric == "fidelity"
    assert 0 < found < 5
