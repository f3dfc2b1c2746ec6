"""Layers that share one attention module: shown once, measured and refitted over all of their runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import WIDTH, albert_config, largest_difference, make_inputs, make_model
from rich.console import Console
from test_passes import samples
from test_stats import single_rows

from headwise.calibration.refit import fit_output
from headwise.calibration.stats import Stat, collect
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run
from headwise.model.view import ModelView
from headwise.pipeline.commands.inspection import inspect_checkpoint, inspection_table

RUNS = 2


@pytest.mark.parametrize(
    ("layers", "groups", "inner", "runs"), [(12, 1, 1, [12]), (5, 2, 1, [3, 2]), (4, 2, 2, [2, 2, 2, 2])]
)
def test_a_shared_layer_is_one_layer_that_runs_often(layers: int, groups: int, inner: int, runs: list[int]) -> None:
    config = albert_config(num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner)
    view = ModelView.of(transformers.AlbertModel(config).eval())
    assert [layer.runs for layer in view.attention] == runs
    seen = [0] * len(runs)
    for layer in view.attention:

        def count(_: torch.Tensor, index: int = layer.index) -> None:
            seen[index] += 1

        with layer.watch_heads(count), torch.no_grad():
            run(view.module, make_inputs("albert"))
    assert seen == runs


def test_inspect_says_how_often_a_layer_runs(tmp_path: Path) -> None:
    make_model("albert").save_pretrained(tmp_path)
    found = inspect_checkpoint(str(tmp_path), sequence=8)
    assert [layer["runs"] for layer in found["layers"]] == [RUNS] * 3
    console = Console(width=200)
    with console.capture() as shown:
        console.print(inspection_table(found))
    assert shown.get().count(".attention (2 runs)") == 3
    # Per run and token: four projections, and scores and values over 8 tokens.
    assert found["attention_macs"] == 3 * RUNS * 8 * (4 * WIDTH * WIDTH + 2 * WIDTH * 8)


def test_statistics_are_means_over_all_runs() -> None:
    view = ModelView.of(make_model("albert"))
    task, examples = samples(view, "albert")
    stats = collect(view, task, examples, {Stat.HEAD_MEAN, Stat.INPUT_MOMENT}, batch_size=4)
    layer, heads, inputs = view.attention[1], [], []
    with layer.watch_heads(heads.append), layer.watch_input(inputs.append), torch.no_grad():
        for row in single_rows(examples):
            run(view.module, row)
    assert len(heads) == RUNS * len(examples)
    assert torch.allclose(stats[Stat.HEAD_MEAN][1], torch.cat(heads, 1)[0].double().mean(0), atol=1e-5)
    tokens = torch.cat(inputs, 1)[0].double()
    assert torch.allclose(stats[Stat.INPUT_MOMENT][1][:-1, :-1], tokens.T @ tokens / len(tokens), atol=1e-4)


def test_a_copy_of_a_head_goes_losslessly_from_all_runs() -> None:
    """The target of every run is on the teacher's inputs: on its own ones, the second run would not know the first."""
    student, teacher = (ModelView.of(make_model("albert")) for _ in range(2))
    _, examples = samples(student, "albert")
    for view in (student, teacher):
        old = view.attention[0].read()
        for tensor in (old.query, old.key, old.value, old.query_bias, old.key_bias, old.value_bias):
            assert tensor is not None
            tensor[3] = tensor[1]
    inputs = make_inputs("albert")
    with torch.no_grad():
        before = run(teacher.module, inputs)
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=0, query=(3,)),)))
    fit = fit_output(student, teacher, 0, examples, ridge=1e-9)
    assert fit.before > 1e-3
    assert fit.after < 1e-10
    surgery.set_output(student.attention[0], fit.weight, fit.bias)
    with torch.no_grad():
        assert largest_difference(before, run(student.module, inputs)) < 1e-3
