"""The contract of every pass on every family: it plans the same thing twice, lands where it said, and is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DECODERS, HEADS, LAYERS, MODELS, NORMALISED, SEQ2SEQ, allowed, make_inputs, make_model
from pydantic import ValidationError
from test_stats import classifier_examples, language_examples

from headwise.calibration.tasks import Examples, Task, make_task
from headwise.calibration.tasks.fidelity import FidelityOptions
from headwise.errors import DataError, PlanError, SurgeryError
from headwise.gates.model_cost import kv_bytes_per_prompt_token
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.view import ModelView
from headwise.passes import PASSES
from headwise.passes.base import Pass, make_plan, run_pass
from headwise.passes.prune_heads import PruneHeads
from headwise.pipeline.commands.inspection import inspect_checkpoint
from headwise.tolerances import TWIN

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"ratio": 0.5} for name in ("prune-heads", "prune-mlp", "share-kv", "cluster-heads")},
    "prune": {"macs": 0.85},
    "prune-tokens": {"keep": 0.5},
    "latent-kv": {"rank": 6},
    "share-layers": {"rank": 6},
    "stream-heads": {"ratio": 0.5, "sink": 1, "recent": 2},
}
"""Options for passes that have required ones."""
INSTEAD = {("share-kv", family): {"ratio": 0.5, "merge": "mean"} for family in NORMALISED}
"""Where a family needs other options; that the usual ones are refused is tested with the pass."""


def samples(view: ModelView, family: str) -> tuple[Task, Examples]:
    """Enough tokens for a refit on every family."""
    if family == "torch":
        return classifier_examples(view.module, 30)
    if family in DECODERS:
        task, examples = language_examples(view)
        return task, Examples.of(examples.rows * 8, source="made up", padding=examples.padding)
    rows = [{n: t[0].numpy() for n, t in make_inputs(family, seed).items()} for seed in range(20)]
    task = make_task(FidelityOptions.model_validate({"type": "fidelity", "data": {"path": "unused.npz"}}))
    padding = {"input_ids": 0, "attention_mask": 0}
    return task, Examples.of(rows, source="made up", padding=padding, facts={"pooling": "mean"})


LATENT = ("latent-kv", "share-layers")
BANDED = {"bert", "roberta", "distilbert", "electra", "vit", "deit", "dinov2", "clip-vision", "wrapped"}
"""Encoders whose heads can have bands."""
UNFIT = {
    **{(name, family): "normalises queries and keys" for name in LATENT for family in NORMALISED},
    **{(name, "gemma2"): "caps its scores" for name in LATENT},
    **{("share-layers", family): "no group has two layers" for family in SEQ2SEQ},
    ("share-layers", "albert"): "both of which run once",
    **{("prune-tokens", family): "known for decoders without" for family in SEQ2SEQ},
    **{("prune-tokens", family): "see the last tokens only already" for family in ("mistral", "gemma2", "gemma3")},
    **{("prune-tokens", family): "clip-text.*\n.*its tokens see earlier ones only" for family in ("clip", "clip-text")},
    **{("stream-heads", family): "known for decoders without" for family in MODELS.keys() - DECODERS - BANDED},
    **{("stream-heads", family): "see the last tokens only already" for family in ("mistral", "gemma2", "gemma3")},
}
"""What cannot be planned on these models, by what the error says; layers of one kind are too few in some."""


@pytest.mark.parametrize(("name", "family"), sorted(UNFIT))
def test_plans_that_do_not_fit_a_family_are_refused(name: str, family: str) -> None:
    view = ModelView.of(make_model(family))
    task, examples = samples(view, family)
    with pytest.raises(PlanError, match=UNFIT[name, family]):
        make_plan(PASSES[name].model_validate(OPTIONS[name]), view, task, examples)


REFUSALS = [(name, family) for name in sorted(PASSES) for family in sorted(MODELS.keys() - set(allowed(name)))]


@pytest.mark.parametrize(("name", "family"), REFUSALS)
def test_a_refusal_says_why_and_has_a_reason(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = make_model(family)
    view, teacher = ModelView.of(module), ModelView.of(make_model(family))
    task, examples = samples(view, family)
    pass_: Pass = PASSES[name].model_validate(OPTIONS[name])
    with pytest.raises(PlanError, match=f"{name} cannot be applied to layer 0 .*\n.*because ") as refused:
        make_plan(pass_, view, task, examples)
    reason = str(refused.value).partition("because ")[2].splitlines()[0]
    module.save_pretrained(tmp_path)
    assert f"{name}: refused, because {reason}" in inspect_checkpoint(str(tmp_path), sequence=4)["limits"]
    if name in (*LATENT, "prune-tokens"):
        # Keys lose a constant that positions see, or tokens are chosen for queries that must not see them, or not at
        # all: the model gets worse, but runs and equals its twin.
        return
    monkeypatch.setattr("headwise.passes.base._refuse", lambda *_: None)
    with pytest.raises((RuntimeError, KeyError, SurgeryError, DataError)):
        run_pass(pass_, view, teacher, task, examples)


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in sorted(PASSES) for family in sorted(allowed(name)) if (name, family) not in UNFIT],
)
def test_contract(name: str, family: str) -> None:
    view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(view, family)
    pass_: Pass = PASSES[name].model_validate(INSTEAD.get((name, family), OPTIONS[name]))
    first, _ = make_plan(pass_, view, task, examples)
    second, _ = make_plan(pass_, view, task, examples)
    assert first == second
    assert first.edits
    assert EditPlan.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert view.layout == teacher.layout, "planning changed the model"

    before = sum(p.numel() for p in view.module.parameters())
    record = run_pass(pass_, view, teacher, task, examples)
    assert record.plan == first
    assert record.after == first.predict(record.before) == view.layout
    assert record.twin_error <= TWIN
    assert all(fit["after"] <= fit["before"] for fit in record.refit)
    if name in ("stream-heads", "latent-kv", "prune-tokens") and family in DECODERS:
        # What its cache holds shrinks. Streaming heads keep their weights; queries of a latent get a part of their own.
        assert kv_bytes_per_prompt_token(view) < kv_bytes_per_prompt_token(teacher)
    elif name not in ("prune-tokens", "stream-heads"):  # which leave the weights of encoders as they are
        assert sum(p.numel() for p in view.module.parameters()) < before
    json.dumps(record.to_json())


@pytest.mark.parametrize("score", ["contribution", "gauss-newton", "michel", "fisher", "weight-norm", "random"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_every_score_and_scope_removes_what_was_asked_for(score: str, scope: str) -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, 30)
    pass_ = PruneHeads.model_validate({"ratio": 0.5, "score": score, "scope": scope})
    plan, _ = make_plan(pass_, view, task, examples)
    after = plan.predict(view.layout)
    assert sum(len(layer.query) for layer in after.attention) == LAYERS * HEADS // 2
    if scope == "layer":
        assert {len(layer.query) for layer in after.attention} == {HEADS // 2}
    assert plan.scores is not None
    assert [sorted(layer) for layer in plan.scores.layers] == [list(range(HEADS))] * LAYERS


@pytest.mark.parametrize("score", ["contribution", "gauss-newton", "weight-norm"])
def test_a_head_that_adds_nothing_goes_first(score: str) -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, 30)
    view.attention[1].read().output[:, 2] = 0.0
    plan, _ = make_plan(PruneHeads.model_validate({"ratio": 1 / 12, "score": score}), view, task, examples)
    assert plan.edits == (DropHeads(layer=1, query=(2,)),)


def test_whole_kv_groups_go_under_gqa() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = samples(view, "llama")
    plan, _ = make_plan(PruneHeads(ratio=1 / 3), view, task, examples)
    assert sum(len(edit.query) for edit in plan.edits) == 4
    for edit in plan.edits:
        assert edit.query in view.layout.attention[edit.layer].units()


def test_the_mean_is_folded_only_where_there_is_a_bias() -> None:
    for family, has_bias in (("torch", True), ("llama", False)):
        view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
        task, examples = samples(view, family)
        run_pass(PruneHeads(ratio=0.34, refit=False), view, teacher, task, examples)
        edited = [v.index for v, t in zip(view.attention, teacher.attention, strict=True) if v.layout != t.layout]
        for index in edited:
            ours, theirs = view.attention[index].read().output_bias, teacher.attention[index].read().output_bias
            assert (ours is not None) == has_bias
            if ours is not None and theirs is not None:
                assert not torch.allclose(ours, theirs)


def test_folding_the_mean_keeps_the_average_layer_output() -> None:
    view, teacher = (ModelView.of(make_model("torch")) for _ in range(2))
    task, examples = samples(view, "torch")
    run_pass(PruneHeads(ratio=1 / 12, refit=False), view, teacher, task, examples)
    index = next(v.index for v, t in zip(view.attention, teacher.attention, strict=True) if v.layout != t.layout)
    means = []
    for model in (view, teacher):
        seen: list[torch.Tensor] = []
        with model.attention[index].watch_output(lambda t, seen=seen: seen.append(t)), torch.no_grad():
            for batch in examples.batches(32):
                model.module(torch.as_tensor(batch.inputs["tokens"]))
        means.append(torch.cat(seen).mean((0, 1)))
    assert torch.allclose(*means, atol=1e-5)


@pytest.mark.parametrize(("scope", "message"), [("model", "11 of 12 query heads should go"), ("layer", "should go")])
def test_a_ratio_that_would_empty_a_layer_is_refused(scope: str, message: str) -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    with pytest.raises(PlanError, match=message):
        make_plan(PruneHeads.model_validate({"ratio": 0.95, "scope": scope}), view, task, examples)


def test_a_ratio_that_removes_nothing_is_refused() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    with pytest.raises(PlanError, match=r"ratio 0.01 of 12 query heads removes nothing"):
        make_plan(PruneHeads(ratio=0.01), view, task, examples)


def test_ratio_zero_changes_nothing() -> None:
    view, teacher = (ModelView.of(make_model("torch")) for _ in range(2))
    task, examples = classifier_examples(view.module)
    record = run_pass(PruneHeads(ratio=0.0), view, teacher, task, examples)
    assert record.before == record.after
    assert record.refit == ()
    for name, parameter in view.module.named_parameters():
        assert torch.equal(parameter, teacher.module.get_parameter(name))


def test_min_heads_is_kept() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    plan, _ = make_plan(PruneHeads(ratio=0.5, min_heads=2), view, task, examples)
    assert {len(layer.query) for layer in plan.predict(view.layout).attention} == {2}


@pytest.mark.parametrize(
    "options", [{"ratio": 1.0}, {"ratio": -0.1}, {"ratio": 0.5, "ridge": 0}, {"ratio": 0.5, "min_heads": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PruneHeads.model_validate(options)


def test_a_normalized_matrix_is_refused() -> None:
    with pytest.raises(ValidationError, match="gauss-newton decides on a matrix"):
        PruneHeads(ratio=0.5, score="gauss-newton", normalize=True)


def test_scores_from_labels_say_what_to_do_without_labels() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    unlabelled = Examples.of(examples.rows, source="x", facts=examples.facts)
    with pytest.raises(PlanError, match="no labels"):
        make_plan(PruneHeads(ratio=0.5, score="fisher"), view, task, unlabelled)


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_surgery_that_is_not_exact_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break surgery on purpose: turn output columns around, or into no numbers at all."""
    view, teacher = (ModelView.of(make_model("torch")) for _ in range(2))
    task, examples = classifier_examples(view.module)
    right = surgery.drop_heads

    def wrong(layer: object, edit: DropHeads) -> None:
        right(layer, edit)  # type: ignore[arg-type]
        layer.read().output.mul_(factor)  # type: ignore[attr-defined]

    monkeypatch.setattr(surgery, "drop_heads", wrong)
    with pytest.raises(SurgeryError, match="differs from its exact twin"):
        run_pass(PruneHeads(ratio=0.5), view, teacher, task, examples)


def test_a_touched_bystander_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    view, teacher = (ModelView.of(make_model("torch")) for _ in range(2))
    task, examples = classifier_examples(view.module, 30)
    right = surgery.set_output

    def wrong(layer: object, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        right(layer, weight, bias)  # type: ignore[arg-type]
        with torch.no_grad():
            view.module.get_parameter("digit.weight").add_(1e-6)

    monkeypatch.setattr(surgery, "set_output", wrong)
    with pytest.raises(SurgeryError, match="outside the attention layers and MLPs"):
        run_pass(PruneHeads(ratio=0.5), view, teacher, task, examples)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("bert", {"share-layers": {"how": "mean"}}, {"prune": {"macs": 0.8}}),
        ("llama", {"latent-kv": {"rank": 6}}, {"cluster-heads": {"clusters": 2}}),
        ("gpt2", {"share-layers": {"rank": 6}}, {"share-kv": {"ratio": 0.5}}),
        ("gpt2", {"share-layers": {"rank": 6}}, {"latent-kv": {"rank": 5}}),
    ],
    ids=str,
)
def test_layers_that_a_pass_cannot_read_are_refused_before_anything_is_measured(
    family: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(view, family)
    (name, options), (then, more) = (*first.items(), *second.items())
    run_pass(PASSES[name].model_validate({**options, "refit": False}), view, teacher, task, examples)
    with pytest.raises(PlanError, match=r"from another layer already\n.*\n.*behind the other attention passes"):
        make_plan(PASSES[then].model_validate(more), view, task, examples)
