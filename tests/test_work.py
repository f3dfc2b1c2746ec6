"""MACs of heads and neurons are those that are gone after surgery, from the module and from the exported graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_inputs, make_model
from test_stats import language_examples

from headwise.calibration.stats import Stat, collect
from headwise.calibration.work import count_work
from headwise.export.onnx import to_onnx
from headwise.gates.cost import graph_cost
from headwise.gates.model_cost import model_cost
from headwise.model import surgery
from headwise.model.counting import count_macs
from headwise.model.edits import ClusterHeads, DropHeads, DropNeurons, EditPlan
from headwise.model.view import ModelView


def one_row(family: str) -> dict[str, torch.Tensor]:
    return {name: tensor[:1] for name, tensor in make_inputs(family).items()}


def removals(view: ModelView) -> EditPlan:
    heads = tuple(DropHeads(layer=i, query=view.layout.attention[i].units()[0]) for i in (0, 2))
    return EditPlan(edits=(*heads, DropNeurons(layer=1, neurons=(3, 4, 5))))


def test_what_a_removal_saves_is_what_is_counted_afterwards(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), one_row(family)
    layout, before = view.layout, model_cost(view, inputs)
    work = count_work(view, inputs)
    assert work.total == before.macs
    assert view.layout == layout, "counting changed the model"
    surgery.apply(view, removals(view))
    saved = work.heads[0] + work.heads[2] + 3 * work.neurons[1]
    assert before.macs - model_cost(view, inputs).macs == saved
    assert min(*work.heads, *work.neurons) > 0


def test_the_work_of_a_head_and_of_a_neuron_is_that_of_the_formula() -> None:
    """MACs of T tokens: 4 projections of D * H and T * T * 2 * H per head, 2 * D per neuron."""
    view = ModelView.of(make_model("bert"))
    work = count_work(view, one_row("bert"))
    assert work.heads == (7 * 4 * 32 * 8 + 7 * 7 * 2 * 8,) * 3
    assert work.neurons == (7 * 2 * 32,) * 3


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_exported_graph_saves_as_much(family: str, tmp_path: Path) -> None:
    view, inputs = ModelView.of(make_model(family)), one_row(family)
    work = count_work(view, inputs)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}

    def macs(name: str) -> int:
        to_onnx(view.module, arrays, tmp_path / name, dynamic={})
        return graph_cost(tmp_path / name, {n: a.shape for n, a in arrays.items()}, attention_scopes=[]).macs

    before = macs("before.onnx")
    surgery.apply(view, removals(view))
    assert before - macs("after.onnx") == work.heads[0] + work.heads[2] + 3 * work.neurons[1]


def test_layers_that_cannot_lose_anything_have_no_work_to_save() -> None:
    view, inputs = ModelView.of(make_model("torch")), one_row("torch")
    lone = DropHeads(layer=0, query=(0, 1, 2))
    clustered = ClusterHeads(layer=1, clusters=((0, 1), (2, 3)))
    surgery.apply(view, EditPlan(edits=(lone, clustered, DropNeurons(layer=2, neurons=tuple(range(47))))))
    work = count_work(view, inputs)
    assert (work.heads[0], work.heads[1], work.neurons[2]) == (0, 0, 0)
    assert work.heads[2] > 0


def test_a_layer_that_runs_twice_counts_twice() -> None:
    view, inputs = ModelView.of(make_model("albert")), one_row("albert")
    counts = count_macs(view.module, inputs)
    attention = count_macs(view.attention[0].module, {"hidden_states": torch.zeros(1, 7, 32)})
    assert counts[view.attention[0].path] == 2 * attention[""]


@pytest.mark.parametrize(("sequence", "length"), [(None, 40), (16, 16)])
def test_macs_are_counted_at_the_asked_length_or_what_the_model_takes(sequence: int | None, length: int) -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = language_examples(view)
    heads, neurons, total = collect(view, task, examples, {Stat.MACS}, sequence=sequence)[Stat.MACS]
    work = count_work(view, {"input_ids": torch.ones(1, length, dtype=torch.long)})
    assert (tuple(heads.tolist()), tuple(neurons.tolist()), int(total)) == (work.heads, work.neurons, work.total)
