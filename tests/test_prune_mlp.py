"""prune-mlp: which neurons go, that nothing else does, and what it says where it cannot be done."""

from __future__ import annotations

import pytest
from conftest import make_model
from test_passes import samples

from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.prune_mlp import PruneMlp
from headwise.tolerances import TWIN


def test_contract(family: str) -> None:
    view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(view, family)
    pass_ = PruneMlp(ratio=0.5)
    first, _ = make_plan(pass_, view, task, examples)
    record = run_pass(pass_, view, teacher, task, examples)
    assert record.plan == first
    assert record.after == first.predict(record.before) == view.layout
    assert record.after.attention == record.before.attention
    assert record.twin_error <= TWIN
    assert record.refit
    assert all(fit["part"] == "mlp" and fit["after"] <= fit["before"] for fit in record.refit)
    left = sum(len(mlp.neurons) for mlp in record.after.mlp)
    assert left == sum(len(mlp.neurons) for mlp in record.before.mlp) // 2


@pytest.mark.parametrize("score", ["gauss-newton", "contribution", "weight-norm", "random"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_every_score_and_scope_removes_what_was_asked_for(score: str, scope: str) -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    plan, _ = make_plan(PruneMlp.model_validate({"ratio": 0.5, "score": score, "scope": scope}), view, task, examples)
    left = [len(mlp.neurons) for mlp in plan.predict(view.layout).mlp]
    assert sum(left) == 72
    assert all(count % 8 == 0 for count in left)
    if scope == "layer":
        assert left == [24, 24, 24]
