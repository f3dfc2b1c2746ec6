"""T5: a position bias per head that one layer looks up for all, and heads narrower than their share of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, largest_difference, make_inputs, randomize, t5_config
from safetensors.torch import load_file
from test_surgery import gated

from headwise.model import surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run
from headwise.model.handed import compute_own
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.tolerances import TWIN

SELF, CROSS = (0, 1, 2, 4), (3, 5)
"""Layers of a model with two layers in its encoder and two in its decoder."""


def model() -> Any:
    return randomize(transformers.T5Model(t5_config(num_layers=2)))


def checkpoint() -> Checkpoint:
    return Checkpoint(module=model(), source="x", kind="transformers", digest="")


def drop(view: ModelView, heads: dict[int, tuple[int, ...]]) -> EditPlan:
    plan = EditPlan(edits=tuple(DropHeads(layer=layer, query=gone) for layer, gone in heads.items()))
    surgery.apply(view, plan)
    return plan


def outputs(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return run(module, make_inputs("t5"))


def test_a_table_of_its_own_in_every_layer_changes_nothing() -> None:
    view = ModelView.of(model())
    before = outputs(view.module)
    compute_own(view)
    compute_own(view)
    assert largest_difference(before, outputs(view.module)) == 0.0
    assert [layer.read().further.keys() == {"relative_attention_bias.weight"} for layer in view.attention] == [
        layer.index in SELF for layer in view.attention
    ]
    assert all(len(layer.module._forward_pre_hooks) == 1 for layer in view.attention)


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param({0: (0, 2)}, id="the layer that has the table"),
        pytest.param({1: (1,), 4: (3, 0)}, id="layers that are given the bias"),
        pytest.param({3: (0,)}, id="the first attention to the encoder"),
        pytest.param({0: (0,), 1: (1, 2), 2: (3,), 3: (0, 1, 2), 4: (2, 3), 5: (1,)}, id="all, each another"),
    ],
)
def test_the_bias_of_the_heads_that_stay_stays(heads: dict[int, tuple[int, ...]]) -> None:
    view, untouched = ModelView.of(model()), ModelView.of(model())
    plan = drop(view, heads)
    twin = gated(untouched, plan, make_inputs("t5"))
    edited = outputs(view.module)
    assert largest_difference(twin, edited) < TWIN
    assert largest_difference(outputs(untouched.module), edited) > 100 * TWIN
    for layer in view.attention:
        for parts in layer.read().further.values():
            assert parts.shape == (len(layer.layout.query), 1, 8)


def test_bias_matters_here() -> None:
    """Without it, the tests above would prove nothing about it."""
    view = ModelView.of(model())
    before = outputs(view.module)
    view.module.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight").zero_()
    assert largest_difference(before, outputs(view.module)) > 0.1


@pytest.mark.parametrize(
    ("heads", "stock"),
    [
        pytest.param(dict.fromkeys(range(6), (1,)), True, id="the same heads everywhere"),
        pytest.param({**dict.fromkeys(SELF, (1,)), **dict.fromkeys(CROSS, (2,))}, True, id="others to the encoder"),
        pytest.param({**dict.fromkeys(range(6), (1,)), 1: (2,)}, False, id="as many, but others in one layer"),
        pytest.param({0: (1,), 5: (0, 2)}, False, id="more in some layers"),
    ],
)
def test_the_stock_class_loads_what_one_table_can_say(
    heads: dict[int, tuple[int, ...]], stock: bool, tmp_path: Path
) -> None:
    saved = checkpoint()
    view = saved.view()
    drop(view, heads)
    save_checkpoint(saved, view, tmp_path)
    before = outputs(view.module)
    loaded = load_checkpoint(tmp_path)
    assert largest_difference(before, outputs(loaded.module)) == 0.0
    assert loaded.view().layout == view.layout
    tables = [name for name in load_file(tmp_path / "model.safetensors") if "relative_attention_bias" in name]
    assert len(tables) == (2 if stock else 4)
    if stock:
        plain = transformers.AutoModel.from_pretrained(tmp_path).eval()
        assert plain.config.num_heads == 3
        assert largest_difference(before, outputs(plain)) == 0.0
    # What came back is edited like any other model, under its original ids.
    again, untouched = loaded.view(), load_checkpoint(tmp_path).view()
    plan = drop(again, {4: (again.layout.attention[4].query[0],)})
    assert largest_difference(gated(untouched, plan, make_inputs("t5")), outputs(again.module)) < TWIN


def test_text_that_is_written_with_a_cache_is_the_same() -> None:
    module = randomize(transformers.T5ForConditionalGeneration(t5_config(num_layers=2)))
    view = ModelView.of(module)
    drop(view, {2: (0,), 3: (1, 2), 4: (3,)})
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    texts = [module.generate(ids, max_new_tokens=12, min_new_tokens=12, use_cache=cache) for cache in (True, False)]  # type: ignore[operator]
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 13)


@pytest.mark.parametrize(("activation", "gate"), [("relu", ""), ("gated-gelu", "layer.1.DenseReluDense.wi_0")])
def test_plain_and_gated_blocks_are_both_t5(activation: str, gate: str) -> None:
    view = ModelView.of(randomize(transformers.T5Model(t5_config(feed_forward_proj=activation))))
    assert [mlp.path for mlp in view.mlp] == ["encoder.block.0", "decoder.block.0"]
    assert view.mlp[0].record.gate == gate
    assert view.mlp[0].read().down.shape == (32, 48)
