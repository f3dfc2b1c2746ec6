"""Encoders whose heads see a band and global tokens: chunks equal masks, cost less, and run in graphs and engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYERS, make_model
from test_passes import samples
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from headwise.export.onnx import check_parity, to_onnx
from headwise.export.precision import convert_precision
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.bands import Band, cut, visible_in_band
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.counting import count_macs
from headwise.model.edits import EditPlan, StreamHeads
from headwise.model.forward import run
from headwise.model.layout import Layout
from headwise.model.limits import limits
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.stream_heads import StreamHeadsPass
from headwise.tolerances import TWIN

TEXTS = ["bert", "roberta", "distilbert", "electra"]
IMAGES = ["vit", "deit", "dinov2", "clip-vision"]
TOKENS = 23


def plan_of(view: ModelView, windows: tuple[int, ...], sink: int) -> EditPlan:
    """One head sees all in the first layer, none in the second one, all but one in the last."""
    kv = view.layout.attention[0].kv
    first = {head: windows[head % len(windows)] for head in kv[1:]}
    chosen = (first, dict.fromkeys(kv, windows[0]), {kv[0]: windows[-1]})
    return EditPlan(
        edits=tuple(StreamHeads(layer=i, windows=w, sink=sink, bidirectional=True) for i, w in enumerate(chosen))
    )


def padded(*lengths: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (len(lengths), tokens), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def images(family: str) -> dict[str, torch.Tensor]:
    size = make_model(family).config.image_size  # type: ignore[union-attr]
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))}


def states(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Final hidden states of the tokens that are no padding."""
    with torch.no_grad():
        found = run(view.module, dict(inputs))["last_hidden_state"]
    return found[inputs["attention_mask"].bool()] if "attention_mask" in inputs else found


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("lengths", [(TOKENS, 9, 2), (TOKENS,) * 2])
@pytest.mark.parametrize("family", TEXTS)
def test_the_edited_model_is_its_masked_twin(family: str, lengths: tuple[int, ...], sink: int) -> None:
    view, inputs = ModelView.of(make_model(family)), padded(*lengths)
    plan, untouched = plan_of(view, (3, 2), sink), states(view, inputs)
    with surgery.twin(view, plan):
        expected = states(view, inputs)
    assert torch.equal(untouched, states(view, inputs))
    surgery.apply(view, plan)
    found = states(view, inputs)
    assert largest(found, expected) < TWIN
    assert largest(found, untouched) > 100 * TWIN
    # A text gives what it gives without padding, and without other texts.
    alone = {name: tensor[-1:, : lengths[-1]] for name, tensor in inputs.items()}
    assert largest(found[-lengths[-1] :], states(view, alone)[...].flatten(0, -2)) < TWIN


@pytest.mark.parametrize("family", IMAGES)
def test_patches_have_bands(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), images(family)
    plan, untouched = plan_of(view, (1,), 1), states(view, inputs)
    with surgery.twin(view, plan):
        expected = states(view, inputs)
    surgery.apply(view, plan)
    assert largest(states(view, inputs), expected) < TWIN < largest(states(view, inputs), untouched)


@pytest.mark.parametrize(("window", "sink"), [(TOKENS, 0), (1, TOKENS), (TOKENS - 3, 3)])
def test_bands_that_cover_the_text_change_nothing(window: int, sink: int) -> None:
    view, inputs = ModelView.of(make_model("bert")), padded(TOKENS, 9)
    untouched = states(view, inputs)
    surgery.apply(view, plan_of(view, (window,), sink))
    assert largest(states(view, inputs), untouched) < TWIN


@pytest.mark.parametrize("total", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("band", [Band(0, 1), Band(2, 3), Band(5, 4), Band(12, 2), Band(1, 20)])
def test_chunks_see_every_visible_key_once_and_no_query_sees_nothing(total: int, band: Band) -> None:
    seen = torch.arange(total) < torch.tensor([[total], [total // 2], [0]])
    for mask in (seen, None):
        chunks = cut(mask, band, total)
        found = torch.zeros(len(chunks.visible), total, total, dtype=torch.int64)
        rows = chunks.visible.flatten(1, 2)
        keys = chunks.keys.unflatten(0, (-1, band.sink + 3 * band.window)).repeat_interleave(band.window, 0)
        found.scatter_add_(2, keys[:total].expand(len(rows), -1, -1), rows[:, :total].long())
        expected = visible_in_band(mask, band, total)[:, 0].long()
        assert bool(rows.any(-1).all() and expected.any(-1).all())
        # Global tokens look at all from a product of their own.
        assert torch.equal(found[:, band.sink :], expected[:, band.sink :])


def test_global_tokens_see_all_and_are_seen() -> None:
    seen = visible_in_band(None, Band(1, 2), 6)[0, 0].long()
    assert seen.tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 0, 0, 0, 1, 1],
    ]


def test_a_saved_encoder_has_its_bands_when_it_is_loaded(tmp_path: Path) -> None:
    view, inputs = ModelView.of(make_model("bert")), padded(TOKENS, 9)
    plan = plan_of(view, (3, 2), 1)
    assert EditPlan.from_json(plan.to_json()) == plan
    surgery.apply(view, plan)
    save_checkpoint(Checkpoint(module=view.module, source="x", kind="transformers", digest=""), view, tmp_path)
    again = load_checkpoint(tmp_path).view()
    assert again.layout == view.layout == Layout.from_json(view.layout.to_json())
    assert again.layout.attention[0].bidirectional
    assert torch.equal(states(again, inputs), states(view, inputs))
