"""Clustered heads: exact where heads attend alike, really gone from the weights, and right in both forms of a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FACTORIES,
    HEADS,
    LAYERS,
    MULTI_HEAD,
    allowed,
    largest_difference,
    make_inputs,
    make_model,
)
from pydantic import ValidationError
from runs import PLAIN, begun, write_recipe
from runs import run as run_recipe
from test_passes import samples

from headwise.errors import MachineError, PlanError
from headwise.export.onnx import to_onnx
from headwise.model.attend import attend, bind, form, plain
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import ClusterHeads, DropHeads, EditPlan, ShareKV
from headwise.model.forward import run, to_torch
from headwise.model.layout import AttentionLayout
from headwise.model.saving import save_checkpoint
from headwise.model.surgery import apply, twin, write
from headwise.model.view import ModelView
from headwise.passes.base import PassRecord, make_plan, run_pass
from headwise.passes.cluster_heads import ClusterHeadsPass
from headwise.passes.clustering import by_cost, by_similarity, elbow
from headwise.pipeline import stages
from headwise.tolerances import TWIN

CLUSTERS = ((2, 0), (1, 3))
"""Of the four heads: the second cluster's representative comes first in storage, the first one's does not."""


@pytest.fixture(params=allowed("cluster-heads"))
def family(request: pytest.FixtureRequest) -> str:
    """The name of every family that takes this pass, in turn."""
    return str(request.param)


def cluster(view: ModelView, family: str, **options: object) -> PassRecord:
    task, examples = samples(view, family)
    pass_ = ClusterHeadsPass.model_validate({"refit": False, **options})
    return run_pass(pass_, view, ModelView.of(make_model(family)), task, examples)


def plan_of(view: ModelView) -> EditPlan:
    """Clusters in every layer but one."""
    return EditPlan(edits=tuple(ClusterHeads(layer=index, clusters=CLUSTERS) for index in range(LAYERS - 1)))


def clustered(family: str) -> ModelView:
    view = ModelView.of(make_model(family))
    apply(view, plan_of(view))
    return view


def copy_scores(view: ModelView, source: int, copy: int) -> None:
    """Let one head of every layer attend as another one does; its values stay its own."""
    for layer in view.attention:
        old, group = layer.read(), layer.layout.group
        old.query[copy] = old.query[source]
        old.key[copy // group] = old.key[source // group]
        for bias, heads in ((old.query_bias, (copy, source)), (old.key_bias, (copy // group, source // group))):
            if bias is not None:
                bias[heads[0]] = bias[heads[1]]
        for parts in old.further.values():
            parts[copy] = parts[source]
        write(layer, old, layer.layout)


@pytest.mark.parametrize("affinity", ["output", "maps"])
def test_heads_that_attend_alike_cluster_losslessly(family: str, affinity: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    copy_scores(view, 1, 3)
    with torch.no_grad():
        before = run(view.module, inputs)
    record = cluster(view, family, clusters=HEADS - 1, affinity=affinity)
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) < 1e-4
    for edit in record.plan.edits:
        assert isinstance(edit, ClusterHeads)
        assert [set(c) for c in edit.clusters if len(c) > 1] == [{1, 3}]


def test_the_edited_model_is_its_twin_and_not_another_one(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    with torch.no_grad():
        untouched = run(view.module, inputs)
        with twin(view, plan_of(view)):
            expected = run(view.module, inputs)
        assert largest_difference(untouched, run(view.module, inputs)) == 0.0
        apply(view, plan_of(view))
        assert largest_difference(expected, run(view.module, inputs)) < TWIN
    assert largest_difference(untouched, expected) > 100 * TWIN
    other = ModelView.of(make_model(family))
    swapped = EditPlan(edits=tuple(ClusterHeads(layer=i, clusters=((0, 2), (1, 3))) for i in range(LAYERS - 1)))
    apply(other, swapped)
    with torch.no_grad():
        assert largest_difference(expected, run(other.module, inputs)) > 100 * TWIN


def test_queries_and_unread_keys_are_gone_from_the_weights(family: str) -> None:
    before, view = ModelView.of(make_model(family)).attention[0].read(), clustered(family)
    after, layout = view.attention[0].read(), view.attention[0].layout
    assert (len(after.query), layout.scoring) == (2, (1, 2))
    assert len(after.key) == len(layout.keyed) == (2 if family in MULTI_HEAD else len(layout.kv))
    assert after.value.shape == before.value.shape
    assert torch.equal(after.query, before.query[[1, 2]])
    assert layout.kv_width == (len(layout.keyed) + len(layout.kv)) * layout.head_dim


def test_the_key_of_a_group_that_no_representative_reads_goes() -> None:
    view = ModelView.of(make_model("llama"))
    plan = EditPlan(edits=(ClusterHeads(layer=0, clusters=((3, 0, 1), (2,))),))
    with torch.no_grad(), twin(view, plan):
        expected = run(view.module, make_inputs("llama"))
    apply(view, plan)
    assert view.attention[0].layout.keyed == (1,)
    assert len(view.attention[0].read().key) == 1
    with torch.no_grad():
        assert largest_difference(expected, run(view.module, make_inputs("llama"))) < TWIN


def test_as_many_clusters_as_heads_changes_nothing(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    with torch.no_grad():
        before = run(view.module, inputs)
    alone = tuple((head,) for head in view.attention[0].layout.query)
    apply(view, EditPlan(edits=(ClusterHeads(layer=0, clusters=alone),)))
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) == 0.0
    task, examples = samples(view, family)
    with pytest.raises(PlanError, match="as many clusters as heads"):
        make_plan(ClusterHeadsPass(clusters=HEADS), view, task, examples)


@pytest.mark.parametrize("family", ["bert", "llama", "torch"])
def test_permuted_heads_give_permuted_clusters(family: str) -> None:
    order = [2, 3, 0, 1]
    view, moved = (ModelView.of(make_model(family)) for _ in range(2))
    for layer in moved.attention:
        old = layer.read()
        kvs = [head // layer.layout.group for head in order[:: layer.layout.group]]
        for name, picked in (("query", order), ("key", kvs), ("value", kvs)):
            getattr(old, name)[:] = getattr(old, name)[picked].clone()
            bias = getattr(old, f"{name}_bias")
            if bias is not None:
                bias[:] = bias[picked].clone()
        old.output[:] = old.output[:, order].clone()
        write(layer, old, layer.layout)
    first, second = (cluster(v, family, clusters=2) for v in (view, moved))
    for left, right in zip(first.plan.edits, second.plan.edits, strict=True):
        assert isinstance(left, ClusterHeads)
        assert isinstance(right, ClusterHeads)
        assert {(c[0], frozenset(c)) for c in left.clusters} == {
            (order[c[0]], frozenset(order[head] for head in c)) for c in right.clusters
        }


def test_both_forms_and_full_masks_agree(family: str) -> None:
    view, inputs = clustered(family), make_inputs(family)
    with torch.no_grad():
        gathered = run(view.module, inputs)
        with form("fused"):
            fused = run(view.module, inputs)
    assert largest_difference(gathered, fused) < 1e-4


@pytest.mark.parametrize("hidden", [float("-inf"), -1e4, float(torch.finfo(torch.float32).min)])
def test_every_way_to_hide_a_key_is_the_same(hidden: float) -> None:
    module = torch.nn.Module().eval()
    bind(module, AttentionLayout(query=(0, 1), kv=(0, 1), head_dim=4, represented=(0, 0)))
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 2, 3, 4)
    seen = torch.tensor([True, True, False])[None, None, None].expand(1, 1, 3, 3)
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~seen, hidden)
    for name in ("gathered", "fused"):
        with form(name):
            assert torch.allclose(attend(module, q, k, v, seen)[0], attend(module, q, k, v, additive)[0], atol=1e-6)


def test_a_row_without_any_key_is_a_number() -> None:
    module = torch.nn.Module().eval()
    bind(module, AttentionLayout(query=(0, 1), kv=(0, 1), head_dim=4, represented=(0, 0)))
    q, v = torch.randn(1, 1, 3, 4), torch.randn(1, 2, 3, 4)
    for name in ("gathered", "fused"):
        with form(name):
            assert torch.isfinite(attend(module, q, q, v, torch.zeros(1, 1, 3, 3, dtype=torch.bool))[0]).all()


@pytest.mark.parametrize("family", sorted(set(allowed("cluster-heads")) - FACTORIES.keys()))
def test_a_clustered_checkpoint_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    view, inputs = clustered(family), make_inputs(family)
    checkpoint = Checkpoint(module=view.module, source="test", kind="transformers", digest="")
    save_checkpoint(checkpoint, view, tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.view().layout == view.layout
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(again.module, inputs)) == 0.0
        assert largest_difference(run(view.module, inputs), run(again.copy().module, inputs)) == 0.0
    assert "headwise" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("edit", [DropHeads(layer=0, query=(0,)), ShareKV(layer=0, groups=((0, 1), (2, 3)))])
def test_clustered_layers_are_not_pruned_or_shared_afterwards(edit: DropHeads | ShareKV) -> None:
    view = clustered("bert")
    with pytest.raises(PlanError, match="clustered already"):
        EditPlan(edits=(edit,)).check(view.layout)


@pytest.mark.parametrize("family", ["bert", "llama", "torch"])
@pytest.mark.parametrize("name", ["gathered", "fused"])
def test_the_graph_computes_scores_of_representatives_or_keeps_the_fused_node(
    family: str, name: str, tmp_path: Path
) -> None:
    view, inputs = clustered(family), {n: t.numpy() for n, t in make_inputs(family).items()}
    dynamic = {n: tuple(range(min(a.ndim, 2))) for n, a in inputs.items()}
    with form(name):
        info = to_onnx(view.module, inputs, tmp_path / "model.onnx", dynamic=dynamic)
    assert info.nodes.get("Attention", 0) == (1 if name == "gathered" else LAYERS)
    assert max(p.max_abs for p in info.parity) < 1e-4


def test_the_representative_is_the_medoid() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.7, 0.0], [0.9, 1.0, 0.9, 0.0], [0.7, 0.9, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert by_similarity(similarity, 2) == [[1, 0, 2], [3]]


def test_costs_need_not_be_symmetric() -> None:
    cost = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 9.0], [8.0, 9.0, 0.0]])
    assert by_cost(cost, 2) == [[2, 0], [1]]


def test_exchanges_find_what_greedy_removal_misses() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(9, 2, generator=generator)
    cost = torch.cdist(points, points) ** 2
    found = sum(float(cost[c, c[0]].sum()) for c in by_cost(cost, 3))
    every = torch.combinations(torch.arange(9), 3)
    best = min(float(cost[:, chosen].min(dim=1).values.sum()) for chosen in every)
    assert found == pytest.approx(best)


@pytest.mark.parametrize(
    ("errors", "count"), [([10.0, 1.0, 0.9, 0.8, 0.0], 2), ([4.0, 3.0, 2.0, 1.0, 0.0], 1), ([0.0, 0.0, 0.0], 1)]
)
def test_the_elbow_is_where_the_curve_bends(errors: list[float], count: int) -> None:
    assert elbow(errors) == count


def test_the_elbow_and_the_ratio_choose_counts_per_layer() -> None:
    view = ModelView.of(make_model("bert"))
    copy_scores(view, 1, 3)
    task, examples = samples(view, "bert")
    plan, _ = make_plan(ClusterHeadsPass(ratio=0.25), view, task, examples)
    assert [len(layer.scoring) for layer in plan.predict(view.layout).attention] == [3, 3, 3]
    plan, _ = make_plan(ClusterHeadsPass(clusters="elbow"), view, task, examples)
    assert all(len(layer.scoring) < HEADS for layer in plan.predict(view.layout).attention)


def test_layers_may_have_their_own_counts() -> None:
    view = ModelView.of(make_model("bert"))
    record = cluster(view, "bert", clusters=(1, 4, 3))
    assert [len(layer.scoring) for layer in record.after.attention] == [1, 4, 3]


def test_padding_has_no_say_in_the_clusters() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    short = {name: array[:5] for name, array in examples.rows[1].items()}
    long = {name: np.concatenate([array, np.zeros(2, dtype=array.dtype)]) for name, array in short.items()}
    plans = []
    for rows in ([short] * 3, [short, long, long]):
        given = type(examples).of(rows, source="made up", padding=examples.padding)
        plans.append(make_plan(ClusterHeadsPass(clusters=2), view, task, given)[0])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("options", [{}, {"clusters": 2, "ratio": 0.5}, {"clusters": 0}, {"clusters": "bend"}])
def test_contradicting_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ClusterHeadsPass.model_validate(options)


@pytest.mark.parametrize(("options", "message"), [({"clusters": (2, 2)}, "2 entries"), ({"ratio": 0.9}, "at least")])
def test_impossible_counts_are_refused(options: dict[str, object], message: str) -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    with pytest.raises(PlanError) as caught:
        make_plan(ClusterHeadsPass.model_validate(options), view, task, examples)
    assert message in str(caught.value)


def test_a_plain_layout_is_numbered_by_position() -> None:
    assert plain(4, 2, 8).reads(3) == 1


CLUSTERED = {"passes": [{"cluster-heads": {"clusters": 2, "ridge": 0.01}}], "gate": {"max_drop": 100}}


@pytest.mark.parametrize(
    ("overrides", "chosen", "why"),
    [
        (["export.clusters=gathered"], "gathered", "the recipe asks for it"),
        (["targets=[sm86]"], "fused", "TensorRT has one kernel"),
    ],
)
def test_a_run_exports_both_forms_and_goes_on_with_one(
    overrides: list[str],
    chosen: str,
    why: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = begun("plain", tmp_path_factory.getbasetemp(), tmp_path)
    write_recipe(folder, {**PLAIN, **CLUSTERED})
    monkeypatch.setattr(stages, "build_engine", no_builder)
    found = run_recipe(folder, *overrides)
    onnx = next(stage for stage in found.report["stages"] if stage["name"] == "onnx")
    assert onnx["status"] == "passed"
    forms = onnx["record"]["forms"]
    assert forms["form"] == chosen
    assert why in forms["why"]
    assert forms["macs"]["gathered"] < forms["macs"]["fused"]
    assert set(forms["latency_ms"]) == {"gathered", "fused"}
    assert onnx["cost"]["macs"] == forms["macs"][chosen]
    assert (onnx["record"]["nodes"].get("Attention", 0) == LAYERS) == (chosen == "fused")
    assert next(iter((folder / "out").glob("*-onnx"))).joinpath("model.onnx").exists()


def no_builder(*_: object, **__: object) -> None:
    raise MachineError("no builder in this test", expected="one", fix="none")


def test_mlps_make_good_a_part_of_what_attention_lost() -> None:
    task, examples = samples(ModelView.of(make_model("bert")), "bert")
    (batch,) = examples.batches(len(examples))
    teacher, inputs = ModelView.of(make_model("bert")), to_torch(batch.inputs)
    with torch.no_grad():
        expected = run(teacher.module, inputs)["last_hidden_state"]
    left, parts = [], []
    for options in ({"refit": False}, {"refit_mlp": False}, {}):
        view = ModelView.of(make_model("bert"))
        pass_ = ClusterHeadsPass.model_validate({"clusters": 2, "ridge": 1e-3, **options})
        record = run_pass(pass_, view, teacher, task, examples)
        parts.append([(fit["part"], fit["layer"]) for fit in record.refit])
        with torch.no_grad():
            left.append(float((run(view.module, inputs)["last_hidden_state"] - expected).square().mean()))
    order = [(part, layer) for layer in range(LAYERS) for part in ("attention", "mlp")]
    assert parts == [[], order[::2], order]
    assert left[2] < 0.9 * left[1] < 0.9 * left[0]
