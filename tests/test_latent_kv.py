"""latent-kv: keys and values from one latent per token, exact at full rank, saved and exported as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEADS, LAYERS, WIDTH, largest_difference, make_inputs, make_model
from pydantic import ValidationError
from test_passes import samples

from headwise.calibration.latent import Block, JointLatent, spread_rank
from headwise.errors import PlanError, SurgeryError
from headwise.export.onnx import to_onnx
from headwise.export.runners import OrtRunner
from headwise.gates.model_cost import model_cost
from headwise.model import latent_surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import EditPlan, LatentKV
from headwise.model.forward import run, to_torch
from headwise.model.latent import LatentKeys, Slot
from headwise.model.layout import AttentionLayout, Layout
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import PassRecord, make_plan, run_pass
from headwise.passes.cluster_heads import ClusterHeadsPass
from headwise.passes.latent_kv import LatentKVPass
from headwise.passes.prune_heads import PruneHeads
from headwise.pipeline.commands.inspection import inspect_checkpoint

KV = 2 * WIDTH
"""Numbers of keys and values per token in the tiny models here, whose heads are as wide as the model together."""


def compress(family: str, **options: Any) -> tuple[ModelView, ModelView, PassRecord]:
    view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(view, family)
    return view, teacher, run_pass(LatentKVPass.model_validate(options), view, teacher, task, examples)


def difference(family: str, left: ModelView, right: ModelView) -> float:
    """On real tokens."""
    inputs = make_inputs(family)
    found = [run(model.module, inputs) for model in (left, right)]
    mask = inputs.get("attention_mask")
    if mask is not None and "last_hidden_state" in found[0]:
        found = [{"states": outputs["last_hidden_state"][mask.bool()]} for outputs in found]
    return largest_difference(*found)


@pytest.mark.parametrize("family", ["bert", "vit", "torch", "albert", "timm"])
def test_a_latent_as_wide_as_the_input_loses_nothing(family: str) -> None:
    view, teacher, record = compress(family, rank=10_000, refit=False)
    assert {layer.latent for layer in view.layout.attention} == {WIDTH}
    assert difference(family, view, teacher) < 1e-5
    assert record.twin_error < 1e-6


def test_a_latent_of_all_numbers_of_few_heads_loses_nothing() -> None:
    """Where heads have fewer numbers than the input, full rank is the number of those."""
    view, teacher = (ModelView.of(make_model("bert")) for _ in range(2))
    task, examples = samples(view, "bert")
    for model in (view, teacher):
        run_pass(PruneHeads(ratio=0.75, scope="layer", refit=False, fold_mean=False), model, model, task, examples)
    run_pass(LatentKVPass(rank=10_000, refit=False), view, teacher, task, examples)
    assert {layer.latent for layer in view.layout.attention} == {2 * WIDTH // HEADS}
    assert difference("bert", view, teacher) < 1e-5


def test_errors_grow_as_ranks_shrink_and_the_refit_repairs_some() -> None:
    errors = [difference("bert", *compress("bert", rank=rank, refit=False)[:2]) for rank in (31, 16, 4)]
    assert errors == sorted(errors)
    _, _, record = compress("bert", rank=8)
    assert all(fit["after"] < fit["before"] for fit in record.refit)
    assert {fit["part"] for fit in record.refit} == {"attention"}


def test_mlps_make_good_a_part_of_what_a_small_latent_lost() -> None:
    left = []
    for also in (False, True):
        view, teacher, record = compress("bert", rank=4, ridge=1e-3, refit_mlp=also)
        assert {fit["part"] for fit in record.refit} == ({"attention", "mlp"} if also else {"attention"})
        (batch,) = samples(view, "bert")[1].batches(1000)
        found, wanted = (run(model.module, to_torch(batch.inputs)) for model in (view, teacher))
        left.append(float((found["last_hidden_state"] - wanted["last_hidden_state"]).square().mean()))
    assert left[1] < 0.9 * left[0]


def test_the_lost_energy_is_the_error_on_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, inputs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4, 10), (500, 10)))
    weights = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    latent = JointLatent([Block(heads=heads, weights=weights)], inputs.T @ inputs / 500, balanced=True)
    down, (up,) = latent.factor(6)
    wanted = torch.einsum("khd,td->tkh", heads, inputs)
    error = (wanted - torch.einsum("khr,rd,td->tkh", up, down, inputs)).square().sum() / wanted.square().sum()
    assert float(error) == pytest.approx(latent.lost(6))
    assert latent.lost(len(latent.energy)) == 0
    assert latent.rank_for(1 - latent.lost(6)) == 6
    assert float((inputs @ down.T).square().mean()) == pytest.approx(1)


def test_the_projector_is_that_of_whitened_weights() -> None:
    """Principal components of outputs, and a singular value decomposition behind a Cholesky factor, are one optimum."""
    generator = torch.Generator().manual_seed(1)
    heads, inputs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4, 10), (500, 10)))
    moment = inputs.T @ inputs / 500
    weights = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    down, (up,) = JointLatent([Block(heads=heads, weights=weights)], moment, balanced=True).factor(5)
    factor = torch.linalg.cholesky(moment)
    left, sizes, right = torch.linalg.svd(heads.flatten(0, 1) @ factor, full_matrices=False)
    whitened = (left[:, :5] * sizes[:5]) @ right[:5] @ torch.linalg.inv(factor)
    assert torch.allclose(up.flatten(0, 1) @ down, whitened, atol=1e-9)


def test_activations_beat_weights() -> None:
    """Inputs with few large directions: a latent of the outputs finds them, one of the weights does not."""
    errors = {}
    for method in ("outputs", "weights"):
        view, teacher = (ModelView.of(make_model("torch")) for _ in range(2))
        task, examples = samples(view, "torch")
        for row in examples.rows:
            row["tokens"][:, 4:] *= 0.05
        pass_ = LatentKVPass.model_validate({"rank": 6, "method": method, "refit": False})
        record = run_pass(pass_, view, teacher, task, examples)
        inputs = {"tokens": torch.as_tensor(examples.rows[0]["tokens"])[None]}
        errors[method] = largest_difference(run(view.module, inputs), run(teacher.module, inputs))
        assert record.plan.notes[0].startswith("loses ")
    assert errors["outputs"] < errors["weights"]


def test_smaller_is_real() -> None:
    view, teacher, _ = compress("bert", rank=8)
    inputs = make_inputs("bert")
    small, large = (model_cost(model, inputs) for model in (view, teacher))
    saved = LAYERS * (2 * WIDTH * WIDTH - 3 * 8 * WIDTH)
    assert large.macs - small.macs == saved * inputs["input_ids"].numel()
    # Two matrices and their biases become three matrices.
    assert large.parameters - small.parameters == saved + LAYERS * 2 * WIDTH


def test_notes_give_the_cost_of_both_forms() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    plan, _ = make_plan(LatentKVPass(rank=8), view, task, examples)
    assert "2,048 before, 768 now; absorbed 768, but 64 instead of 64 per pair of tokens" in plan.notes[0]


def test_energy_and_budget_choose_ranks() -> None:
    view, _, _ = compress("bert", energy=0.9, refit=False)
    ranks = [layer.latent for layer in view.layout.attention]
    assert all(1 < rank < WIDTH for rank in ranks)
    view, _, _ = compress("bert", energy=0.5, refit=False)
    assert all(less.latent < more for less, more in zip(view.layout.attention, ranks, strict=True))
    view, _, _ = compress("bert", budget=0.25, refit=False)
    assert sum(layer.kv_width for layer in view.layout.attention) == LAYERS * KV // 4


def test_a_budget_goes_where_it_helps_most() -> None:
    flat, steep = torch.full((8,), 1 / 8), torch.tensor([0.9, 0.1, 0, 0, 0, 0, 0, 0])
    assert spread_rank([flat, steep], 7, [8, 8]) == [6, 1]
    assert spread_rank([flat, steep], 10, [8, 8]) == [8, 2]
    assert spread_rank([flat, steep], 100, [8, 8]) == [8, 8]
    assert spread_rank([flat, steep], 14, [8, 8], 4) == [8, 4]
    assert spread_rank([flat, steep], 14, [6, 6], 4) == [6, 6], "the last step is smaller where no more is of use"


def test_ranks_are_rounded_to_sizes_that_kernels_like() -> None:
    for options in ({"energy": 0.7}, {"budget": 0.4}):
        view, _, _ = compress("bert", **options, round_to=8, refit=False)
        assert {layer.latent % 8 for layer in view.layout.attention} == {0}
    with pytest.raises(PlanError, match=r"(?s)leaves 4 numbers per token.*8 in every layer.*or round_to"):
        compress("bert", budget=0.02, round_to=8)


@pytest.mark.parametrize("family", ["bert", "torch", "llama", "gpt2"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    module = make_model(family)
    factory = "conftest:two_heads" if family == "torch" else None
    kind = "module" if factory else "transformers"
    checkpoint = Checkpoint(module=module, source="x", kind=kind, digest="x", factory=factory)
    view, teacher = checkpoint.view(), ModelView.of(make_model(family))
    task, examples = samples(view, family)
    rank = 8 if family != "llama" else (4, 6, 5)
    run_pass(LatentKVPass(rank=rank), view, teacher, task, examples)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.view().layout == view.layout
    inputs = make_inputs(family)
    assert largest_difference(run(loaded.module, inputs), run(module, inputs)) == 0
    found = inspect_checkpoint(str(tmp_path), sequence=4)
    assert [layer["latent"] for layer in found["layers"]] == ([8] * LAYERS if isinstance(rank, int) else list(rank))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_graph_is_smaller_and_gives_the_same(family: str, tmp_path: Path) -> None:
    view, _, _ = compress(family, rank=6, refit=False)
    _, examples = samples(view, family)
    to_onnx(view.module, examples.example_batch(), tmp_path / "model.onnx", dynamic=examples.dynamic_axes())
    inputs = make_inputs(family)
    with OrtRunner(tmp_path / "model.onnx") as runner:
        found = runner({name: tensor.numpy() for name, tensor in inputs.items()})
    mask = inputs["attention_mask"].bool()
    for name, tensor in run(view.module, inputs).items():
        actual = torch.as_tensor(found[name])
        kept = (tensor[mask], actual[mask]) if tensor.dim() > 2 else (tensor, actual)
        assert torch.allclose(*kept, atol=1e-4), name


def test_layouts_and_plans_survive_json() -> None:
    layout = AttentionLayout(query=(0, 1), kv=(0,), head_dim=4, latent=6, rotary=2, unrotated=4)
    other = AttentionLayout(query=(0, 1), kv=(0,), head_dim=4, latent=6, owner=0)
    assert Layout.from_json(Layout(attention=(layout, other)).to_json()).attention == (layout, other)
    assert (layout.kv_width, other.kv_width) == (8, 0)
    plan = EditPlan(edits=(LatentKV(layer=0, rank=3), LatentKV(layer=1, rank=3, rotary=2, unrotated=4)))
    assert EditPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4, "budget": 0.5},
        {"rank": 0},
        {"rank": [2, 0]},
        {"energy": 1.0},
        {"budget": 1.5},
        {"rank": 4, "round_to": 8},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LatentKVPass.model_validate(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": (4, 4)}, "rank has 2 entries"), ({"budget": 0.01}, "leaves 2 numbers per token")],
)
def test_plans_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compress("bert", **options)


def test_other_passes_come_before() -> None:
    view, teacher, _ = compress("bert", rank=8)
    task, examples = samples(view, "bert")
    for pass_ in (PruneHeads(ratio=0.25), ClusterHeadsPass(clusters=2), LatentKVPass(rank=4)):
        with pytest.raises(PlanError, match="come from a latent or from another layer already"):
            run_pass(pass_, view, teacher, task, examples)
    with pytest.raises(PlanError, match="would have a latent of 0 numbers"):
        LatentKV(layer=0, rank=0).check(AttentionLayout(query=(0,), kv=(0,), head_dim=4))
    clustered = AttentionLayout(query=(0, 1), kv=(0, 1), head_dim=4, represented=(0, 0))
    with pytest.raises(PlanError, match="clustered already"):
        LatentKV(layer=0, rank=1).check(clustered)


def test_surgery_that_is_not_exact_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break surgery on purpose: leave out what values gain on average."""
    monkeypatch.setattr(latent_surgery, "_with_latent", _without_bias)
    with pytest.raises(SurgeryError, match="differs from its exact twin"):
        compress("torch", rank=4)


def _without_bias(old: Any, weights: Any) -> Any:
    return replace(old, latent=weights.projections)


def test_a_latent_that_nobody_computed_is_an_error() -> None:
    view, _, _ = compress("bert", rank=8)
    values = view.attention[0].module.get_submodule("self.value")
    with pytest.raises(SurgeryError, match="that no layer has computed"):
        values(torch.zeros(1, 2, WIDTH))
    slot = Slot()
    slot.readers = 1
    slot.put(torch.ones(1))
    assert float(slot.take()) == 1
    with pytest.raises(SurgeryError):
        slot.take()
    assert isinstance(view.attention[0].module.get_submodule("self.key"), LatentKeys)
