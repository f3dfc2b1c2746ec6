"""Neurons behind the passes: the recipe, the plan, the budget of the exported graph, the report, and what is saved."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from runs import TEXT, run, text_files, write_recipe

import headwise
from headwise.model.layout import Layout
from headwise.pipeline.commands.planning import plan_passes, plan_table
from headwise.pipeline.report.document import markdown
from headwise.pipeline.report.html import html
from headwise.pipeline.report.neuron_tables import neuron_rows, neuron_tables
from headwise.pipeline.run import Run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Neurons first, then one budget for heads and neurons of what is left."""
    folder = text_files(tmp_path_factory.mktemp("prune") / "run")
    passes = [{"prune-mlp": {"ratio": 0.25}}, {"prune": {"macs": 0.7}}]
    write_recipe(folder, {**TEXT, "passes": passes, "gate": {"max_drop": 100.0}, "export": {"precision": "fp32"}})
    return folder, run(folder)


def stages(found: Run) -> dict[str, dict[str, object]]:
    return {stage["name"]: stage for stage in found.report["stages"]}


def test_the_graph_has_the_macs_that_the_budget_allows(done: tuple[Path, Run]) -> None:
    _, found = done
    assert found.exit_code == 0, found.reason
    cost = {name: stage["cost"]["macs"] for name, stage in stages(found).items()}  # type: ignore[index]
    assert cost["onnx"] == cost["prune"]
    assert 0.65 * cost["prune-mlp"] < cost["onnx"] <= 0.7 * cost["prune-mlp"]


def test_plan_says_what_compress_does(done: tuple[Path, Run]) -> None:
    folder, found = done
    planned = plan_passes(str(folder / "checkpoint"), str(folder / "recipe.yaml"))
    for entry, name in zip(planned, ("prune-mlp", "prune"), strict=True):
        record = stages(found)[name]["record"]
        assert entry["plan"]["edits"] == record["plan"]["edits"]  # type: ignore[index]
    console = Console(file=io.StringIO(), width=80)
    console.print(plan_table(planned))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "prune-mlp: 24 of 96 neurons would go" in text
    assert "multiply-accumulates per sample stay" in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("query heads") == 2, "a table of heads that nothing happened to, or none where they went"


def test_the_report_says_which_neurons_went(done: tuple[Path, Run]) -> None:
    _, found = done
    first, second = neuron_tables(found.report)
    assert (first.stage, second.stage) == ("prune-mlp", "prune")
    assert first.headline == "24 of 96 neurons"
    assert all(float(row[4]) >= float(row[5]) for row in (*first.rows, *second.rows) if row[4] != "\N{EN DASH}")
    shown, page = markdown(found.report), html(found.report)
    for text in (shown, page):
        assert "24 of 96 neurons" in text
        assert first.rows[0][3].split(" (")[0] in text
        assert "multiply-accumulates per sample stay" in text
    assert "## Neurons: prune-mlp" in shown
    assert "## Heads: prune-mlp" not in shown
    assert "## Heads: prune" in shown


def test_what_is_saved_is_what_was_measured(done: tuple[Path, Run]) -> None:
    _, found = done
    record = stages(found)["prune"]["record"]
    loaded = headwise.load(str(found.folder / "02-prune" / "model"))
    assert loaded.view().layout == Layout.from_json(record["after"])  # type: ignore[index]


def test_a_row_names_runs_of_neighbours_and_counts_the_others() -> None:
    mlp = {"width": 40, "neurons": "0-39"}
    left = {"width": 40, "neurons": " ".join(str(n) for n in range(0, 40, 2))}
    record = {
        "before": {"attention": [], "mlp": [mlp, mlp]},
        "after": {"attention": [], "mlp": [left, mlp]},
        "plan": {"edits": [{"type": "drop-neurons", "layer": 0, "neurons": ""}], "mlp_notes": {"0": "why"}},
    }
    assert neuron_rows(json.loads(json.dumps(record))) == [
        ("0", "40", "20", "1 3 5 7 9 11 and 14 more (why)"),
        ("1", "40", "40", "none"),
    ]
