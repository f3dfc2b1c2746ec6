"""Reconstruction of attention layers: it reaches queries and keys, is judged on held-out samples, never makes worse."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from test_passes import samples

from headwise.calibration.reconstruct import Reconstruction, reconstruct
from headwise.calibration.refit import fit_output
from headwise.calibration.tasks import Examples
from headwise.errors import DataError
from headwise.model import surgery
from headwise.model.edits import ClusterHeads, EditPlan
from headwise.model.view import ModelView
from headwise.passes import PASSES
from headwise.passes.base import run_pass
from headwise.passes.cluster_heads import ClusterHeadsPass
from headwise.passes.recovery import Recovery, refit

LAYERS = (
    ("bert", 0),
    ("gpt2", 1),
    ("llama", 0),
    ("qwen3", 1),
    ("phi3", 0),
    ("torch", 0),
    ("bart", 1),
    ("bart", 2),
    ("t5", 2),
)
"""Fused projections, grouped and normalised keys, a cache, layers that attend to an encoder, position biases."""


def models(family: str) -> tuple[ModelView, ModelView, Examples]:
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    _, examples = samples(student, family)
    return student, teacher, Examples.of(examples.rows * 4, source="x", padding=examples.padding, facts=examples.facts)


def disturb(view: ModelView, layer: int) -> None:
    """Other queries and keys, which no output projection makes good."""
    torch.manual_seed(1)
    weights = view.attention[layer].projections()
    value, output = (f"{path}." for path in (view.attention[layer].family.value, view.attention[layer].family.output))
    fused = view.attention[layer].family.fused
    others = {
        name: tensor + 0.5 * tensor.std() * torch.randn(tensor.shape)
        for name, tensor in weights.items()
        if tensor.dim() == 2 and not name.startswith(output) and (fused or not name.startswith(value))
    }
    surgery.set_projections(view.attention[layer], others)


def state(view: ModelView) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in view.module.state_dict().items()}


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_it_finds_queries_and_keys(family: str, layer: int) -> None:
    student, teacher, examples = models(family)
    disturb(student, layer)
    before = state(student)
    found = reconstruct(student, teacher, layer, examples, epochs=6)
    assert found.after < 0.7 * found.before
    assert found.epoch > 0
    # Deciding changes nothing; carrying it out changes this layer, and its error is the one that was promised.
    assert all(torch.equal(before[name], value) for name, value in state(student).items())
    surgery.set_projections(student.attention[layer], found.weights)
    again = reconstruct(student, teacher, layer, examples, epochs=1)
    assert again.before == pytest.approx(found.after, rel=1e-4)
    changed = {name for name, value in state(student).items() if not torch.equal(before[name], value)}
    assert all(name.startswith(f"{student.attention[layer].path}.") for name in changed)


def test_a_refit_of_the_output_does_not_make_up_for_queries_and_keys() -> None:
    student, teacher, examples = models("bert")
    disturb(student, 0)
    refitted = fit_output(student, teacher, 0, examples, ridge=1e-3).after
    surgery.set_projections(student.attention[0], reconstruct(student, teacher, 0, examples, epochs=6).weights)
    assert fit_output(student, teacher, 0, examples, ridge=1e-3).after < 0.7 * refitted


def test_a_layer_without_an_error_stays_as_it_is() -> None:
    student, teacher, examples = models("bert")
    found = reconstruct(student, teacher, 0, examples, epochs=2)
    assert found.before == found.after < 1e-12
    assert found.epoch == 0
    assert all(torch.equal(found.weights[name], value) for name, value in student.attention[0].projections().items())


def test_what_earlier_layers_got_wrong_is_made_good() -> None:
    student, teacher, examples = models("vit")
    disturb(student, 0)
    found = reconstruct(student, teacher, 1, examples, epochs=4)
    assert 0 < found.after < found.before


def test_the_same_samples_give_the_same_weights() -> None:
    def weights() -> Reconstruction:
        student, teacher, examples = models("bert")
        disturb(student, 0)
        return reconstruct(student, teacher, 0, examples, epochs=2)

    first, second = weights(), weights()
    assert first.after == second.after
    assert all(torch.equal(first.weights[name], value) for name, value in second.weights.items())


def test_padding_says_nothing() -> None:
    errors = []
    for fill in (0, 3):
        student, teacher, examples = models("bert")
        disturb(student, 0)
        rows = [dict(row) for row in examples.rows]
        for row in rows[::2]:
            row["attention_mask"] = row["attention_mask"].copy()
            row["attention_mask"][-1] = 0
            row["input_ids"] = row["input_ids"].copy()
            row["input_ids"][-1] = fill
        given = Examples.of(rows, source="x", padding=examples.padding, facts=examples.facts)
        errors.append(reconstruct(student, teacher, 0, given, epochs=2).after)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize(("rows", "epochs"), [(9, 1), (48, 2), (12, 10)])
def test_any_number_of_steps_is_enough(rows: int, epochs: int) -> None:
    student, teacher, examples = models("bert")
    disturb(student, 0)
    few = Examples.of(examples.rows[:rows], source="x", padding=examples.padding, facts=examples.facts)
    found = reconstruct(student, teacher, 0, few, epochs=epochs)
    assert found.after <= found.before


def test_some_samples_have_to_be_held_out() -> None:
    student, teacher, examples = models("bert")
    few = Examples.of(examples.rows[:8], source="x", padding=examples.padding, facts=examples.facts)
    with pytest.raises(DataError, match=r"8 calibration samples to reconstruct layer 0\n.*\n.*reconstruct: 0"):
        reconstruct(student, teacher, 0, few, epochs=1)


def test_progress_counts_the_samples_of_every_epoch() -> None:
    student, teacher, examples = models("bert")
    seen: dict[int, int] = {}

    def progress(epoch: int, count: int) -> None:
        seen[epoch] = seen.get(epoch, 0) + count

    reconstruct(student, teacher, 0, examples, epochs=2, progress=progress)
    assert list(seen) == [1, 2]
    assert seen[1] == seen[2] < len(examples)


def test_clusters_come_nearer_to_the_untouched_model_and_the_record_says_so() -> None:
    errors = {}
    for epochs in (0, 6):
        student, teacher, examples = models("bert")
        task, _ = samples(student, "bert")
        pass_ = ClusterHeadsPass(clusters=1, reconstruct=epochs, refit_mlp=False)
        record = run_pass(pass_, student, teacher, task, examples)
        assert [fit["layer"] for fit in record.refit] == [0, 1, 2][: len(student.attention)]
        for fit in record.refit:
            assert ("reconstruction" in fit) == (epochs > 0)
            assert fit["after"] <= fit["before"]
        errors[epochs] = sum(fit["after"] for fit in record.refit)
        assert all(len(entry.scoring) == 1 for entry in student.layout.attention)
    assert errors[6] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("prune-heads", "bert", {"ratio": 0.5}),
        ("prune", "vit", {"macs": 0.6, "round_to": 1}),
        ("share-kv", "llama", {"kv_heads": 1}),
        ("share-kv", "gpt2", {"kv_heads": 1}),
        ("latent-kv", "bert", {"rank": 4}),
        ("latent-kv", "llama", {"rank": 6, "rotary": 2}),
        ("latent-kv", "llama", {"rank": 6, "route": "rebuild"}),
        ("cluster-heads", "llama", {"clusters": 1}),
    ],
)
def test_other_passes_come_nearer_too(name: str, family: str, options: dict[str, object]) -> None:
    errors = []
    for epochs in (0, 6):
        student, teacher, examples = models(family)
        task, _ = samples(student, family)
        pass_ = PASSES[name].model_validate({**options, "reconstruct": epochs})
        record = run_pass(pass_, student, teacher, task, examples)
        errors.append([fit["after"] for fit in record.refit if fit["part"] == "attention"])
        shown = [fit["reconstruction"] for fit in record.refit if fit["part"] == "attention" and epochs]
        assert all(fit["after"] <= fit["before"] for fit in shown)
    assert any(fit["epoch"] for fit in shown)
    assert sum(errors[1]) < sum(errors[0])


def test_a_layer_that_borrows_keys_and_values_keeps_to_the_closed_form() -> None:
    student, teacher, examples = models("bert")
    task, _ = samples(student, "bert")
    run_pass(PASSES["share-layers"].model_validate({"how": "mean", "refit": False}), student, teacher, task, examples)
    recovery = Recovery(fold_mean=False, refit=True, ridge=0.1, epochs=2)
    fits = refit(student, teacher, student.attention, recovery, examples, missed={}, batch_size=32, progress=None)
    borrowing = [layer.layout.owner is not None for layer in student.attention]
    assert any(borrowing)
    assert ["reconstruction" not in fit for fit in fits] == borrowing


def test_a_layer_that_runs_several_times_keeps_to_the_closed_form() -> None:
    student, teacher, examples = models("albert")
    task, _ = samples(student, "albert")
    record = run_pass(ClusterHeadsPass(clusters=2, reconstruct=1), student, teacher, task, examples)
    assert record.refit
    assert not any("reconstruction" in fit for fit in record.refit)


def test_without_a_refit_nothing_is_reconstructed() -> None:
    student, teacher, examples = models("bert")
    task, _ = samples(student, "bert")
    assert not run_pass(ClusterHeadsPass(clusters=2, refit=False), student, teacher, task, examples).refit


def test_members_of_a_cluster_share_what_was_found() -> None:
    student, teacher, examples = models("bert")
    surgery.apply(student, EditPlan(edits=(ClusterHeads(layer=0, clusters=((0, 1), (2, 3))),)))
    found = reconstruct(student, teacher, 0, examples, epochs=3)
    assert found.after < found.before
    query = next(value for name, value in found.weights.items() if "query.weight" in name)
    assert len(query) == 2 * student.attention[0].layout.head_dim
