"""Fewer kv heads: lossless where heads are alike up to what a layer cannot see, refused where it cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import NORMALISED, largest_difference, make_inputs, make_model
from pydantic import ValidationError
from test_passes import samples

from headwise.calibration.merge import pair_matrices
from headwise.errors import PlanError
from headwise.model.checkpoint import Checkpoint
from headwise.model.edits import DropHeads, EditPlan, ShareKV
from headwise.model.forward import run
from headwise.model.saving import save_checkpoint
from headwise.model.surgery import apply
from headwise.model.view import ModelView, Projections
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
    assert [(len(layer.query), len(layer.kv)) for layer in view.layout.attention] == [(4, 2), (2, 1), (4, 2)]


def test_a_count_that_does_not_divide_is_refused_with_those_that_do() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    with pytest.raises(
        PlanError, match=r"layer 0 has 4 kv heads, which 3 does not divide\n  expected: one of \[1, 2, 4\]"
    ):
        make_plan(ShareKVHeads(kv_heads=3), view, task, examples)
    with pytest.raises(PlanError, match="one per attention layer: 3"):
        make_plan(ShareKVHeads(kv_heads=(2, 2)), view, task, examples)
    with pytest.raises(PlanError, match="no layer has more kv heads"):
        make_plan(ShareKVHeads(kv_heads=8), view, task, examples)


def test_layers_may_differ() -> None:
    view = ModelView.of(make_model("gpt2"))
    share(view, "gpt2", kv_heads=(4, 2, 1))
    assert [len(layer.kv) for layer in view.layout.attention] == [4, 2, 1]


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "ratio": 0.5}, {"kv_heads": 0}, {"kv_heads": (2, 0)}])
def test_contradicting_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ShareKVHeads.model_validate(options)


@pytest.mark.parametrize("merge", ["subspace", "align"])
@pytest.mark.parametrize("family", sorted(NORMALISED))
def test_normalised_keys_are_refused_with_what_would_work(family: str, merge: str) -> None:
    view = ModelView.of(make_model(family))
    task, examples = samples(view, family)
    with pytest.raises(PlanError, match=r"normalises queries and keys.*\n  expected: merge: mean or first"):
        make_plan(ShareKVHeads.model_validate({"ratio": 0.5, "merge": merge}), view, task, examples)


def test_a_uniform_llama_loads_with_plain_transformers(tmp_path: Path) -> None:
    checkpoint = Checkpoint(module=make_model("llama"), source="llama", kind="transformers", digest="")
    view, inputs = checkpoint.view(), make_inputs("llama")
    share(view, "llama", kv_heads=1)
    save_checkpoint(checkpoint, view, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.config.num_key_value_heads == 1
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(stock, inputs)) == 0.0


def test_similar_heads_are_found_among_decoys() -> None:
    costs = torch.ones(6, 6)
    for left, right in ((0, 4), (1, 3), (2, 5)):
        costs[left, right] = costs[right, left] = 0.0
    assert cheapest(costs, 3, seed=0) == [[0, 4], [1, 3], [2, 5]]
    assert cheapest(costs, 3, seed=0) == cheapest(costs, 3, seed=0)
    assert cheapest(costs, 1, seed=0) == [[0, 1, 2, 3, 4, 5]]
    assert cheapest(costs, 6, seed=0) == [[0], [1], [2], [3], [4], [5]]
    assert adjacent(6, 3) == [[0, 1], [2, 3], [4, 5]]
