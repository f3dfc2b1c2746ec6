"""The MLP of every family is seen: its weights, its neurons, what they are added to, and which ones are left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
import transformers
from conftest import GROUPED, LAYERS, SEQ2SEQ, WIDTH, largest_difference, make_inputs, make_model
from test_checkpoint import checkpoint_of, prune
from torch import nn
from torch.nn import functional as F

from headwise.errors import PlanError
from headwise.model.checkpoint import load_checkpoint
from headwise.model.forward import run
from headwise.model.layout import AttentionLayout, Layout, MlpLayout, from_ranges, ranges
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView

KINDS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "quick-gelu": lambda hidden: hidden * torch.sigmoid(1.702 * hidden),
    "relu": F.relu,
    "silu": F.silu,
}
ACTIVATIONS: Mapping[str, str] = {
    **dict.fromkeys(("torch", "opt", "t5"), "relu"),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3"), "silu"),
    **dict.fromkeys(("gpt2", "gemma2", "gemma3", "albert"), "gelu-tanh"),
    **dict.fromkeys(("clip", "clip-text", "clip-vision"), "quick-gelu"),
}
ADDED_CHANGED = {"dinov2", "timm", "gemma2", "gemma3"}
"""Families that scale or normalise what an MLP gives before they add it."""
NOT_SAID = {"opt", "gpt-neox"}
"""Families whose config moves the norm in front of the MLP, or adds attention and MLP to the same stream."""


def neurons_of(family: str) -> int:
    return {"gpt2": 4 * WIDTH, "dinov2": 2 * WIDTH}.get(family, 48)


def activation(family: str, hidden: torch.Tensor) -> torch.Tensor:
    return KINDS[ACTIVATIONS.get(family, "gelu")](hidden)


def test_every_block_has_its_mlp(family: str) -> None:
    view = ModelView.of(make_model(family))
    # Two attention layers of a decoder share a block.
    assert [mlp.index for mlp in view.mlp] == list(range(2 if family in SEQ2SEQ else LAYERS))
    assert {id(mlp.block) for mlp in view.mlp} <= {id(layer.block) for layer in view.attention}
    assert {(len(mlp.layout.neurons), mlp.layout.width) for mlp in view.mlp} == {(neurons_of(family),) * 2}
    names = dict(view.module.named_modules())
    for mlp in view.mlp:
        assert names[mlp.path] is mlp.block
        assert names[mlp.paths[-1]] is mlp.output
        assert len(mlp.paths) == (3 if family in GROUPED - {"phi3"} else 2)
        assert (mlp.read().gate is not None) == (family in GROUPED)


def test_what_is_read_computes_what_is_watched(family: str) -> None:
    view, seen = ModelView.of(make_model(family)), {}
    mlp = view.mlp[1]
    with (
        mlp.watch_input(lambda t: seen.__setitem__("input", t)),
        mlp.watch_neurons(lambda t: seen.__setitem__("neurons", t)),
        mlp.watch_output(lambda t: seen.__setitem__("output", t)),
        torch.no_grad(),
    ):
        run(view.module, make_inputs(family))
    weights = mlp.read()
    up = F.linear(seen["input"], weights.up, weights.up_bias)
    if weights.gate is None:
        neurons = activation(family, up)
    else:
        neurons = up * activation(family, F.linear(seen["input"], weights.gate, weights.gate_bias))
    assert torch.allclose(neurons, seen["neurons"], atol=1e-5)
    assert torch.allclose(F.linear(neurons, weights.down, weights.down_bias), seen["output"], atol=1e-5)


def test_the_residual_is_what_the_output_is_added_to(family: str) -> None:
    """In a block that adds its MLP last, the sum is the block's output; behind a norm it is the norm's input."""
    view, seen = ModelView.of(make_model(family)), {}
    mlp = view.mlp[1]
    norms = dict.fromkeys(("bert", "electra", "roberta", "wrapped", "deberta-v2"), "output.LayerNorm")
    norms |= {"albert": "full_layer_layer_norm", "bart": "final_layer_norm"}
    norm = mlp.block.get_submodule(norms[family]) if family in norms else getattr(mlp.block, "output_layer_norm", None)

    def added(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        block_output = result if isinstance(result, torch.Tensor) else result[0]
        seen["sum"] = block_output if norm is None else args[0]

    handle = (norm or mlp.block).register_forward_hook(added)
    with (
        mlp.watch_residual(lambda t: seen.__setitem__("residual", t)),
        mlp.watch_output(lambda t: seen.__setitem__("output", t)),
        torch.no_grad(),
    ):
        run(view.module, make_inputs(family))
    handle.remove()
    if family in ADDED_CHANGED | NOT_SAID:
        assert "residual" not in seen
    else:
        assert torch.allclose(seen["residual"] + seen["output"], seen["sum"], atol=1e-5)


def test_another_mlp_under_another_option_of_the_config_is_found() -> None:
    size = {name: value for name, value in conftest._VISION.items() if name != "intermediate_size"}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**size, mlp_ratio=2, use_swiglu_ffn=True)).eval()
    view = ModelView.of(model)
    assert [(len(mlp.layout.neurons), mlp.paths[1].rpartition(".")[2]) for mlp in view.mlp] == [(48, "gate_proj")] * 3


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_the_residual_of_torch_layers_knows_where_their_norms_are(norm_first: bool, decoder: bool) -> None:
    torch.manual_seed(0)
    cls = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = cls(WIDTH, 4, 48, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 5, WIDTH)
    view, seen = ModelView.of(nn.ModuleList([layer])), {}
    (mlp,) = view.mlp
    last_norm = layer.norm3 if decoder else layer.norm2
    with (
        mlp.watch_residual(lambda t: seen.__setitem__("residual", t)),
        mlp.watch_output(lambda t: seen.__setitem__("output", t)),
        torch.no_grad(),
    ):
        result = layer(x, x) if decoder else layer(x)
        total = seen["residual"] + seen["output"]
        assert torch.allclose(total if norm_first else last_norm(total), result, atol=1e-5)
    assert len(view.attention) == (2 if decoder else 1)


def test_a_block_of_ones_own_is_not_believed_to_add_its_mlp_anywhere() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.linear1, self.linear2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    (mlp,) = ModelView.of(Block()).mlp
    seen: list[torch.Tensor] = []
    with mlp.watch_residual(seen.append):
        mlp.output(mlp.block.linear1(torch.zeros(1, WIDTH)))
    assert seen == []


def test_a_block_without_the_mlp_of_its_record_has_none() -> None:
    halved = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    halved.linear2 = nn.Linear(24, WIDTH)  # behind a gated activation, say
    missing = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    del missing.linear1
    whole = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    view = ModelView.of(nn.ModuleList([halved, missing, whole]))
    assert [mlp.path for mlp in view.mlp] == ["2"]
    assert len(view.attention) == 3


def test_a_gate_scales_neurons_per_row(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    mlp = view.mlp[0]
    count = len(mlp.layout.neurons)
    with torch.no_grad():
        opened = run(view.module, inputs)
        with mlp.gate(torch.ones(count)):
            assert largest_difference(opened, run(view.module, inputs)) < 1e-6
        with mlp.gate(torch.zeros(count)):
            closed = run(view.module, inputs)
        with mlp.gate(torch.tensor([[0.0] * count, [1.0] * count])):
            mixed = run(view.module, inputs)
        again = run(view.module, inputs)
    assert largest_difference(opened, closed) > 1e-2
    assert largest_difference(opened, again) == 0.0, "the gate is still there"
    # What compares the texts of a batch with its images has no row of its own.
    for name in (name for name in mixed if not name.startswith("logits_per_")):
        assert torch.allclose(mixed[name][0], closed[name][0], atol=1e-5)
        assert torch.allclose(mixed[name][1], opened[name][1], atol=1e-5)


# ---------------------------------------------------------------------------------------------- layout, on disk


@pytest.mark.parametrize("ids", [(), (0,), (0, 1, 2), (0, 2, 3, 9), (5, 6, 7, 11, 12), (1, 3, 5)])
def test_ids_survive_as_ranges(ids: tuple[int, ...]) -> None:
    assert from_ranges(ranges(ids)) == ids


def test_ranges_are_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges(range(11008)) == "0-11007"


def test_neurons_keep_their_original_ids() -> None:
    layout = MlpLayout(neurons=tuple(range(6)), width=6).without([1]).without([4])
    assert layout == MlpLayout(neurons=(0, 2, 3, 5), width=6)


def test_a_layout_survives_json_and_the_list_of_older_versions_is_read() -> None:
    attention = (AttentionLayout(query=(0, 2), kv=(0, 2), head_dim=8),)
    layout = Layout(attention=attention, mlp=(MlpLayout(neurons=(0, 2, 3), width=6),))
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    old = [layer.to_json() for layer in attention]
    assert Layout.from_json(json.loads(json.dumps(old))) == Layout(attention=attention)


def test_checkpoints_carry_the_neurons(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path).view()
    assert loaded.layout == view.layout
    assert loaded.layout.mlp == (MlpLayout(neurons=tuple(range(neurons_of(family))), width=neurons_of(family)),) * len(
        view.mlp
    )


def test_checkpoints_of_older_versions_still_load(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path)
    sidecar = json.loads((tmp_path / "headwise.json").read_text())
    sidecar["layout"] = sidecar["layout"]["attention"]
    (tmp_path / "headwise.json").write_text(json.dumps(sidecar))
    assert load_checkpoint(tmp_path).view().layout == view.layout


def test_a_layout_with_other_neurons_is_refused() -> None:
    view = ModelView.of(make_model("bert"))
    other = replace(view.layout, mlp=tuple(entry.without([0]) for entry in view.layout.mlp))
    with pytest.raises(PlanError, match=r"a layout of \[47, 47, 47\] \(neurons\)"):
        view.rename(other)
