"""prune-mlp: which neurons go, that nothing else does, and what it says where it cannot be done."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from pydantic import ValidationError
from test_passes import samples
from test_stats import classifier_examples

from headwise.calibration.tasks import Examples
from headwise.errors import PlanError
from headwise.model.edits import DropNeurons
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.prune_mlp import PruneMlp


def test_neurons_go_and_heads_stay() -> None:
    view, teacher = (ModelView.of(make_model("llama")) for _ in range(2))
    task, examples = samples(view, "llama")
    record = run_pass(PruneMlp(ratio=0.5), view, teacher, task, examples)
    assert record.after.attention == record.before.attention
    assert {fit["part"] for fit in record.refit} == {"mlp"}
    assert sum(len(mlp.neurons) for mlp in record.after.mlp) == 72


@pytest.mark.parametrize("score", ["reconstruction", "gauss-newton", "contribution", "weight-norm", "random"])
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


@pytest.mark.parametrize("score", ["reconstruction", "gauss-newton", "contribution", "weight-norm"])
def test_neurons_that_add_nothing_go_first(score: str) -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = samples(view, "torch")
    view.mlp[1].read().down[:, 8:16] = 0.0
    pass_ = PruneMlp.model_validate({"ratio": 1 / 18, "score": score})
    plan, _ = make_plan(pass_, view, task, examples)
    assert plan.edits == (DropNeurons(layer=1, neurons=tuple(range(8, 16))),)


def test_fisher_needs_labels_and_ranks_by_the_loss() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, 30)
    plan, _ = make_plan(PruneMlp(ratio=0.5, score="fisher"), view, task, examples)
    assert sum(len(mlp.neurons) for mlp in plan.predict(view.layout).mlp) == 72
    unlabelled = Examples.of(examples.rows, source="x", facts=examples.facts)
    with pytest.raises(PlanError, match="no labels"):
        make_plan(PruneMlp(ratio=0.5, score="fisher"), view, task, unlabelled)


@pytest.mark.parametrize(("widths", "left"), [(16, [16, 16, 16]), ((48, 9, 100), [48, 9, 48])])
def test_widths_say_what_every_mlp_keeps(widths: object, left: list[int]) -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = samples(view, "torch")
    plan, _ = make_plan(PruneMlp.model_validate({"widths": widths}), view, task, examples)
    assert [len(mlp.neurons) for mlp in plan.predict(view.layout).mlp] == left


def test_a_plan_says_what_share_of_the_score_goes() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = samples(view, "torch")
    plan, _ = make_plan(PruneMlp(widths=(48, 24, 48)), view, task, examples)
    assert plan.mlp_notes.keys() == {1}
    share = float(plan.mlp_notes[1].partition(" %")[0])
    assert 0 < share < 50, "half of the neurons, and the better half stayed"
    assert plan.mlp_notes[1].endswith("of the gauss-newton score of its neurons")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either ratio or widths"),
        ({"ratio": 0.5, "widths": 8}, "give either ratio or widths"),
        ({"widths": (8, 0, 8)}, "every MLP keeps at least one neuron"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneMlp.model_validate(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8)}, "widths has 2 entries\n  expected: one per MLP: 3"),
        ({"ratio": 0.01}, "no MLP would lose a neuron"),
        ({"widths": 48}, "no MLP would lose a neuron"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, object], message: str) -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = samples(view, "torch")
    with pytest.raises(PlanError, match=message):
        make_plan(PruneMlp.model_validate({**options, "score": "weight-norm"}), view, task, examples)


def test_a_model_without_mlps_is_refused() -> None:
    whole = ModelView.of(make_model("torch"))
    task, examples = samples(whole, "torch")
    view = ModelView(whole.module, whole.attention)
    with pytest.raises(PlanError, match="no block of this model has an MLP that headwise knows"):
        make_plan(PruneMlp(ratio=0.5, score="weight-norm", fold_mean=False), view, task, examples)


def test_the_mean_of_removed_neurons_is_folded_where_there_is_a_bias() -> None:
    for family, has_bias in (("torch", True), ("llama", False)):
        view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
        task, examples = samples(view, family)
        run_pass(PruneMlp(ratio=0.5, refit=False), view, teacher, task, examples)
        (_, ours), (_, theirs) = view.mlp[0].linear(), teacher.mlp[0].linear()
        assert (ours is not None) == has_bias
        if ours is not None and theirs is not None:
            assert not torch.allclose(ours, theirs)
