"""Neurons are removed exactly, saved, and made up for by the refit, in every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FACTORIES, GROUPED, LAYERS, MODELS, SEQ2SEQ, WIDTH, largest_difference, make_inputs, make_model
from test_checkpoint import checkpoint_of

from headwise.calibration.refit import fit_output
from headwise.calibration.tasks import Examples
from headwise.errors import PlanError, SurgeryError
from headwise.model import surgery
from headwise.model.checkpoint import load_checkpoint
from headwise.model.edits import DropHeads, DropNeurons, EditPlan
from headwise.model.forward import run
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.tolerances import TWIN

REFITTED = ("bert", "llama", "phi3", "gpt2", "torch", "opt", "albert", "dinov2", "gpt-neox", "whisper")
"""One family for every way to store an MLP and to add what it gives."""
NOT_IN_CONFIG = {"bart", "whisper", "dinov2"}
"""Families whose config has no entry for the number of neurons of all blocks."""


def unequal(view: ModelView) -> EditPlan:
    """2 neurons of the first and 14 of the last MLP."""
    last = DropNeurons(layer=len(view.mlp) - 1, neurons=tuple(range(0, 40, 3)))
    return EditPlan(edits=(DropNeurons(layer=0, neurons=(2, 5)), last))


def equal(view: ModelView) -> EditPlan:
    """3 neurons of every MLP, not the same ones."""
    return EditPlan(edits=tuple(DropNeurons(layer=mlp.index, neurons=(mlp.index, 20, 30)) for mlp in view.mlp))


def outputs(view: ModelView, family: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return run(view.module, make_inputs(family))


def gated(view: ModelView, plan: EditPlan, family: str) -> dict[str, torch.Tensor]:
    with surgery.twin(view, plan):
        return outputs(view, family)


# ---------------------------------------------------------------------------------------------- surgery


def test_removing_neurons_equals_gating_them_to_zero(family: str) -> None:
    view = ModelView.of(make_model(family))
    plan, untouched = unequal(view), outputs(view, family)
    twin = gated(view, plan, family)
    surgery.apply(view, plan)
    edited = outputs(view, family)
    assert largest_difference(twin, edited) < TWIN
    assert largest_difference(untouched, edited) > 100 * TWIN, "the neurons did nothing, so this proves nothing"
    assert view.layout == plan.predict(ModelView.of(make_model(family)).layout)


def test_removing_other_neurons_than_planned_is_seen(family: str) -> None:
    view = ModelView.of(make_model(family))
    plan = unequal(view)
    twin = gated(view, plan, family)
    wrong = DropNeurons(layer=plan.edits[1].layer, neurons=tuple(range(1, 40, 3)))
    surgery.apply(view, EditPlan(edits=(plan.edits[0], wrong)))
    assert largest_difference(twin, outputs(view, family)) > 100 * TWIN


def test_removed_neurons_are_gone_from_all_matrices(family: str) -> None:
    view = ModelView.of(make_model(family))
    before = sum(p.numel() for p in view.module.parameters())
    surgery.apply(view, unequal(view))
    lost = before - sum(p.numel() for p in view.module.parameters())
    matrices = 3 if family in GROUPED else 2
    assert lost == (2 + 14) * (matrices * WIDTH + (view.mlp[0].read().up_bias is not None))


def test_heads_and_neurons_go_in_one_plan(family: str) -> None:
    view = ModelView.of(make_model(family))
    heads = DropHeads(layer=1, query=view.layout.attention[1].units()[0])
    plan = EditPlan(edits=(heads, *unequal(view).edits))
    twin = gated(view, plan, family)
    surgery.apply(view, plan)
    assert largest_difference(twin, outputs(view, family)) < TWIN
    assert EditPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (DropNeurons(layer=0, neurons=tuple(range(48))), "MLP 0 would keep 0 of 48 neurons"),
        (DropNeurons(layer=1, neurons=(48,)), "MLP 1 has no neuron 48\n  expected: one of 0-47"),
        (DropNeurons(layer=3, neurons=(0,)), "the plan edits MLP 3\n  expected: one from 0 to 2"),
    ],
)
def test_an_impossible_plan_changes_nothing(edit: DropNeurons, message: str) -> None:
    view = ModelView.of(make_model("bert"))
    before = outputs(view, "bert")
    with pytest.raises(PlanError, match=message):
        surgery.apply(view, EditPlan(edits=(unequal(view).edits[1], edit)))
    assert largest_difference(before, outputs(view, "bert")) == 0.0


def test_surgery_that_lands_elsewhere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "drop_neurons", lambda view, edit: None)
    view = ModelView.of(make_model("bert"))
    with pytest.raises(SurgeryError, match="MLP 0 has 48 neurons after surgery\n  expected: 46"):
        surgery.apply(view, unequal(view))


# ---------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("plan", [equal, unequal])
def test_round_trip_is_bit_exact(family: str, plan: object, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    surgery.apply(view, plan(view))  # type: ignore[operator]
    before = outputs(view, family)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path).view()
    assert largest_difference(before, outputs(loaded, family)) == 0.0
    assert loaded.layout == view.layout


def test_ids_of_a_loaded_checkpoint_go_on(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("bert")
    view = checkpoint.view()
    surgery.apply(view, unequal(view))
    save_checkpoint(checkpoint, view, tmp_path / "once")
    again = load_checkpoint(tmp_path / "once")
    second = again.view()
    surgery.apply(second, EditPlan(edits=(DropNeurons(layer=0, neurons=(4, 6)),)))
    save_checkpoint(again, second, tmp_path / "twice")
    loaded = load_checkpoint(tmp_path / "twice").view()
    assert loaded.layout == second.layout
    assert loaded.layout.mlp[0].neurons == (0, 1, 3, *range(7, 48))


@pytest.mark.parametrize("family", sorted(MODELS.keys() - FACTORIES.keys() - {"clip"}))
def test_mlps_of_one_width_load_with_plain_transformers(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    config = view.module.config.to_dict()  # type: ignore[operator, union-attr]
    surgery.apply(view, equal(view))
    save_checkpoint(checkpoint, view, tmp_path)
    assert view.module.config.to_dict() == config, "saving changed the model's own config"  # type: ignore[operator, union-attr]
    sidecar = json.loads((tmp_path / "headwise.json").read_text())
    assert sidecar["stock"] == (family not in NOT_IN_CONFIG)
    if sidecar["stock"]:
        stock = type(checkpoint.module).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
        assert largest_difference(outputs(view, family), outputs(ModelView.of(stock), family)) == 0.0


def test_towers_of_one_width_each_load_through_headwise(tmp_path: Path) -> None:
    """The config of CLIP is one of configs: a width that it had itself would be read by nobody."""
    checkpoint = checkpoint_of("clip")
    view = checkpoint.view()
    surgery.apply(view, equal(view))
    save_checkpoint(checkpoint, view, tmp_path)
    assert not json.loads((tmp_path / "headwise.json").read_text())["stock"]


def test_a_size_that_the_config_cannot_say_is_kept_beside_it(tmp_path: Path) -> None:
    """Heads of unequal number and MLPs of one width: neither alone may make the checkpoint a stock one."""
    checkpoint = checkpoint_of("llama")
    view = checkpoint.view()
    heads = DropHeads(layer=1, query=view.layout.attention[1].units()[0])
    surgery.apply(view, EditPlan(edits=(heads, *equal(view).edits)))
    save_checkpoint(checkpoint, view, tmp_path)
    sidecar = json.loads((tmp_path / "headwise.json").read_text())
    assert not sidecar["stock"]
    assert [entry["intermediate_size"] for entry in sidecar["per_layer_config"].values()] == [45] * LAYERS
    assert load_checkpoint(tmp_path).view().layout == view.layout


# ---------------------------------------------------------------------------------------------- refit


def with_samples(family: str) -> tuple[ModelView, ModelView, Examples]:
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    rows = [{n: t[0].numpy() for n, t in make_inputs(family, seed).items()} for seed in range(60)]
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    return student, teacher, Examples.of(rows, source="made up", padding=dict.fromkeys(names, 0))


@pytest.mark.parametrize("family", REFITTED)
def test_an_untouched_mlp_is_refitted_to_itself(family: str) -> None:
    student, teacher, examples = with_samples(family)
    fit = fit_output(student, teacher, 1, examples, mlp=True)
    weight, bias = student.mlp[1].linear()
    assert torch.allclose(fit.weight, weight, atol=1e-3)
    assert fit.before < 1e-9
    assert (fit.bias is None) == (bias is None)


@pytest.mark.parametrize("family", REFITTED)
def test_removing_a_copy_of_a_neuron_is_lossless_after_the_refit(family: str) -> None:
    student, teacher, examples = with_samples(family)
    for view in (student, teacher):
        weights = view.mlp[1].read()
        for tensor in (weights.up, weights.gate, weights.up_bias, weights.gate_bias):
            if tensor is not None:
                tensor[7] = tensor[3]
    surgery.apply(student, EditPlan(edits=(DropNeurons(layer=1, neurons=(7,)),)))
    fit = fit_output(student, teacher, 1, examples, mlp=True, ridge=1e-8)
    assert fit.before > 1e-6
    assert fit.after < 1e-3 * fit.before
    before = outputs(teacher, family)
    surgery.set_output(student.mlp[1], fit.weight, fit.bias)
    assert largest_difference(before, outputs(student, family)) < 1e-2


@pytest.mark.parametrize("family", ["bert", "llama", "phi3", "gpt2", "torch"])
def test_an_mlp_makes_up_for_the_attention_before_it(family: str) -> None:
    """Only through the residual stream can the MLP, itself untouched, see what the attention lost."""
    student, teacher, examples = with_samples(family)
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=1, query=student.layout.attention[1].units()[0]),)))
    fit = fit_output(student, teacher, 1, examples, mlp=True, ridge=1e-2)
    assert fit.before > 1e-4
    assert fit.after < 0.95 * fit.before


def test_tokens_of_padding_are_not_fitted() -> None:
    """The decoder's tokens have a mask of their own, which says nothing about the encoder's."""
    for family in sorted(SEQ2SEQ):
        student, teacher, examples = with_samples(family)
        surgery.apply(student, EditPlan(edits=(DropNeurons(layer=1, neurons=(0, 1, 2, 3, 4, 5)),)))
        fit = fit_output(student, teacher, 1, examples, mlp=True)
        changed = [dict(row) for row in examples.rows]
        for row in changed:
            if not row["decoder_attention_mask"].all():
                row["decoder_input_ids"] = row["decoder_input_ids"] * row["decoder_attention_mask"]
        other = Examples.of(changed, source="made up", padding=examples.padding)
        again = fit_output(student, teacher, 1, other, mlp=True)
        assert torch.allclose(fit.weight, again.weight, atol=1e-5)


def test_features_of_zeros_are_no_reason_to_fail() -> None:
    student, teacher, examples = with_samples("torch")
    for view in (student, teacher):
        weights = view.mlp[0].read()
        weights.up.zero_()
        assert weights.up_bias is not None
        weights.up_bias.fill_(-1.0)
    fit = fit_output(student, teacher, 0, examples, mlp=True)
    assert torch.isfinite(fit.weight).all()
    assert fit.after <= fit.before
