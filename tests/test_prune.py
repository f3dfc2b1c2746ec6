"""prune: one budget for heads and neurons, spent where it costs least, and met by the exported graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import LAYERS, make_inputs, make_model
from test_passes import samples

from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.errors import PlanError
from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.edits import ClusterHeads, DropHeads, DropNeurons, EditPlan
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.prune import Prune

SCORES = ("reconstruction", "gauss-newton", "contribution")


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("macs", [0.9, 0.7])
def test_the_exported_graph_meets_the_budget_and_wastes_little(family: str, macs: float, tmp_path: Path) -> None:
    view, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(view, family)
    row = {name: tensor[:1].numpy() for name, tensor in make_inputs(family).items()}
    length = 7

    def graph(model: ModelView, name: str) -> int:
        to_onnx(model.module, row, tmp_path / name, dynamic={})
        return graph_cost(tmp_path / name, {n: a.shape for n, a in row.items()}, attention_scopes=[]).macs

    pass_ = Prune(macs=macs, round_to=2, refit=False)
    run_pass(pass_, view, teacher, task, examples, sequence=length)
    share = graph(view, "after.onnx") / graph(teacher, "before.onnx")
    assert macs - 0.05 < share <= macs


@pytest.mark.parametrize("score", SCORES)
def test_every_score_meets_the_budget(score: str) -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    plan, stats = make_plan(Prune.model_validate({"macs": 0.6, "score": score}), view, task, examples)
    assert saved(view, plan, stats) >= 0.4 * total(stats)
    assert f"of {total(stats):,} multiply-accumulates per sample stay" in plan.summary


def total(stats: HeadStats) -> int:
    return int(stats[Stat.MACS][2])


def saved(view: ModelView, plan: EditPlan, stats: HeadStats) -> int:
    heads, neurons, _ = stats[Stat.MACS]
    found = 0
    for edit in plan.edits:
        if isinstance(edit, DropNeurons):
            found += len(edit.neurons) * int(neurons[edit.layer])
        elif isinstance(edit, DropHeads):
            found += len(edit.query) // view.layout.attention[edit.layer].group * int(heads[edit.layer])
    return found


def test_a_budget_goes_where_nothing_is_lost() -> None:
    """Heads and neurons that add nothing go first, whatever layer and kind they are of."""
    view = ModelView.of(make_model("torch"))
    task, examples = samples(view, "torch")
    view.attention[1].read().output[:, 2] = 0.0
    view.mlp[2].read().down[:, 8:16] = 0.0
    stats = collect(view, task, examples, Prune(macs=0.5).needs())
    heads, neurons, _ = stats[Stat.MACS]
    share = 1 - (int(heads[1]) + 8 * int(neurons[2])) / total(stats) + 1e-9
    plan = Prune(macs=share).plan(view, stats)
    assert plan.edits == (DropHeads(layer=1, query=(2,)), DropNeurons(layer=2, neurons=tuple(range(8, 16))))


def test_one_budget_is_no_dearer_than_one_for_each_kind() -> None:
    """Against the published search, whose budget is lost after the first split: every split is as good as it can be."""
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    stats = collect(view, task, examples, Prune(macs=0.5, score="gauss-newton").needs())
    first, second = (Prune(macs=macs, score="gauss-newton", round_to=1).plan(view, stats) for macs in (0.8, 0.6))
    again = Prune(macs=0.8, score="gauss-newton", round_to=1).plan(view, stats)
    assert first == again, "a plan depends on those made before it"
    less, more = (saved(view, plan, stats) for plan in (first, second))
    unit = int(stats[Stat.MACS][0].max())
    assert 0.2 * total(stats) <= less < 0.2 * total(stats) + unit
    assert 0.4 * total(stats) <= more < 0.4 * total(stats) + unit


def test_sizes_are_rounded() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    pass_ = Prune(macs=0.6, round_to=12, heads_round_to=2, min_heads=2)
    plan, _ = make_plan(pass_, view, task, examples)
    after = plan.predict(view.layout)
    assert all(len(layer.query) in (2, 4) for layer in after.attention)
    assert all(len(mlp.neurons) % 12 == 0 for mlp in after.mlp)
    assert after != view.layout


def test_both_projections_are_refitted_in_the_order_in_which_they_run() -> None:
    view, teacher = (ModelView.of(make_model("bert")) for _ in range(2))
    task, examples = samples(view, "bert")
    record = run_pass(Prune(macs=0.6), view, teacher, task, examples)
    order = [(part, layer) for layer in range(LAYERS) for part in ("attention", "mlp")]
    first = min(
        order.index(("mlp" if isinstance(edit, DropNeurons) else "attention", edit.layer)) for edit in record.plan.edits
    )
    assert [(fit["part"], fit["layer"]) for fit in record.refit] == order[first:]
    unfitted, _ = ModelView.of(make_model("bert")), None
    run_pass(Prune(macs=0.6, refit=False), unfitted, teacher, task, examples)
    assert distance(view, teacher, examples) < 0.8 * distance(unfitted, teacher, examples)


def distance(view: ModelView, teacher: ModelView, examples: object) -> float:
    from headwise.model.forward import run, to_torch

    inputs = to_torch(examples.example_batch())  # type: ignore[attr-defined]
    with torch.no_grad():
        ours, theirs = (run(model.module, inputs)["last_hidden_state"] for model in (view, teacher))
    return float((ours - theirs).square().mean())


def test_what_cannot_be_met_is_refused() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    with pytest.raises(PlanError, match=r"macs: 0.1, but 0.\d+ of the multiply-accumulates cannot go"):
        make_plan(Prune(macs=0.1, round_to=24, min_heads=3), view, task, examples)


def test_clustered_layers_are_refused() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    surgery.apply(view, EditPlan(edits=(ClusterHeads(layer=1, clusters=((0, 1), (2, 3))),)))
    with pytest.raises(PlanError, match="heads of layer 1 are clustered already"):
        make_plan(Prune(macs=0.8), view, task, examples)
