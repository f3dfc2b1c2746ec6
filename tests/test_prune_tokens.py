"""Token pruning: each head's own keys, gathered; exact against masks, padding without influence, really less work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DECODERS, LAYERS, SEQ2SEQ, WIDTH, allowed, largest_difference, make_inputs, make_model
from pydantic import ValidationError
from runs import TEXT, begun, write_recipe
from runs import run as run_recipe
from test_passes import samples

from headwise.calibration.stats import Stat, collect
from headwise.errors import PlanError, UnsupportedModelError
from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.model.checkpoint import load_checkpoint
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run, to_torch
from headwise.model.layout import AttentionLayout
from headwise.model.saving import save_checkpoint
from headwise.model.surgery import apply, twin
from headwise.model.token_budget import TokenBudget
from headwise.model.token_edits import KeepTokens
from headwise.model.token_select import Parts, Tokens, keep_keys, scores_of
from headwise.model.token_tally import Sum, turn_of
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.prune_tokens import PruneTokens, _spread
from headwise.pipeline.report.head_maps import head_maps
from headwise.tolerances import TWIN

ENCODERS = sorted(set(allowed("prune-tokens")) - DECODERS - SEQ2SEQ - {"clip", "clip-text"})
HALF = TokenBudget(keep=0.5)
VARIANTS = {
    "pooled": HALF,
    "received": replace(HALF, score="received"),
    "accumulated": replace(HALF, score="accumulated"),
    "window": replace(HALF, score="window", queries=2),
    "random": replace(HALF, score="random"),
    "dropped": replace(HALF, rest="drop"),
    "shared": replace(HALF, shared=True, weighted=False),
    "ends": replace(HALF, first=2, last=1),
}


def plan_of(view: ModelView, budget: TokenBudget) -> EditPlan:
    return EditPlan(edits=tuple(KeepTokens(layer=layer.index, budget=budget) for layer in view.attention))


def pruned(family: str, budget: TokenBudget) -> ModelView:
    view = ModelView.of(make_model(family))
    apply(view, plan_of(view, budget))
    return view


def outputs(view: ModelView, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return run(view.module, inputs)


def heads(seed: int = 0, tokens: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of two rows and three heads."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, tokens, 12, generator=generator) for _ in range(3))  # type: ignore[return-value]


def attention(budget: TokenBudget | None, *parts: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    query, key, value = parts
    if budget is not None:
        kept = keep_keys(budget, Parts(query=query, key=key, value=value, scale=1.0), shift)
        key, value, shift = kept.key, kept.value, kept.shift
    scores = query @ key.mT if shift is None else query @ key.mT + shift
    return torch.softmax(scores, dim=-1) @ value


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("name", ["pooled", "dropped"])
def test_gathered_keys_give_what_masked_keys_give(family: str, name: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    untouched = outputs(view, inputs)
    plan = plan_of(view, VARIANTS[name])
    with twin(view, plan):
        expected = outputs(view, inputs)
    assert largest_difference(untouched, outputs(view, inputs)) == 0.0
    apply(view, plan)
    assert largest_difference(expected, outputs(view, inputs)) < TWIN
    assert largest_difference(untouched, expected) > 100 * TWIN


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_is_its_twin_and_padding_has_no_influence(name: str) -> None:
    view, inputs = pruned("bert", VARIANTS[name]), make_inputs("bert")
    batch = outputs(view, inputs)["last_hidden_state"]
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in inputs.items()}
        assert float((batch[row, :length] - outputs(view, alone)["last_hidden_state"][0]).abs().max()) < TWIN
    other = ModelView.of(make_model("bert"))
    with twin(other, plan_of(other, VARIANTS[name])):
        expected = outputs(other, inputs)["last_hidden_state"]
    valid = inputs["attention_mask"].bool()
    assert float((batch - expected)[valid].abs().max()) < TWIN


def test_a_share_of_one_changes_nothing() -> None:
    view, inputs = ModelView.of(make_model("bert")), make_inputs("bert")
    before = outputs(view, inputs)
    apply(view, plan_of(view, replace(HALF, keep=1.0)))
    assert view.layout == ModelView.of(make_model("bert")).layout
    assert largest_difference(before, outputs(view, inputs)) == 0.0
    parts = heads()
    assert float((attention(replace(HALF, keep=0.999), *parts) - attention(None, *parts)).abs().max()) < 1e-5


def test_a_token_that_nobody_looks_at_is_dropped_without_loss() -> None:
    query, key, value = heads()
    query[..., 0] = 5.0
    key[:, :, 4:, 0] = -20.0
    budget = replace(HALF, rest="drop", score="received")
    assert float((attention(budget, query, key, value) - attention(None, query, key, value)).abs().max()) < 1e-5
    key[:, :, 3, 0] = -20.0
    key[:, :, 5, 0] = 0.0
    assert float((attention(budget, query, key, value) - attention(None, query, key, value)).abs().max()) < 1e-5


def test_tokens_with_equal_keys_become_one_without_loss_whatever_their_values() -> None:
    query, key, value = heads()
    query[..., 0] = 1.0
    key[:, :, 4:] = key[:, :, 4:5]
    key[:, :, 4:, 0] -= 6.0
    exact = attention(None, query, key, value)
    budget = replace(HALF, score="received", weighted=False)
    assert float((attention(budget, query, key, value) - exact).abs().max()) < 1e-5
    assert float((attention(replace(budget, rest="drop"), query, key, value) - exact).abs().max()) > 1e-4


def test_heads_keep_tokens_of_their_own_and_the_protected_ones() -> None:
    query, key, value = heads(tokens=16)
    value[:, :, 0] = value[:, :, -1] = 0.0
    budget = TokenBudget(keep=0.25, rest="drop", first=1, last=1)

    def kept_positions(chosen: TokenBudget) -> list[set[int]]:
        found = keep_keys(chosen, Parts(query=query, key=key, value=value, scale=1.0), None).key
        assert found.shape[2] == 4
        same = (found[:, :, :, None] == key[:, :, None]).all(-1)
        return [set(torch.nonzero(same[row, head].any(0)).flatten().tolist()) for row in (0, 1) for head in range(3)]

    own = kept_positions(budget)
    assert all({0, 15} <= positions for positions in own)
    assert len({frozenset(positions) for positions in own}) > 2
    shared = kept_positions(replace(budget, shared=True))
    assert shared[0] == shared[1] == shared[2]
    free = kept_positions(replace(budget, first=0, last=0))
    assert not any({0, 15} & positions for positions in free), "their values are zero, so that they are worth nothing"


def test_accumulated_scores_add_what_the_mean_head_of_earlier_layers_received() -> None:
    query, key, value = heads()
    parts, budget = Parts(query=query, key=key, value=value, scale=1.0), replace(HALF, score="accumulated")
    tokens, received = Tokens.of(key, None), torch.softmax(query @ key.mT, -1).sum(2)
    total = Sum()
    first = scores_of(replace(budget, weighted=False), parts, tokens, None, total)
    second = scores_of(budget, parts, tokens, None, total)
    assert torch.allclose(first, received)
    assert torch.allclose(second, (received + received.mean(1, keepdim=True)) * value.norm(dim=-1))


def test_a_sum_begins_anew_in_every_pass_and_leaves_nothing_behind() -> None:
    view, inputs = pruned("bert", VARIANTS["accumulated"]), make_inputs("bert")
    first = outputs(view, inputs)
    turn = turn_of(view.attention[0].caller)
    assert turn is not None
    assert turn.sum.told is None
    assert largest_difference(first, outputs(view, inputs)) == 0.0
    plain = pruned("bert", VARIANTS["received"])
    assert turn_of(plain.attention[0].caller) is None
    assert largest_difference(first, outputs(plain, inputs)) > 100 * TWIN


def test_grouped_heads_choose_with_all_queries_of_their_group() -> None:
    query, key, value = heads()
    parts = Parts(query=query, key=key[:, :1], value=value[:, :1], scale=1.0)
    kept = keep_keys(replace(HALF, score="received", rest="drop"), parts, None)
    received = torch.softmax(query @ key[:, :1].mT, -1).sum((1, 2)) * value[:, 0].norm(dim=-1)
    received[:, 0] = 1e9
    best = received.topk(4).indices.sort().values
    expected = key[:, 0].gather(1, best[..., None].expand(-1, -1, 12))
    assert torch.equal(kept.key[:, 0].sort(1).values, expected.sort(1).values)


def test_an_edited_checkpoint_is_saved_and_loaded(tmp_path: Path) -> None:
    module = make_model("vit")
    module.save_pretrained(tmp_path / "plain")
    checkpoint = load_checkpoint(tmp_path / "plain")
    view = checkpoint.view()
    apply(view, plan_of(view, HALF))
    save_checkpoint(checkpoint, view, tmp_path / "edited")
    loaded = load_checkpoint(tmp_path / "edited")
    assert loaded.view().layout == view.layout
    inputs = make_inputs("vit")
    assert largest_difference(outputs(view, inputs), outputs(loaded.view(), inputs)) == 0.0


def test_a_layout_survives_json() -> None:
    layout = AttentionLayout(query=(0, 1), kv=(0, 1), head_dim=4, tokens=VARIANTS["ends"])
    assert AttentionLayout.from_json(layout.to_json()) == layout
    plan = EditPlan(edits=(KeepTokens(layer=0, budget=VARIANTS["shared"]),))
    assert EditPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("family", "name"), [("bert", "pooled"), ("vit", "received")])
def test_the_graph_is_the_module_at_every_shape_and_multiplies_less(family: str, name: str, tmp_path: Path) -> None:
    inputs = {key: tensor.numpy() for key, tensor in make_inputs(family).items()}
    axes = (0, 1) if family == "bert" else (0,)
    view = pruned(family, VARIANTS[name])
    info = to_onnx(view.module, inputs, tmp_path / "model.onnx", dynamic=dict.fromkeys(inputs, axes))
    assert (info.nodes["Attention"], info.nodes["TopK"]) == (LAYERS, LAYERS)
    if family == "bert":
        layer, length = view.attention[0].path, 32
        scopes = graph_cost(tmp_path / "model.onnx", dict.fromkeys(inputs, (1, length))).by_scope
        attention = sum(count for scope, count in scopes.items() if scope.startswith(f"{layer}.self"))
        projections = 3 * length * WIDTH * WIDTH
        # Half of the keys and one for the rest, and two products with pooled queries.
        met = 2 * length * (length // 2 + 1) * WIDTH
        assert attention == projections + met + 2 * HALF.queries * length * WIDTH


# -- tokens that leave ------------------------------------------------------------------------------------------------

STREAM = {
    "dropped": TokenBudget(keep=0.7, stream=True, rest="drop"),
    "fused": TokenBudget(keep=0.7, stream=True, rest="fuse"),
    "merged": TokenBudget(keep=0.7, stream=True, rest="merge", score="received"),
    "accumulated, dropped": TokenBudget(keep=0.7, stream=True, rest="drop", score="accumulated"),
    "accumulated, fused": TokenBudget(keep=0.7, stream=True, rest="fuse", score="accumulated"),
    "accumulated, merged": TokenBudget(keep=0.7, stream=True, rest="merge", score="accumulated"),
}
STACKS = sorted(set(ENCODERS) - {"albert"})


def leaving(view: ModelView, budget: TokenBudget) -> EditPlan:
    """Tokens leave behind the first two layers."""
    shares = (budget.keep, 0.4)
    return EditPlan(edits=tuple(KeepTokens(layer=i, budget=replace(budget, keep=k)) for i, k in enumerate(shares)))


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for name in sorted(STREAM) for family in (["bert", "vit"] if "accumulated" in name else STACKS)],
)
def test_tokens_that_left_are_as_good_as_hidden_and_merged_ones_as_copies(family: str, name: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    untouched = outputs(view, inputs)
    plan = leaving(view, STREAM[name])
    with twin(view, plan):
        expected = outputs(view, inputs)
    assert largest_difference(untouched, outputs(view, inputs)) == 0.0
    apply(view, plan)
    found = outputs(view, inputs)
    mask = inputs.get("attention_mask")
    for key, tensor in expected.items():
        valid = mask.bool() if mask is not None and tensor.dim() > 2 else slice(None)
        assert found[key].shape == untouched[key].shape
        assert float((found[key] - tensor)[valid].abs().max()) < TWIN
        assert float((untouched[key] - tensor)[valid].abs().max()) > 100 * TWIN


@pytest.mark.parametrize("name", sorted(STREAM))
def test_padding_has_no_influence_on_which_tokens_leave(name: str) -> None:
    view, inputs = ModelView.of(make_model("bert")), make_inputs("bert")
    apply(view, leaving(view, STREAM[name]))
    batch = outputs(view, inputs)["last_hidden_state"]
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in inputs.items()}
        assert float((batch[row, :length] - outputs(view, alone)["last_hidden_state"][0]).abs().max()) < TWIN


@pytest.mark.parametrize("rest", ["fuse", "merge"])
def test_equal_tokens_become_one_without_loss(rest: str) -> None:
    view, inputs = ModelView.of(make_model("torch")), {"tokens": torch.randn(2, 1, WIDTH).expand(-1, 5, -1)}
    before = outputs(view, inputs)
    apply(view, leaving(view, TokenBudget(keep=0.7, stream=True, rest=rest)))  # type: ignore[arg-type]
    assert largest_difference(before, outputs(view, inputs)) < TWIN


@pytest.mark.parametrize(("family", "name"), [("bert", "merged"), ("vit", "dropped")])
def test_later_layers_and_mlps_of_the_graph_have_fewer_tokens(family: str, name: str, tmp_path: Path) -> None:
    inputs = {key: tensor.numpy() for key, tensor in make_inputs(family).items()}
    axes = (0, 1) if family == "bert" else (0,)
    view = ModelView.of(make_model(family))
    apply(view, leaving(view, STREAM[name]))
    to_onnx(view.module, inputs, tmp_path / "model.onnx", dynamic=dict.fromkeys(inputs, axes))
    shapes = {key: (1, 32) if family == "bert" else (1, *array.shape[1:]) for key, array in inputs.items()}
    scopes = graph_cost(tmp_path / "model.onnx", shapes).by_scope
    work = [sum(count for scope, count in scopes.items() if scope.startswith(mlp.path)) for mlp in view.mlp]
    assert work[0] > work[1] > work[2] > 0


def test_a_model_whose_tokens_leave_is_saved_copied_and_loaded(tmp_path: Path) -> None:
    make_model("vit").save_pretrained(tmp_path / "plain")
    checkpoint = load_checkpoint(tmp_path / "plain")
    view, inputs = checkpoint.view(), make_inputs("vit")
    apply(view, leaving(view, STREAM["fused"]))
    save_checkpoint(checkpoint, view, tmp_path / "edited")
    found = outputs(view, inputs)
    for other in (load_checkpoint(tmp_path / "edited"), checkpoint.copy()):
        assert other.view().layout == view.layout
        assert largest_difference(found, outputs(other.view(), inputs)) == 0.0


# -- the pass ---------------------------------------------------------------------------------------------------------


def planned(family: str, **options: Any) -> EditPlan:
    view = ModelView.of(make_model(family))
    plan, _ = make_plan(PruneTokens.model_validate(options), view, *samples(view, family))
    return plan


def test_options_of_the_pass_reach_the_layout() -> None:
    options = {"keep": 0.6, "per": "layer", "score": "received", "queries": 2, "weighted": False}
    plan = planned("bert", **options, first=2, last=1, rest="drop")
    expected = TokenBudget(
        keep=0.6, shared=True, score="received", queries=2, weighted=False, first=2, last=1, rest="drop"
    )
    assert plan.edits == tuple(KeepTokens(layer=layer, budget=expected) for layer in range(LAYERS))


def test_a_list_of_shares_leaves_layers_with_all_tokens_alone() -> None:
    plan = planned("vit", keep=[1.0, *[0.5] * (LAYERS - 1)])
    assert [edit.layer for edit in plan.edits] == list(range(1, LAYERS))


def test_tokens_leave_in_equal_steps_or_as_listed() -> None:
    plan = planned("vit", keep=0.4, reduce="tokens", rest="merge")
    budgets = [edit.budget for edit in plan.edits if isinstance(edit, KeepTokens)]
    assert [edit.layer for edit in plan.edits] == [0, 1]
    assert [budget.keep for budget in budgets] == [0.7, 0.4]
    assert all(budget.stream and budget.rest == "merge" for budget in budgets)
    listed = planned("vit", keep=[1.0, 0.5, 0.5], reduce="tokens")
    assert [edit.layer for edit in listed.edits] == [1]


def test_a_budget_is_spread_where_it_costs_least() -> None:
    cheap, dear = torch.linspace(0.07, 0, 8).double(), torch.linspace(7, 0, 8).double()
    assert _spread((cheap, dear), 0.75) == [0.5, 1.0]
    assert _spread((dear, cheap), 0.5) == [0.875, 0.125]
    plan = planned("bert", budget=0.5)
    shares = [edit.budget.keep for edit in plan.edits if isinstance(edit, KeepTokens)]
    assert sum(shares) + (LAYERS - len(shares)) <= 0.5 * LAYERS
    with pytest.raises(PlanError, match=r"a budget of 0\.05\n.*at least 1/8"):
        _spread((cheap, dear), 0.05)


def test_thresholds_move_shares_by_the_attention_that_prunable_tokens_receive() -> None:
    everything = planned("bert", keep=0.5, delta=0.2, alpha=0.0, beta=0.0)
    assert {edit.budget.keep for edit in everything.edits if isinstance(edit, KeepTokens)} == {0.7}
    nothing = planned("bert", keep=0.5, delta=0.2, alpha=1.0, beta=1.0)
    assert {edit.budget.keep for edit in nothing.edits if isinstance(edit, KeepTokens)} == {0.3}
    between = planned("bert", keep=0.5, delta=0.2, alpha=1.0, beta=0.0)
    assert {edit.budget.keep for edit in between.edits if isinstance(edit, KeepTokens)} == {0.5}
    assert all("prunable tokens receive 0." in note for note in between.notes.values())


def test_statistics_of_tokens_are_what_attention_weights_say() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    one = examples.of([examples.rows[1]], source="made up", padding=examples.padding)
    seen: list[torch.Tensor] = []
    with view.attention[0].watch_weights(lambda weights, _: seen.append(weights)):
        outputs(view, to_torch(next(iter(one.batches(1))).inputs))
    stats = collect(view, task, one, {Stat.TOKEN_COST, Stat.END_ATTENTION})
    weights = seen[0]
    tokens = weights.shape[-1]
    ends = stats[Stat.END_ATTENTION][0]
    received = weights.mean((0, 1, 2)).double()
    assert torch.allclose(ends[0, :tokens], received.cumsum(0), atol=1e-6)
    assert torch.allclose(ends[1, :tokens], received.flip(0).cumsum(0), atol=1e-6)
    cost = stats[Stat.TOKEN_COST][0]
    assert float(cost[-1]) == 0.0
    assert (cost.diff() <= 1e-9).all()
    assert float(cost[0]) > 0.01


@pytest.mark.parametrize("options", [{"keep": 0.5, "refit": True}])
def test_a_refit_brings_outputs_back(options: dict[str, Any]) -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    record = run_pass(PruneTokens.model_validate(options), view, ModelView.of(make_model("bert")), task, examples)
    assert len(record.refit) == LAYERS
    assert all(fit["after"] < fit["before"] for fit in record.refit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either keep or budget"),
        ({"keep": 0.5, "budget": 0.5}, "give either keep or budget"),
        ({"keep": 0.0}, "keep is a share of the tokens, from 0.001 to 1"),
        ({"keep": [0.5, 1.5]}, "keep is a share of the tokens, from 0.001 to 1"),
        ({"keep": 0.5, "rest": "merge"}, "rest: merge goes with reduce: tokens"),
        ({"keep": 0.5, "reduce": "tokens", "refit": True}, "budget, delta, per and refit go with reduce: keys"),
        ({"budget": 0.5, "delta": 0.1}, "delta goes with one keep for all layers"),
        ({"keep": 0.5, "delta": 0.1, "alpha": 0.1, "beta": 0.2}, "beta is the lower threshold"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneTokens.model_validate(options)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"keep": 1.0}, "every layer would keep all tokens"),
        ("bert", {"keep": [0.5]}, f"keep has 1 entries\n.*one per attention layer: {LAYERS}"),
        ("bert", {"keep": [0.5, 0.7, 0.7], "reduce": "tokens"}, "keep grows from 0.5 to 0.7 behind layer 1"),
        ("bert", {"keep": [1.0] * (LAYERS - 1) + [0.5], "reduce": "tokens"}, "no token would leave"),
        ("albert", {"keep": 0.5, "reduce": "tokens"}, "reduce: tokens on layers of "),
        (
            "bart",
            {"keep": 0.5},
            "cannot be applied to layer 1 .*\n.*prompts, of which heads keep a share,",
        ),
    ],
)
def test_plans_that_cannot_be_made_say_why(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(family, **options)


def test_keys_and_tokens_get_fewer_in_one_way_only() -> None:
    task, examples = samples(ModelView.of(make_model("bert")), "bert")
    for first, second in (("keys", "tokens"), ("tokens", "keys")):
        view, teacher = (ModelView.of(make_model("bert")) for _ in range(2))
        run_pass(PruneTokens(keep=0.5, reduce=first), view, teacher, task, examples)
        with pytest.raises(PlanError, match=f"reduce: {second} behind an earlier prune-tokens with reduce: {first}"):
            run_pass(PruneTokens(keep=0.5, reduce=second), view, teacher, task, examples)


def test_budgets_come_behind_other_edits_of_attention_and_once() -> None:
    view = pruned("bert", HALF)
    for edit in (KeepTokens(layer=0, budget=HALF), DropHeads(layer=0, query=(0,))):
        with pytest.raises(PlanError, match=r"the heads of layer 0 keep 0\.5 of the tokens already"):
            EditPlan(edits=(edit,)).check(view.layout)
    with pytest.raises(PlanError, match=r"the heads of layer 0 keep 0\.5 of the tokens already"):
        make_plan(PruneTokens(keep=0.5), view, *samples(view, "bert"))
    clustered = replace(ModelView.of(make_model("bert")).layout.attention[0], represented=(0, 0, 2, 3))
    with pytest.raises(PlanError, match="the heads of layer 0 are clustered"):
        KeepTokens(layer=0, budget=HALF).check(clustered)


@pytest.mark.parametrize("call", [{"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}, {"other": True}])
def test_attention_whose_queries_see_different_tokens_is_refused(call: dict[str, Any]) -> None:
    module: Any = pruned("torch", HALF).attention[0].module
    x = torch.randn(2, 5, module.q_proj.in_features)
    key = torch.randn_like(x) if call.pop("other", False) else x
    with pytest.raises(UnsupportedModelError, match="prune-tokens on attention with an attn_mask, or to another seq"):
        module(x, key, key, **call)


def test_a_run_from_recipe_to_graph_says_what_every_head_keeps(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = begun("text", tmp_path_factory.getbasetemp(), tmp_path)
    pass_ = {"prune-tokens": {"keep": 0.5, "queries": 1}}
    write_recipe(folder, {**TEXT, "passes": [pass_], "gate": {"max_drop": 100.0}})
    report = run_recipe(folder).report
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["onnx"]["status"] == "passed"
    assert stages["onnx"]["record"]["nodes"]["TopK"] == 2
    assert stages["onnx"]["cost"]["macs"] < stages["baseline"]["cost"]["macs"]
    changes = head_maps(report)[0].changes
    assert changes == ("every head keeps its own 50.0% of the tokens, the rest as one",) * 2
