"""Families whose attention is unusual: a pruned model is exported, and the graph gives what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import WIDTH, make_inputs, make_model

from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run
from headwise.model.view import ModelView


@pytest.mark.parametrize("family", ["albert", "whisper"])
def test_the_graph_of_a_pruned_model_is_the_model(family: str, tmp_path: Path) -> None:
    view, tensors = ModelView.of(make_model(family)), make_inputs(family)
    gone = [DropHeads(layer=layer.index, query=(0, 1, 2)[: layer.index + 1]) for layer in view.attention]
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
