"""Every edit equals its exact twin, on every family; and the same tests see red when the edit is wrong."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from conftest import FACTORIES, HEADS, LAYERS, MODELS, MULTI_HEAD, largest_difference, make_inputs, make_model
from torch import nn

from headwise.errors import PlanError, SurgeryError, UnsupportedModelError
from headwise.model import surgery
from headwise.model.attention import MultiHeadAttention, unpack_attention
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import named_outputs, run
from headwise.model.view import ModelView
from headwise.tolerances import TWIN


def unequal_plan(view: ModelView) -> EditPlan:
    """Another number of heads in every layer: two units from the first, none from the second, one from the last."""
    first, _, last = view.layout.attention
    units = first.units()
    gone = units[0] if len(units) == 2 else units[0] + units[2]
    return EditPlan(edits=(DropHeads(layer=0, query=gone), DropHeads(layer=2, query=last.units()[-1])))


def gated(view: ModelView, plan: EditPlan, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with ExitStack() as stack, torch.inference_mode():
        for edit in plan.edits:
            layer = view.attention[edit.layer]
            gates = torch.tensor([0.0 if head in edit.query else 1.0 for head in layer.layout.query])
            stack.enter_context(layer.gate(gates))
        return run(view.module, inputs)


def test_the_view_leaves_the_function_as_it_is(family: str) -> None:
    module, inputs = make_model(family), make_inputs(family)
    with torch.no_grad():
        before = run(module, inputs)
        view = ModelView.of(module)
        assert largest_difference(before, run(module, inputs)) < 1e-5
    assert len(view.attention) == LAYERS
    assert all(len(layer.query) == HEADS for layer in view.layout.attention)


def test_removing_heads_equals_gating_them_to_zero(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    plan = unequal_plan(view)
    with torch.no_grad():
        untouched = run(view.module, inputs)
    twin = gated(view, plan, inputs)
    surgery.apply(view, plan)
    with torch.no_grad():
        edited = run(view.module, inputs)
    assert largest_difference(twin, edited) < TWIN
    assert largest_difference(untouched, edited) > 100 * TWIN, "the removed heads did nothing, so this proves nothing"
    assert view.layout == plan.predict(ModelView.of(make_model(family)).layout)


def test_removing_other_heads_than_planned_is_seen(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    twin = gated(view, unequal_plan(view), inputs)
    wrong = view.layout.attention[0].units()[1]
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=0, query=wrong),)))
    with torch.no_grad():
        assert largest_difference(twin, run(view.module, inputs)) > 100 * TWIN


def test_removed_heads_are_gone_from_the_weights(family: str) -> None:
    view = ModelView.of(make_model(family))
    before = sum(p.numel() for p in view.module.parameters())
    plan = unequal_plan(view)
    per_head = [view.attention[edit.layer].read() for edit in plan.edits]
    surgery.apply(view, plan)
    lost = before - sum(p.numel() for p in view.module.parameters())
    group = view.layout.attention[1].group
    expected = 0
    for edit, old in zip(plan.edits, per_head, strict=True):
        queries, kvs = len(edit.query), len(edit.query) // group
        for weight, bias, count in (
            (old.query, old.query_bias, queries),
            (old.key, old.key_bias, kvs),
            (old.value, old.value_bias, kvs),
        ):
            expected += count * (weight[0].numel() + (0 if bias is None else bias[0].numel()))
        expected += queries * (old.output[:, 0].numel() + sum(parts[0].numel() for parts in old.further.values()))
    assert lost == expected > 0


@pytest.mark.parametrize("family", sorted(MULTI_HEAD))
def test_a_layer_is_edited_twice_under_its_original_ids(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    twin = gated(view, EditPlan(edits=(DropHeads(layer=1, query=(0, 3)),)), inputs)
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=1, query=(0,)),)))
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=1, query=(3,)),)))
    with torch.no_grad():
        assert largest_difference(twin, run(view.module, inputs)) < TWIN
    assert view.layout.attention[1].query == (1, 2)


@pytest.mark.parametrize("family", sorted(MODELS.keys() - FACTORIES.keys() - {"gemma2"}))  # capped scores: eager only
def test_eager_attention_gives_the_same_after_surgery(family: str) -> None:
    outputs = []
    for implementation in ("sdpa", "eager"):
        module = make_model(family)
        module.set_attn_implementation(implementation)
        view = ModelView.of(module)
        surgery.apply(view, unequal_plan(view))
        with torch.no_grad():
            outputs.append(run(module, make_inputs(family)))
    mask = make_inputs(family).get("attention_mask")
    left, right = ({n: t[:, :5] if mask is not None and t.dim() == 3 else t for n, t in o.items()} for o in outputs)
    assert largest_difference(left, right) < 1e-4


def test_a_gate_per_row_gates_each_row_by_its_own(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    layer = view.attention[0]
    with torch.no_grad():
        with layer.gate(torch.zeros(HEADS)):
            closed = run(view.module, inputs)
        opened = run(view.module, inputs)
        with layer.gate(torch.tensor([[0.0] * HEADS, [1.0] * HEADS])):
            mixed = run(view.module, inputs)
    # What compares the texts of a batch with its images has no row of its own.
    for name in (name for name in mixed if not name.startswith("logits_per_")):
        assert torch.allclose(mixed[name][0], closed[name][0], atol=1e-5)
        assert torch.allclose(mixed[name][1], opened[name][1], atol=1e-5)


def test_hooks_are_gone_after_their_block(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    seen: list[int] = []
    layer = view.attention[0]
    with layer.watch_heads(lambda heads: seen.append(heads.shape[2])), torch.no_grad():
        run(view.module, inputs)
    with torch.no_grad():
        run(view.module, inputs)
    assert seen == [HEADS] * layer.runs


def test_watched_heads_through_the_output_projection_are_the_layer_output(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    layer, seen = view.attention[1], {}
    with (
        layer.watch_heads(lambda t: seen.__setitem__("heads", t)),
        layer.watch_output(lambda t: seen.__setitem__("output", t)),
        layer.watch_residual(lambda t: seen.__setitem__("residual", t)),
        torch.no_grad(),
    ):
        run(view.module, inputs)
    weights = layer.read()
    rebuilt = torch.einsum("btnh,dnh->btd", seen["heads"], weights.output)
    rebuilt = rebuilt if weights.output_bias is None else rebuilt + weights.output_bias
    assert torch.allclose(rebuilt, seen["output"], atol=1e-5)
    assert seen["residual"].shape == seen["output"].shape


def test_an_impossible_plan_changes_nothing(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    with torch.no_grad():
        before = run(view.module, inputs)
    empty = view.layout.attention[1].query
    plan = EditPlan(
        edits=(DropHeads(layer=0, query=view.layout.attention[0].units()[0]), DropHeads(layer=1, query=empty))
    )
    with pytest.raises(PlanError, match="would keep 0"):
        surgery.apply(view, plan)
    with torch.no_grad():
        assert largest_difference(before, run(view.module, inputs)) == 0.0


def test_set_output_refuses_a_bias_that_the_layer_does_not_have() -> None:
    layer = ModelView.of(make_model("llama")).attention[0]
    weights = layer.read()
    with pytest.raises(SurgeryError, match="a bias is given"):
        surgery.set_output(layer, weights.output.flatten(1), torch.zeros(weights.output.shape[0]))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_unpacked_attention_equals_torch(batch_first: bool, need_weights: bool, bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(24, 3, bias=bias, kdim=10, vdim=14, batch_first=batch_first).eval()
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 10), torch.randn(2, 7, 14)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    causal = torch.ones(5, 7, dtype=torch.bool).triu(3)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    kwargs = {"key_padding_mask": padding, "attn_mask": causal, "need_weights": need_weights}
    with torch.no_grad():
        expected, expected_weights = original(query, key, value, **kwargs)
        holder = nn.Sequential(original)
        unpack_attention(holder)
        unpacked = holder[0]
        actual, weights = unpacked(query, key, value, **kwargs)
    assert isinstance(unpacked, MultiHeadAttention)
    assert torch.allclose(actual, expected, atol=1e-6)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert torch.allclose(weights, expected_weights, atol=1e-6)


def test_attention_with_an_extra_key_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="add_bias_kv"):
        unpack_attention(nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True)))


def test_a_mask_per_head_is_refused() -> None:
    attention = MultiHeadAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(1, 3, 8)
    with pytest.raises(UnsupportedModelError, match="one entry per head"):
        attention(x, x, x, attn_mask=torch.zeros(2, 3, 3))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        ModelView.of(nn.Linear(2, 2))


def test_outputs_get_names() -> None:
    tensor = torch.zeros(1)
    assert list(named_outputs(tensor)) == ["output"]
    assert list(named_outputs((tensor, tensor))) == ["output_0", "output_1"]
    assert list(named_outputs({"a": tensor, "past_key_values": tensor, "b": None})) == ["a"]
