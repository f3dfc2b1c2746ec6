"""MACs of heads and neurons are those that torch counts in the module and that the exported graph has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_inputs, make_model

from headwise.calibration.work import block_macs, count_tokens, work_of
from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.gates.model_cost import model_cost
from headwise.model import surgery
from headwise.model.layout import DropHeads, EditPlan
from headwise.model.neurons import DropNeurons
from headwise.model.view import ModelView


def one_row(family: str) -> dict[str, torch.Tensor]:
    return {name: tensor[:1] for name, tensor in make_inputs(family).items()}


def removals(view: ModelView) -> EditPlan:
    heads = tuple(DropHeads(layer=i, query=view.layout.attention[i].units()[0]) for i in (0, 2))
    return EditPlan(edits=(*heads, DropNeurons(layer=1, neurons=(3, 4, 5))))


def test_what_a_removal_saves_is_what_torch_counts(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), one_row(family)
    tokens, before = count_tokens(view, inputs), model_cost(view, inputs)
    whole = block_macs(view, tokens)
    saved = 0
    for edit in removals(view).edits:
        if isinstance(edit, DropNeurons):
            saved += 3 * work_of(view.mlp[edit.layer], tokens[len(view.attention) + edit.layer]).neuron
        elif isinstance(edit, DropHeads):
            layer = view.attention[edit.layer]
            work = work_of(layer, tokens[edit.layer])
            saved += len(edit.query) * work.query + len(edit.query) // layer.layout.group * work.kv
    surgery.apply(view, removals(view))
    assert before.macs - model_cost(view, inputs).macs == saved > 0
    assert whole - block_macs(view, count_tokens(view, inputs)) == saved


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "torch"])
def test_block_macs_are_those_of_the_exported_graph(family: str, tmp_path: Path) -> None:
    view, inputs = ModelView.of(make_model(family)), one_row(family)
    surgery.apply(view, removals(view))
    scopes = [layer.path for layer in view.attention] + [path for mlp in view.mlp for path in mlp.paths]
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    to_onnx(view.module, arrays, tmp_path / "model.onnx", dynamic={})
    graph = graph_cost(tmp_path / "model.onnx", {n: a.shape for n, a in arrays.items()}, attention_scopes=scopes)
    assert graph.attention_macs == block_macs(view, count_tokens(view, inputs))
