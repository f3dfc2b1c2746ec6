"""DeBERTa: scores of content with positions, whose projections lose their heads together with queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import HEADS, WIDTH, deberta_config, largest_difference, make_inputs, randomize
from test_surgery import gated, unequal_plan

from headwise.model import surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.forward import run
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.tolerances import TWIN

INPUTS = make_inputs("deberta-v2")
VARIANTS = [
    pytest.param({}, ["pos_key_proj", "pos_query_proj"], id="both kinds of position terms"),
    pytest.param({"pos_att_type": ["c2p"]}, ["pos_key_proj"], id="content to position"),
    pytest.param({"pos_att_type": ["p2c"]}, ["pos_query_proj"], id="position to content"),
    pytest.param({"share_att_key": True}, [], id="positions through the projections of tokens"),
    pytest.param({"relative_attention": False, "pos_att_type": []}, [], id="no position terms"),
    pytest.param(
        {"conv_kernel_size": 3}, ["pos_key_proj", "pos_query_proj"], id="a convolution beside the first layer"
    ),
]


def model(options: dict[str, Any]) -> torch.nn.Module:
    return randomize(transformers.DebertaV2Model(deberta_config(**options)))


def outputs(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return run(module, INPUTS)


@pytest.mark.parametrize(("options", "projections"), VARIANTS)
def test_position_terms_of_the_heads_that_stay_stay(options: dict[str, Any], projections: list[str]) -> None:
    view, untouched = ModelView.of(model(options)), ModelView.of(model(options))
    plan = unequal_plan(view)
    surgery.apply(view, plan)
    twin, edited = gated(untouched, plan, INPUTS), outputs(view.module)
    assert largest_difference(twin, edited) < TWIN
    assert largest_difference(outputs(untouched.module), edited) > 100 * TWIN
    for layer in view.attention:
        heads = len(layer.layout.query)
        assert set(layer.read().further) == {f"self.{p}.{part}" for p in projections for part in ("weight", "bias")}
        for name in projections:
            assert layer.module.get_parameter(f"self.{name}.weight").shape == (heads * WIDTH // HEADS, WIDTH)


@pytest.mark.parametrize("projection", ["pos_key_proj", "pos_query_proj"])
def test_position_terms_matter_here(projection: str) -> None:
    """Without them, the test above would prove nothing about them."""
    module = model({})
    before = outputs(module)
    module.get_parameter(f"encoder.layer.0.attention.self.{projection}.weight").zero_()
    assert largest_difference(before, outputs(module)) > 1e-3


@pytest.mark.parametrize("share", [False, True])
def test_a_classifier_comes_back_bit_for_bit(share: bool, tmp_path: Path) -> None:
    config = deberta_config(share_att_key=share, num_labels=3)
    module = randomize(transformers.DebertaV2ForSequenceClassification(config))
    checkpoint = Checkpoint(module=module, source="x", kind="transformers", digest="")
    view = checkpoint.view()
    surgery.apply(view, unequal_plan(view))
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert largest_difference(outputs(module), outputs(loaded.module)) == 0.0
    assert loaded.view().layout == view.layout
