"""Fewer kv heads: lossless where heads are alike up to what a layer cannot see, refused where it cannot be right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from conftest import NORMALISED, largest_difference, make_inputs, make_model
from pydantic import ValidationError
from test_passes import samples

from headwise.calibration.merge import pair_matrices
from headwise.errors import PlanError
from headwise.export.onnx import to_onnx
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import ClusterHeads, DropHeads, EditPlan, ShareKV
from headwise.model.forward import run
from headwise.model.projections import Projections
from headwise.model.saving import save_checkpoint
from headwise.model.surgery import apply
from headwise.model.view import ModelView
from headwise.passes.base import PassRecord, make_plan, run_pass
from headwise.passes.grouping import adjacent, cheapest
from headwise.passes.share_kv import ShareKVHeads

FAMILIES = (
    "bert",
    "vit",
    "gpt2",
    "torch",
    "distilbert",
    "wrapped",
    "albert",
    "bart",
    "whisper",
    "t5",
    "llama",
    "gpt-neox",
    "phi3",
    "opt",
    "gemma2",
    "clip",
)


def share(view: ModelView, family: str, **options: object) -> PassRecord:
    task, examples = samples(view, family)
    pass_ = ShareKVHeads.model_validate({"refit": False, **options})
    return run_pass(pass_, view, ModelView.of(make_model(family)), task, examples)


def disguise(view: ModelView, pairs: list[tuple[int, int]]) -> None:
    """Make the second head of every pair a copy of the first under a basis that the layer cannot see."""
    generator = torch.Generator().manual_seed(0)
    for layer in view.attention:
        old, width, rotated = layer.read(), layer.layout.head_dim, layer.rotated
        for source, copy in pairs:
            basis = torch.eye(width) + 0.4 * torch.randn(width, width, generator=generator)
            turns = torch.polar(torch.ones(1, rotated // 2), torch.rand(1, rotated // 2, generator=generator))
            key_basis = torch.block_diag(1.3 * pair_matrices(turns)[0].float(), basis[rotated:, rotated:])
            copy_head(old, source, copy, key_basis, basis.T)


def copy_head(old: Projections, source: int, copy: int, key_basis: torch.Tensor, value_basis: torch.Tensor) -> None:
    old.key[copy] = key_basis @ old.key[source]
    old.value[copy] = value_basis @ old.value[source]
    for bias, basis in ((old.key_bias, key_basis), (old.value_bias, value_basis)):
        if bias is not None:
            bias[copy] = basis @ bias[source]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold_bias", [True, False])
def test_disguised_copies_merge_losslessly(family: str, fold_bias: bool) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    kvs = len(view.layout.attention[0].kv)
    disguise(view, [(0, 2), (3, 1)] if kvs == 4 else [(0, 1)])
    with torch.no_grad():
        before = run(view.module, inputs)
    record = share(view, family, kv_heads=kvs // 2, fold_bias=fold_bias)
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) < 2e-3 * largest(before)
    for edit in record.plan.edits:
        assert isinstance(edit, ShareKV)
        assert sorted(map(sorted, edit.groups)) == ([[0, 2], [1, 3]] if kvs == 4 else [[0, 1]])


def largest(outputs: dict[str, torch.Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in outputs.values())


def test_mean_pooling_fails_where_the_subspace_succeeds() -> None:
    differences = {}
    for merge in ("mean", "subspace", "align", "first"):
        view, inputs = ModelView.of(make_model("bert")), make_inputs("bert")
        disguise(view, [(0, 1), (2, 3)])
        with torch.no_grad():
            before = run(view.module, inputs)
        share(view, "bert", kv_heads=2, merge=merge, grouping="adjacent")
        with torch.no_grad():
            differences[merge] = largest_difference(before, run(view.module, inputs))
    assert differences["subspace"] < 1e-2 < differences["mean"]
    assert differences["subspace"] < 0.1 * min(differences["align"], differences["first"])


@pytest.mark.parametrize("merge", ["mean", "first", "align"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_identical_heads_are_lossless_for_every_merge(family: str, merge: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    kvs = len(view.layout.attention[0].kv)
    identity = torch.eye(view.layout.attention[0].head_dim)
    for layer in view.attention:
        for copy in range(1, kvs):
            copy_head(layer.read(), 0, copy, identity, identity)
    with torch.no_grad():
        before = run(view.module, inputs)
    share(view, family, kv_heads=1, merge=merge, grouping="adjacent")
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) < 1e-4 * largest(before)


def test_the_published_initialisation_is_the_mean_of_the_weights() -> None:
    view, original = (ModelView.of(make_model("bert")) for _ in range(2))
    share(view, "bert", kv_heads=2, merge="mean", grouping="adjacent", fold_bias=False)
    for ours, theirs in zip(view.attention, original.attention, strict=True):
        new, old = ours.read(), theirs.read()
        assert torch.allclose(new.key, old.key.unflatten(0, (2, 2)).mean(1), atol=1e-6)
        assert old.value_bias is not None
        assert new.value_bias is not None
        assert torch.allclose(new.value_bias, old.value_bias.unflatten(0, (2, 2)).mean(1), atol=1e-6)
        assert torch.equal(new.query, old.query)
        assert torch.allclose(new.output, old.output)


def test_restored_norms_are_those_of_the_members() -> None:
    view, original = (ModelView.of(make_model("bert")) for _ in range(2))
    share(view, "bert", kv_heads=1, merge="mean", restore_norm=True, fold_bias=False)
    for ours, theirs in zip(view.attention, original.attention, strict=True):
        old = theirs.read()
        assert old.key_bias is not None
        members = torch.cat([old.key, old.key_bias[..., None]], dim=2).flatten(1).norm(dim=1).mean()
        new = ours.read()
        assert new.key_bias is not None
        assert float(torch.cat([new.key, new.key_bias[..., None]], dim=2).norm()) == pytest.approx(
            float(members), rel=1e-4
        )


def test_the_edit_regroups_queries_under_their_original_ids() -> None:
    layout = ModelView.of(make_model("bert")).layout
    plan = EditPlan(edits=(ShareKV(layer=0, groups=((0, 2), (1, 3))),))
    after = plan.predict(layout).attention[0]
    assert after.query == (0, 2, 1, 3)
    assert after.kv == (0, 1)
    assert after.group == 2
    assert EditPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("groups", "message"),
    [(((0, 1), (2,)), "the groups hold"), (((0, 1, 2), (3,)), r"groups of \[1, 3\]"), (((0, 0), (1, 2)), "hold")],
)
def test_broken_groups_are_refused(groups: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        EditPlan(edits=(ShareKV(layer=0, groups=groups),)).check(ModelView.of(make_model("bert")).layout)


def test_pruned_layers_share_what_they_have_left() -> None:
    view = ModelView.of(make_model("bert"))
    apply(view, EditPlan(edits=(DropHeads(layer=1, query=(1, 2)),)))
    share(view, "bert", ratio=0.5)
    assert counts(view) == [(4, 2), (2, 1), (4, 2)]


def counts(view: ModelView) -> list[tuple[int, int]]:
    return [(len(layer.query), len(layer.kv)) for layer in view.layout.attention]


@pytest.mark.parametrize(
    ("uneven", "kept", "notes"),
    [
        ("fewer", [2, 1, 1], {1: "1 because 2 does not divide 3; ", 2: "keeps its 1 kv heads"}),
        ("more", [2, 3, 1], {1: "3 because 2 does not divide 3", 2: "keeps its 1 kv heads"}),
    ],
)
def test_unequal_layers_get_a_number_that_divides_theirs(uneven: str, kept: list[int], notes: dict[int, str]) -> None:
    view = ModelView.of(make_model("bert"))
    dropped = (DropHeads(layer=1, query=(2,)), DropHeads(layer=2, query=(0, 1, 3)))
    apply(view, EditPlan(edits=dropped))
    record = share(view, "bert", kv_heads=2, uneven=uneven)
    assert [kv for _, kv in counts(view)] == kept
    assert [query for query, _ in counts(view)] == [4, 3, 1]
    for layer, note in notes.items():
        assert record.plan.notes[layer].startswith(note)
    assert record.plan.notes[0].startswith("a shared subspace loses")
    assert EditPlan.from_json(json.loads(json.dumps(record.plan.to_json()))) == record.plan


def test_a_ratio_saves_that_much_or_more() -> None:
    kept = {}
    for ratio in (0.2, 0.25, 0.5, 2 / 3, 0.75, 0.9):
        pass_ = ShareKVHeads(ratio=ratio)
        kept[ratio] = [pass_._target(0, count, count * (1 - ratio))[0] for count in (12, 9, 7, 3, 1)]
    assert kept[0.5] == [6, 3, 1, 1, 1]
    assert kept[2 / 3] == [4, 3, 1, 1, 1]
    assert kept[0.25] == [6, 3, 1, 1, 1]
    assert kept[0.9] == [1] * 5
    assert all(count <= (1 - ratio) * 12 + 1e-6 for ratio, (count, *_) in kept.items())
    with_more = ShareKVHeads(ratio=0.5, uneven="more")
    assert [with_more._target(0, count, count / 2)[0] for count in (12, 9, 7, 3)] == [6, 9, 7, 3]


def test_grouped_queries_keep_their_readers_together() -> None:
    """GQA in, fewer kv heads out: queries that read one head before read one head afterwards."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=40,
    )
    view, inputs = (
        ModelView.of(transformers.LlamaForCausalLM(config).eval().requires_grad_(False)),
        make_inputs("llama"),
    )
    disguise(view, [(0, 2), (3, 1)])
    task, examples = samples(view, "llama")
    with torch.no_grad():
        before = run(view.module, inputs)
    run_pass(ShareKVHeads(kv_heads=2, refit=False), view, view, task, examples)
    (layer,) = view.layout.attention
    assert layer.query == (0, 1, 4, 5, 2, 3, 6, 7)
    assert layer.kv == (0, 1)
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) < 2e-3 * largest(before)


def test_heads_removed_from_every_group_share_consistently() -> None:
    view = ModelView.of(make_model("llama"))
    inputs = make_inputs("llama")
    # One query head of each group goes, and not the same one: kv head 0 keeps query 1, kv head 1 keeps query 2.
    apply(view, EditPlan(edits=(DropHeads(layer=0, query=(0, 3)),)))
    assert view.layout.attention[0].query == (1, 2)
    record = share(view, "llama", kv_heads=1)
    assert record.twin_error < 1e-5
    assert counts(view) == [(2, 1), (4, 1), (4, 1)]
    assert run(view.module, inputs)["logits"].isfinite().all()


def test_a_count_that_does_not_divide_can_be_refused_with_those_that_do() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    with pytest.raises(
        PlanError, match=r"layer 0 has 4 kv heads, which 3 does not divide\n  expected: one of \[1, 2, 4\]"
    ):
        make_plan(ShareKVHeads(kv_heads=3, uneven="refuse"), view, task, examples)
    with pytest.raises(PlanError, match="one per attention layer: 3"):
        make_plan(ShareKVHeads(kv_heads=(2, 2)), view, task, examples)
    for options in ({"kv_heads": 8}, {"kv_heads": 3, "uneven": "more"}):
        with pytest.raises(PlanError, match="no layer has more kv heads"):
            make_plan(ShareKVHeads.model_validate(options), view, task, examples)


def test_clustered_layers_are_refused() -> None:
    view = ModelView.of(make_model("bert"))
    apply(view, EditPlan(edits=(ClusterHeads(layer=1, clusters=((0, 1), (2, 3))),)))
    task, examples = samples(view, "bert")
    with pytest.raises(PlanError, match=r"heads of layer 1 are clustered already"):
        make_plan(ShareKVHeads(kv_heads=2), view, task, examples)


def test_layers_may_differ() -> None:
    view = ModelView.of(make_model("gpt2"))
    share(view, "gpt2", kv_heads=(4, 2, 1))
    assert [len(layer.kv) for layer in view.layout.attention] == [4, 2, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2, "ratio": 0.5},
        {"kv_heads": 0},
        {"kv_heads": (2, 0)},
        {"ratio": 1.0},
        {"kv_heads": 2, "rounds": -1},
        {"kv_heads": 2, "ridge": 0.0},
        {"kv_heads": 2, "restore_norm": True},
        {"kv_heads": 2, "merge": "median"},
    ],
)
def test_contradicting_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ShareKVHeads.model_validate(options)


@pytest.mark.parametrize("merge", ["subspace", "align"])
@pytest.mark.parametrize("family", sorted(NORMALISED))
def test_normalised_keys_are_refused_with_what_would_work(family: str, merge: str) -> None:
    view = ModelView.of(make_model(family))
    task, examples = samples(view, family)
    with pytest.raises(PlanError, match=r"normalises queries and keys.*\n  expected: merge_keys: mean or first"):
        make_plan(ShareKVHeads.model_validate({"ratio": 0.5, "merge": merge}), view, task, examples)


@pytest.mark.parametrize("keys", ["mean", "first"])
def test_models_that_normalise_keys_share_them_without_a_change_of_basis(keys: str) -> None:
    view, original = (ModelView.of(make_model("qwen3")) for _ in range(2))
    share(view, "qwen3", kv_heads=1, merge_keys=keys)
    for ours, theirs in zip(view.attention, original.attention, strict=True):
        new, old = ours.read(), theirs.read()
        assert torch.allclose(new.key[0], old.key.mean(0) if keys == "mean" else old.key[0], atol=1e-6)
        assert torch.equal(new.query, old.query)
        assert not torch.allclose(new.value[0], old.value.mean(0), atol=1e-2), "values have their own way"
        assert not torch.allclose(new.output, old.output, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3"])
def test_uniform_results_load_with_plain_transformers(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(module=make_model(family), source=family, kind="transformers", digest="")
    view, inputs = checkpoint.view(), make_inputs(family)
    keys = {"merge_keys": "mean"} if family == "qwen3" else {}
    share(view, family, kv_heads=1, **keys)
    save_checkpoint(checkpoint, view, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.config.num_key_value_heads == 1
    assert stock.model.layers[0].self_attn.k_proj.out_features == stock.config.head_dim
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(stock, inputs)) == 0.0
    again = load_checkpoint(tmp_path)
    assert again.view().layout == view.layout, "heads keep their ids"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "bert", "gpt2"])
def test_unequal_results_load_with_headwise(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(module=make_model(family), source=family, kind="transformers", digest="")
    view, inputs = checkpoint.view(), make_inputs(family)
    many = len(view.layout.attention[0].kv)
    share(view, family, kv_heads=(many, 1, many))
    save_checkpoint(checkpoint, view, tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.view().layout == view.layout
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(again.module, inputs)) == 0.0


@pytest.mark.parametrize("family", ["bert", "llama", "torch"])
def test_the_graph_groups_heads_without_repeating_them(family: str, tmp_path: Path) -> None:
    view = ModelView.of(make_model(family))
    share(view, family, kv_heads=1)
    inputs = {name: tensor.numpy() for name, tensor in make_inputs(family).items()}
    dynamic = {name: (0, 1) if array.ndim == 2 else (0,) for name, array in inputs.items()}
    to_onnx(view.module, inputs, tmp_path / "model.onnx", dynamic=dynamic)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    nodes = [node for node in graph.node if node.op_type == "Attention"]
    assert len(nodes) == 3
    assert [[shapes[name][1] for name in node.input[:3]] for node in nodes] == [[4, 1, 1]] * 3
    makers = {name: node for node in graph.node for name in node.output}
    for node, layer in zip(nodes, view.layout.attention, strict=True):
        for name in node.input[1:3]:
            operators, width = between(name, makers, shapes)
            assert not operators & {"Expand", "Tile", "ScatterND", "Gather", "GatherElements", "Concat"}, operators
            assert width in {layer.head_dim, (len(layer.query) + 2) * layer.head_dim}, "keys and values have one head"


def between(name: str, makers: dict[str, onnx.NodeProto], shapes: dict[str, list[int]]) -> tuple[set[str], int]:
    """The operators from keys or values back to their projection, and its width."""
    operators: set[str] = set()
    while (node := makers[name]).op_type not in ("MatMul", "Gemm"):
        operators.add(node.op_type)
        name = next(source for source in node.input if source in makers and makers[source].op_type != "Constant")
    return operators, shapes[name][-1]


def test_similar_heads_are_found_among_decoys() -> None:
    alike = ({0, 4}, {1, 3}, {2, 5})

    def cost(group: Sequence[int]) -> float:
        return float(set(group) not in alike)

    assert cheapest(cost, 6, 3, seed=0) == [[0, 4], [1, 3], [2, 5]]
    assert cheapest(cost, 6, 3, seed=0) == cheapest(cost, 6, 3, seed=0)
    assert cheapest(cost, 6, 1, seed=0) == [[0, 1, 2, 3, 4, 5]]
    assert cheapest(cost, 6, 6, seed=0) == [[0], [1], [2], [3], [4], [5]]
    assert adjacent(6, 3) == [[0, 1], [2, 3], [4, 5]]


def test_groups_are_judged_as_a_whole() -> None:
    """Every two of these heads look alike, but only two triples lie in one plane."""
    planes = ({0, 3, 4}, {1, 2, 5})

    def cost(group: Sequence[int]) -> float:
        return 1.0 if len(group) < 3 else float(set(group) not in planes)

    assert cheapest(cost, 6, 2, seed=0) == [[0, 3, 4], [1, 2, 5]]


@pytest.mark.parametrize(("count", "groups"), [(6, 3), (8, 2), (12, 4), (24, 4)])
def test_groups_never_cost_more_than_neighbours_and_the_search_ends(count: int, groups: int) -> None:
    looked_at: set[tuple[int, ...]] = set()

    def cost(group: Sequence[int]) -> float:
        looked_at.add(tuple(group))
        return float(torch.rand(1, generator=torch.Generator().manual_seed(hash(tuple(group)) % 2**31)))

    found = cheapest(cost, count, groups, seed=0)
    assert sorted(head for group in found for head in group) == list(range(count))
    assert {len(group) for group in found} == {count // groups}
    assert sum(map(cost, found)) <= sum(map(cost, adjacent(count, groups)))
    assert len(looked_at) <= count * (count - 1) // 2 + 500 + groups
