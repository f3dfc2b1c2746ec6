"""Families whose attention is unusual: a pruned model is exported, and the graph gives what it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import WIDTH, albert_config, deberta_config, make_inputs, randomize, t5_config, whisper_config
from torch import nn

from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import input_names, run
from headwise.model.view import ModelView

SMALL: dict[str, Callable[[], nn.Module]] = {
    "albert": lambda: transformers.AlbertModel(albert_config(num_hidden_layers=2, num_hidden_groups=1)),
    # Two layers of an encoder that differ in their heads have different tables of position biases.
    "t5": lambda: transformers.T5EncoderModel(t5_config(num_layers=2)),
    "deberta-v2": lambda: transformers.DebertaV2Model(deberta_config(num_hidden_layers=2)),
    "whisper": lambda: transformers.WhisperModel(whisper_config()),
}
"""As few layers as show what is unusual: an export takes seconds per layer."""


@pytest.mark.parametrize("family", sorted(SMALL))
def test_the_graph_of_a_pruned_model_is_the_model(family: str, tmp_path: Path) -> None:
    view = ModelView.of(randomize(SMALL[family]()))
    taken = input_names(view.module)
    tensors = {name: tensor for name, tensor in make_inputs(family).items() if name in taken}
    gone = [DropHeads(layer=layer.index, query=(0, 1, 2)[: layer.index % 3 + 1]) for layer in view.attention]
    surgery.apply(view, EditPlan(edits=tuple(gone)))
    inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
    dynamic = {name: (0, 1) if array.ndim == 2 else (0,) for name, array in inputs.items()}
    info = to_onnx(view.module, inputs, tmp_path / "model.onnx", dynamic=dynamic)
    assert len({found.shape for found in info.parity}) >= 3
    assert max(found.max_abs for found in info.parity) < 1e-4
    # Every layer is in the graph as often as it runs, with the heads that it has left.
    cost = graph_cost(tmp_path / "model.onnx", {name: array.shape for name, array in inputs.items()})
    for layer in view.attention:
        features: list[int] = []
        with layer.watch_heads(lambda heads, features=features: features.append(heads.numel())), torch.no_grad():
            run(view.module, tensors)
        assert len(features) == layer.runs
        assert cost.by_scope[f"{layer.path}.{layer.family.output}"] == sum(features) * WIDTH
