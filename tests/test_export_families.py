"""Families whose attention is unusual: a pruned model is exported, and the graph gives what it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import WIDTH, make_inputs, make_model, randomize, t5_config
from torch import nn

from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run
from headwise.model.view import ModelView

# Two layers of an encoder that differ in their heads have different tables of position biases.
INSTEAD: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5Model(t5_config(num_layers=2, num_decoder_layers=1))
}


@pytest.mark.parametrize("family", ["albert", "whisper", "t5"])
def test_the_graph_of_a_pruned_model_is_the_model(family: str, tmp_path: Path) -> None:
    module = randomize(INSTEAD[family]()) if family in INSTEAD else make_model(family)
    view, tensors = ModelView.of(module), make_inputs(family)
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
