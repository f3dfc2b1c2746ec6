"""The MLP of every family is seen: its weights, its neurons, what they are added to, and which ones are left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FACTORIES, LAYERS, MODELS, WIDTH, largest_difference, make_inputs, make_model
from test_checkpoint import checkpoint_of, prune
from torch import nn
from torch.nn import functional as F
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from headwise.calibration.refit import fit_output
from headwise.calibration.tasks import Examples
from headwise.errors import PlanError, SurgeryError
from headwise.model import surgery
from headwise.model.checkpoint import load_checkpoint
from headwise.model.families import FeedForward, family_of
from headwise.model.forward import run
from headwise.model.layout import AttentionLayout, DropHeads, EditPlan, Layout
from headwise.model.mlp import MlpView
from headwise.model.neurons import DropNeurons, MlpLayout, from_ranges, ranges
from headwise.model.saving import save_checkpoint
from headwise.model.surgery_mlp import drop_neurons
from headwise.model.view import ModelView
from headwise.tolerances import TWIN

ACTIVATIONS: Mapping[str, str] = {"torch": "relu", "llama": "silu", "qwen2": "silu", "qwen3": "silu", "mistral": "silu"}
GATED = ACTIVATIONS.keys() - {"torch"}


def neurons_of(family: str) -> int:
    return 4 * WIDTH if family == "gpt2" else 48


def activation(family: str, hidden: torch.Tensor) -> torch.Tensor:
    approximate = "tanh" if family == "gpt2" else "none"
    kinds = {"relu": F.relu, "silu": F.silu}
    kind = ACTIVATIONS.get(family)
    return F.gelu(hidden, approximate=approximate) if kind is None else kinds[kind](hidden)


def test_every_block_has_its_mlp(family: str) -> None:
    view = ModelView.of(make_model(family))
    assert [mlp.index for mlp in view.mlp] == list(range(LAYERS))
    assert [mlp.block for mlp in view.mlp] == [layer.block for layer in view.attention]
    assert {(len(mlp.layout.neurons), mlp.layout.width) for mlp in view.mlp} == {(neurons_of(family),) * 2}
    names = dict(view.module.named_modules())
    for mlp in view.mlp:
        assert names[mlp.path] is mlp.block
        assert names[mlp.paths[-1]] is mlp.output
        assert len(mlp.paths) == (3 if family in GATED else 2)


def test_what_is_read_computes_what_is_watched(family: str) -> None:
    view, seen = ModelView.of(make_model(family)), {}
    mlp = view.mlp[1]
    with (
        mlp.watch_input(lambda t: seen.__setitem__("input", t)),
        mlp.watch_neurons(lambda t: seen.__setitem__("neurons", t)),
        mlp.watch_output(lambda t: seen.__setitem__("output", t)),
        torch.no_grad(),
    ):
        run(view.module, make_inputs(family))
    weights = mlp.read()
    up = F.linear(seen["input"], weights.up, weights.up_bias)
    if weights.gate is None:
        neurons = activation(family, up)
    else:
        neurons = up * activation(family, F.linear(seen["input"], weights.gate, weights.gate_bias))
    assert torch.allclose(neurons, seen["neurons"], atol=1e-5)
    assert torch.allclose(F.linear(neurons, weights.down, weights.down_bias), seen["output"], atol=1e-5)


def test_the_residual_is_what_the_output_is_added_to(family: str) -> None:
    """In a block that adds its MLP last, the sum is the block's output; behind a norm it is the norm's input."""
    view, seen = ModelView.of(make_model(family)), {}
    mlp = view.mlp[1]
    norms = {"bert": "output.LayerNorm", "roberta": "output.LayerNorm", "wrapped": "output.LayerNorm"}
    norm = mlp.block.get_submodule(norms[family]) if family in norms else getattr(mlp.block, "output_layer_norm", None)

    def added(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        block_output = result if isinstance(result, torch.Tensor) else result[0]
        seen["sum"] = block_output if norm is None else args[0]

    handle = (norm or mlp.block).register_forward_hook(added)
    with (
        mlp.watch_residual(lambda t: seen.__setitem__("residual", t)),
        mlp.watch_output(lambda t: seen.__setitem__("output", t)),
        torch.no_grad(),
    ):
        run(view.module, make_inputs(family))
    handle.remove()
    assert torch.allclose(seen["residual"] + seen["output"], seen["sum"], atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_the_residual_of_torch_layers_knows_where_their_norms_are(norm_first: bool, decoder: bool) -> None:
    torch.manual_seed(0)
    cls = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = cls(WIDTH, 4, 48, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 5, WIDTH)
    view, seen = ModelView.of(nn.ModuleList([layer])), {}
    (mlp,) = view.mlp
    last_norm = layer.norm3 if decoder else layer.norm2
    with (
        mlp.watch_residual(lambda t: seen.__setitem__("residual", t)),
        mlp.watch_output(lambda t: seen.__setitem__("output", t)),
        torch.no_grad(),
    ):
        result = layer(x, x) if decoder else layer(x)
        total = seen["residual"] + seen["output"]
        assert torch.allclose(total if norm_first else last_norm(total), result, atol=1e-5)
    assert len(view.attention) == (2 if decoder else 1)


def test_a_block_of_ones_own_is_not_believed_to_add_its_mlp_anywhere() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.linear1, self.linear2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    (mlp,) = ModelView.of(Block()).mlp
    assert not mlp.residual


def test_a_block_without_the_mlp_of_its_record_has_none() -> None:
    halved = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    halved.linear2 = nn.Linear(24, WIDTH)  # behind a gated activation, say
    missing = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    del missing.linear1
    whole = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    view = ModelView.of(nn.ModuleList([halved, missing, whole]))
    assert [mlp.path for mlp in view.mlp] == ["2"]
    assert len(view.attention) == 3


def test_a_gate_scales_neurons_per_row(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    mlp = view.mlp[0]
    count = len(mlp.layout.neurons)
    with torch.no_grad():
        opened = run(view.module, inputs)
        with mlp.gate(torch.ones(count)):
            assert largest_difference(opened, run(view.module, inputs)) < 1e-6
        with mlp.gate(torch.zeros(count)):
            closed = run(view.module, inputs)
        with mlp.gate(torch.tensor([[0.0] * count, [1.0] * count])):
            mixed = run(view.module, inputs)
        again = run(view.module, inputs)
    assert largest_difference(opened, closed) > 1e-2
    assert largest_difference(opened, again) == 0.0, "the gate is still there"
    for name in mixed:
        assert torch.allclose(mixed[name][0], closed[name][0], atol=1e-5)
        assert torch.allclose(mixed[name][1], opened[name][1], atol=1e-5)


# ---------------------------------------------------------------------------------------------- layout, on disk


@pytest.mark.parametrize("ids", [(), (0,), (0, 1, 2), (0, 2, 3, 9), (5, 6, 7, 11, 12), (1, 3, 5)])
def test_ids_survive_as_ranges(ids: tuple[int, ...]) -> None:
    assert from_ranges(ranges(ids)) == ids


def test_ranges_are_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges(range(11008)) == "0-11007"


def test_neurons_keep_their_original_ids() -> None:
    layout = MlpLayout(neurons=tuple(range(6)), width=6).without([1]).without([4])
    assert layout == MlpLayout(neurons=(0, 2, 3, 5), width=6)


def test_a_layout_survives_json_and_the_list_of_older_versions_is_read() -> None:
    attention = (AttentionLayout(query=(0, 2), kv=(0, 2), head_dim=8),)
    layout = Layout(attention=attention, mlp=(MlpLayout(neurons=(0, 2, 3), width=6),))
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    old = [layer.to_json() for layer in attention]
    assert Layout.from_json(json.loads(json.dumps(old))) == Layout(attention=attention)


def test_checkpoints_carry_the_neurons(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path).view()
    assert loaded.layout == view.layout
    assert (
        loaded.layout.mlp == (MlpLayout(neurons=tuple(range(neurons_of(family))), width=neurons_of(family)),) * LAYERS
    )


def test_checkpoints_of_older_versions_still_load(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path)
    sidecar = json.loads((tmp_path / "headwise.json").read_text())
    sidecar["layout"] = sidecar["layout"]["attention"]
    (tmp_path / "headwise.json").write_text(json.dumps(sidecar))
    assert load_checkpoint(tmp_path).view().layout == view.layout


def test_a_layout_with_other_neurons_is_refused() -> None:
    view = ModelView.of(make_model("bert"))
    other = replace(view.layout, mlp=tuple(entry.without([0]) for entry in view.layout.mlp))
    with pytest.raises(PlanError, match=r"a layout of \[47, 47, 47\] \(neurons\)"):
        view.rename(other)


def test_ids_of_a_loaded_checkpoint_go_on(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    surgery.apply(view, UNEQUAL)
    save_checkpoint(checkpoint, view, tmp_path / "once")
    again = load_checkpoint(tmp_path / "once")
    second = again.view()
    surgery.apply(second, EditPlan(edits=(DropNeurons(layer=0, neurons=(4, 6)),)))
    save_checkpoint(again, second, tmp_path / "twice")
    loaded = load_checkpoint(tmp_path / "twice").view()
    assert loaded.layout == second.layout
    assert loaded.layout.mlp[0].neurons == (0, 1, 3, *range(7, neurons_of(family)))


# ---------------------------------------------------------------------------------------------- surgery

UNEQUAL = EditPlan(edits=(DropNeurons(layer=0, neurons=(2, 5)), DropNeurons(layer=2, neurons=tuple(range(0, 40, 3)))))


def gated(view: ModelView, plan: EditPlan, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with surgery.twin(view, plan), torch.no_grad():
        return run(view.module, inputs)


def test_removing_neurons_equals_gating_them_to_zero(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    with torch.no_grad():
        untouched = run(view.module, inputs)
    twin = gated(view, UNEQUAL, inputs)
    surgery.apply(view, UNEQUAL)
    with torch.no_grad():
        edited = run(view.module, inputs)
    assert largest_difference(twin, edited) < TWIN
    assert largest_difference(untouched, edited) > 100 * TWIN, "the neurons did nothing, so this proves nothing"
    assert view.layout == UNEQUAL.predict(ModelView.of(make_model(family)).layout)


def test_removing_other_neurons_than_planned_is_seen(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    twin = gated(view, UNEQUAL, inputs)
    wrong = replace(UNEQUAL.edits[1], neurons=tuple(range(1, 40, 3)))
    surgery.apply(view, EditPlan(edits=(UNEQUAL.edits[0], wrong)))
    with torch.no_grad():
        assert largest_difference(twin, run(view.module, inputs)) > 100 * TWIN


def test_removed_neurons_are_gone_from_all_matrices(family: str) -> None:
    view = ModelView.of(make_model(family))
    before = sum(p.numel() for p in view.module.parameters())
    surgery.apply(view, UNEQUAL)
    lost = before - sum(p.numel() for p in view.module.parameters())
    weights = view.mlp[0].read()
    matrices = 3 if family in GATED else 2
    assert lost == (2 + 14) * (matrices * WIDTH + (weights.up_bias is not None))


def test_heads_and_neurons_go_in_one_plan(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    heads = DropHeads(layer=1, query=view.layout.attention[1].units()[0])
    plan = EditPlan(edits=(heads, *UNEQUAL.edits))
    twin = gated(view, plan, inputs)
    surgery.apply(view, plan)
    with torch.no_grad():
        assert largest_difference(twin, run(view.module, inputs)) < TWIN
    assert EditPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_halves_of_a_fused_matrix_lose_the_same_neurons() -> None:
    """Gate and up in one matrix, as in Phi-3."""
    torch.manual_seed(0)
    block = Phi3MLP(transformers.Phi3Config(hidden_size=WIDTH, intermediate_size=48, pad_token_id=0)).eval()
    record = FeedForward(up="gate_up_proj", down="down_proj", fused=True)
    mlp, x = MlpView(0, "", block, family_of("llama"), record), torch.randn(2, 5, WIDTH)
    gates = torch.ones(48)
    gates[[3, 40]] = 0.0
    with mlp.gate(gates), torch.no_grad():
        twin = block(x)
    drop_neurons(mlp, DropNeurons(layer=0, neurons=(3, 40)))
    with torch.no_grad():
        assert torch.allclose(block(x), twin, atol=1e-5)
    assert block.gate_up_proj.weight.shape == (92, WIDTH)
    weights = mlp.read()
    with torch.no_grad():
        up = F.linear(x, weights.up) * F.silu(F.linear(x, weights.gate))  # type: ignore[arg-type]
        assert torch.allclose(F.linear(up, weights.down), twin, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (DropNeurons(layer=0, neurons=tuple(range(48))), "MLP 0 would keep 0 of 48 neurons"),
        (DropNeurons(layer=1, neurons=(48,)), "MLP 1 has no neuron 48\n  expected: one of 0-47"),
        (DropNeurons(layer=3, neurons=(0,)), "the plan edits MLP 3\n  expected: one from 0 to 2"),
    ],
)
def test_an_impossible_plan_changes_nothing(edit: DropNeurons, message: str) -> None:
    view, inputs = ModelView.of(make_model("bert")), make_inputs("bert")
    with torch.no_grad():
        before = run(view.module, inputs)
    with pytest.raises(PlanError, match=message):
        surgery.apply(view, EditPlan(edits=(UNEQUAL.edits[1], edit)))
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) == 0.0


def test_surgery_that_lands_elsewhere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "drop_neurons", lambda view, edit: None)
    with pytest.raises(SurgeryError, match="MLP 0 has 48 neurons after surgery\n  expected: 46"):
        surgery.apply(ModelView.of(make_model("bert")), UNEQUAL)


# ---------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("equal", [True, False])
def test_round_trip_is_bit_exact(family: str, equal: bool, tmp_path: Path) -> None:
    checkpoint, inputs = checkpoint_of(family), make_inputs(family)
    view = checkpoint.view()
    surgery.apply(view, EQUAL if equal else UNEQUAL)
    with torch.no_grad():
        before = run(view.module, inputs)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    with torch.no_grad():
        assert largest_difference(before, run(loaded.module, inputs)) == 0.0
    assert loaded.view().layout == view.layout


EQUAL = EditPlan(edits=tuple(DropNeurons(layer=i, neurons=(i, i + 1, 30)) for i in range(LAYERS)))


@pytest.mark.parametrize("family", sorted(MODELS.keys() - FACTORIES.keys()))
def test_mlps_of_one_width_load_with_plain_transformers(family: str, tmp_path: Path) -> None:
    checkpoint, inputs = checkpoint_of(family), make_inputs(family)
    view = checkpoint.view()
    config = view.module.config.to_dict()
    surgery.apply(view, EQUAL)
    save_checkpoint(checkpoint, view, tmp_path)
    assert view.module.config.to_dict() == config, "saving changed the model's own config"
    stock = type(checkpoint.module).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(stock, inputs)) == 0.0


def test_a_size_that_the_config_cannot_say_is_kept_beside_it(tmp_path: Path) -> None:
    """Heads of unequal number and MLPs of one width: neither alone may make the checkpoint a stock one."""
    checkpoint = checkpoint_of("llama")
    view = checkpoint.view()
    heads = DropHeads(layer=1, query=view.layout.attention[1].units()[0])
    surgery.apply(view, EditPlan(edits=(heads, *EQUAL.edits)))
    save_checkpoint(checkpoint, view, tmp_path)
    sidecar = json.loads((tmp_path / "headwise.json").read_text())
    assert not sidecar["stock"]
    assert [entry["intermediate_size"] for entry in sidecar["per_layer_config"].values()] == [45] * LAYERS
    assert load_checkpoint(tmp_path).view().layout == view.layout


# ---------------------------------------------------------------------------------------------- refit


def test_an_untouched_mlp_is_refitted_to_itself(family: str) -> None:
    student, teacher, examples = with_samples(family)
    fit = fit_output(student, teacher, 1, examples, mlp=True)
    weight, bias = student.mlp[1].linear()
    assert torch.allclose(fit.weight, weight, atol=1e-3)
    assert fit.before < 1e-9
    assert (fit.bias is None) == (bias is None)


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


def test_an_mlp_makes_up_for_the_attention_before_it(family: str) -> None:
    """Only through the residual stream can the MLP, itself untouched, see what the attention lost."""
    student, teacher, examples = with_samples(family)
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=1, query=student.layout.attention[1].units()[0]),)))
    fit = fit_output(student, teacher, 1, examples, mlp=True, ridge=1e-2)
    assert fit.before > 1e-4
    assert fit.after < 0.95 * fit.before


def with_samples(family: str) -> tuple[ModelView, ModelView, Examples]:
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    rows = [{n: t[0].numpy() for n, t in make_inputs(family, seed).items()} for seed in range(60)]
    return student, teacher, Examples.of(rows, source="made up", padding={"input_ids": 0, "attention_mask": 0})


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
