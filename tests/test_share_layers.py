"""share-layers: layers that read the latent, or the keys and values, of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, largest_difference, make_inputs, make_model
from pydantic import ValidationError
from test_latent_kv import difference
from test_passes import samples

from headwise.calibration.cross import translator
from headwise.calibration.stats import Stat, collect
from headwise.errors import PlanError, SurgeryError
from headwise.export.onnx import to_onnx
from headwise.export.runners import OrtRunner
from headwise.gates.cost import graph_cost
from headwise.gates.model_cost import model_cost
from headwise.model import latent_surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import EditPlan, ShareLayers
from headwise.model.forward import run
from headwise.model.layout import AttentionLayout
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import PassRecord, run_pass
from headwise.passes.prune_heads import PruneHeads
from headwise.passes.share_layers import ShareLayersPass

HOWS: tuple[dict[str, Any], ...] = ({}, {"rank": 6}, {"how": "mean"}, {"how": "reuse"})


def share(family: str, **options: Any) -> tuple[ModelView, ModelView, PassRecord]:
    view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(view, family)
    return view, teacher, run_pass(ShareLayersPass.model_validate(options), view, teacher, task, examples)


def alike(family: str) -> ModelView:
    """A model whose layers 0 and 1 have equal keys and values and equal inputs: the block between adds nothing."""
    view = ModelView.of(make_model(family))
    first, second = view.attention[:2]
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            second.module.get_submodule(name).load_state_dict(first.module.get_submodule(name).state_dict())
        for silent in (first.module.get_submodule("out_proj"), first.block.get_submodule("linear2")):
            for parameter in silent.parameters():
                parameter.zero_()
        second.block.get_submodule("norm1").load_state_dict(first.block.get_submodule("norm1").state_dict())
    return view


@pytest.mark.parametrize("options", HOWS[:1] + HOWS[2:])
def test_layers_with_equal_inputs_and_weights_share_without_loss(options: dict[str, Any]) -> None:
    view, teacher = alike("torch"), alike("torch")
    task, examples = samples(view, "torch")
    run_pass(ShareLayersPass.model_validate({"refit": False, **options}), view, teacher, task, examples)
    assert [layer.owner for layer in view.layout.attention] == [None, 0, None]
    # A translator is pulled towards zero a little.
    assert difference("torch", view, teacher) < (1e-5 if options else 1e-2)


@pytest.mark.parametrize("options", HOWS)
@pytest.mark.parametrize("family", ["bert", "torch"])
def test_the_edited_model_is_its_twin_and_the_refit_helps(family: str, options: dict[str, Any]) -> None:
    view, _, record = share(family, **options)
    assert record.twin_error < 1e-5
    assert all(fit["after"] <= fit["before"] for fit in record.refit)
    assert any(fit["after"] < fit["before"] for fit in record.refit)
    rank = options.get("rank", 0 if options else WIDTH)
    assert [(layer.latent, layer.owner) for layer in view.layout.attention[:2]] == [(rank, None), (rank, 0)]
    assert view.layout.attention[1].kv_width == 0


def test_a_translator_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.randn(200, 5, generator=generator, dtype=torch.float64), torch.ones(200, 1)], dim=1)
    wanted = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    x = torch.cat([y @ wanted.T, torch.ones(200, 1)], dim=1)
    assert torch.allclose(translator(x.T @ y / 200, y.T @ y / 200, constant=True), wanted, atol=1e-2)
    assert float(translator(x.T @ y / 200, y.T @ y / 200, constant=False)[:, -1].abs().max()) == 0


def test_cross_moments_are_of_real_tokens() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    found = collect(view, task, examples, {Stat.CROSS_MOMENT, Stat.INPUT_MOMENT}, pairs={1: 0, 2: 2})
    cross, own = found[Stat.CROSS_MOMENT], found[Stat.INPUT_MOMENT]
    assert cross[0].numel() == 0
    assert torch.allclose(cross[2], own[2])
    assert torch.allclose(cross[1][-1], own[0][-1])
    assert torch.allclose(cross[1][:, -1], own[1][-1])


@pytest.mark.parametrize(("options", "saved"), list(zip(HOWS, (0, 4 * WIDTH - 30, 2 * WIDTH, 2 * WIDTH), strict=True)))
def test_nothing_dead_is_left(options: dict[str, Any], saved: int) -> None:
    view, teacher, _ = share("bert", **options, refit=False)
    inputs = make_inputs("bert")
    small, large = (model_cost(model, inputs) for model in (view, teacher))
    assert large.macs - small.macs == saved * WIDTH * inputs["input_ids"].numel()


@pytest.mark.parametrize("options", [{"rank": 6}, {"how": "reuse"}])
def test_nothing_dead_is_in_the_graph(options: dict[str, Any], tmp_path: Path) -> None:
    view, _, _ = share("bert", **options, refit=False)
    inputs = make_inputs("bert")
    _, examples = samples(view, "bert")
    to_onnx(view.module, examples.example_batch(), tmp_path / "a.onnx", dynamic=examples.dynamic_axes())
    graph = graph_cost(tmp_path / "a.onnx", {name: tuple(tensor.shape) for name, tensor in inputs.items()})
    assert graph.macs == model_cost(view, inputs).macs
    with OrtRunner(tmp_path / "a.onnx") as runner:
        found = runner({name: tensor.numpy() for name, tensor in inputs.items()})
    mask = inputs["attention_mask"].bool()
    wanted = run(view.module, inputs)["last_hidden_state"]
    assert torch.allclose(wanted[mask], torch.as_tensor(found["last_hidden_state"])[mask], atol=1e-4)


@pytest.mark.parametrize("options", HOWS)
def test_saved_and_loaded_it_is_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(module=make_model("bert"), source="x", kind="transformers", digest="x")
    view, teacher = checkpoint.view(), ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    run_pass(ShareLayersPass.model_validate(options), view, teacher, task, examples)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.view().layout == view.layout
    inputs = make_inputs("bert")
    wanted = run(checkpoint.module, inputs)
    assert largest_difference(run(loaded.module, inputs), wanted) == 0
    assert largest_difference(run(loaded.copy().module, inputs), wanted) == 0


def test_groups_name_layers() -> None:
    view, _, _ = share("bert", groups=[[0, 2]])
    assert [layer.owner for layer in view.layout.attention] == [None, None, 0]
    view, _, _ = share("bert", factor=3, rank=8)
    assert [layer.owner for layer in view.layout.attention] == [None, 0, 0]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"groups": [[0, 3]]}, r"groups name layers \[0, 3\]"),
        ("bert", {"groups": [[0, 1], [1, 2]]}, "groups name layers"),
        ("bert", {"groups": [[0], [1]]}, "no group has two layers"),
        ("bert", {"groups": [[1, 0]]}, "layer 0 .* cannot read layer 1"),
        ("albert", {}, "cannot read layer"),
        ("clip", {"groups": [[0, 1]]}, "cannot read layer"),
        ("qwen3", {}, "normalises queries and keys"),
        ("gemma2", {}, "caps its scores"),
        ("gemma2", {"how": "mean", "groups": [[0, 1]]}, "layer 1 .* cannot read layer 0"),
    ],
)
def test_groups_that_cannot_be_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        share(family, **options)


def test_borrowed_heads_have_the_shape_of_the_owner() -> None:
    view, teacher = (ModelView.of(make_model("bert")) for _ in range(2))
    task, examples = samples(view, "bert")
    for model in (view, teacher):
        with torch.no_grad():
            model.attention[1].read().output[:, :2] = 0
        run_pass(PruneHeads(ratio=2 / 12, refit=False, fold_mean=False), model, model, task, examples)
    assert [len(layer.kv) for layer in view.layout.attention] == [4, 2, 4]
    with pytest.raises(PlanError, match="as many, as wide ones"):
        run_pass(ShareLayersPass(how="reuse"), view, teacher, task, examples)
    run_pass(ShareLayersPass(), view, teacher, task, examples)


@pytest.mark.parametrize("options", [{"factor": 1}, {"rank": 0}, {"rank": 4, "how": "mean"}])
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ShareLayersPass.model_validate(options)


def test_an_owner_comes_first() -> None:
    edit = ShareLayers(layer=1, owner=1, rank=0)
    with pytest.raises(PlanError, match="would read from layer 1"):
        edit.check(AttentionLayout(query=(0,), kv=(0,), head_dim=4))
    plan = EditPlan(edits=(ShareLayers(layer=1, owner=0, rank=3),))
    assert EditPlan.from_json(plan.to_json()) == plan


def test_sharing_that_is_not_exact_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break surgery on purpose: let the reader keep keys and values of its own."""
    monkeypatch.setattr(latent_surgery, "lend", lambda *_: None)
    with pytest.raises(SurgeryError):
        share("bert", how="reuse")
