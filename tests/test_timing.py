"""Latency tables: curves that a known clock is found in again, and budgets of milliseconds that are spent with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_model
from pydantic import ValidationError
from runs import TEXT, run, text_files, write_recipe
from test_passes import samples
from test_prune import saved, total

from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.timing import Curve, LatencyTable
from headwise.errors import PlanError
from headwise.gates.cost import Latency
from headwise.gates.timing import Clock, count_graphs, measure_table
from headwise.model import surgery
from headwise.model.edits import DropHeads, DropNeurons, EditPlan
from headwise.model.layout import Layout
from headwise.model.view import ModelView
from headwise.passes.base import make_plan
from headwise.passes.prune import Prune
from headwise.pipeline import timing
from headwise.pipeline.commands.planning import plan_passes
from headwise.pipeline.report.document import markdown


def write(view: ModelView, path: Path) -> None:
    """A "graph" that says nothing but how large the layers are."""
    path.write_text(json.dumps(view.layout.to_json()))


def clock(ms: Callable[[Layout], float], *, graphs: list[Layout] | None = None) -> Clock:
    def one(path: Path) -> Latency:
        layout = Layout.from_json(json.loads(path.read_text()))
        if graphs is not None:
            graphs.append(layout)
        value = ms(layout)
        return Latency(
            median_ms=value, p90_ms=value, rounds=1, device="a clock", threads=1, method="input 1x7", times_ms=(value,)
        )

    return lambda first, second: (one(first), one(second))


def even(layout: Layout) -> float:
    """3 ms, 2 ms for every head and 0.25 ms for every neuron."""
    heads = sum(len(layer.query) for layer in layout.attention)
    return 3 + 2 * heads + 0.25 * sum(len(mlp.neurons) for mlp in layout.mlp)


@pytest.mark.parametrize("family", ["bert", "llama", "whisper"])
def test_a_clock_that_is_known_is_found_again(family: str) -> None:
    view = ModelView.of(make_model(family))
    surgery.apply(view, EditPlan(edits=(DropNeurons(layer=1, neurons=tuple(range(9))),)))
    before, graphs = view.layout, list[Layout]()
    table = measure_table(view, write, clock(even, graphs=graphs))
    assert view.layout == before, "measuring changed the model"
    assert table.total == pytest.approx(even(before))
    assert (table.device, table.threads, table.method) == ("a clock", 1, "input 1x7")
    for layer, curve in zip(view.attention, table.heads, strict=True):
        assert curve.saved(len(layer.layout.units()), 1) == pytest.approx(2 * layer.layout.group)
    # The MLP that is smaller than the others takes part where it has the units.
    for mlp, curve in zip(view.mlp, table.neurons, strict=True):
        assert curve.saved(len(mlp.layout.neurons), 7) == pytest.approx(7 * 0.25)
    assert len(graphs) == 2 * (count_graphs(view) + 1)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_between_two_sizes_latency_is_linear_and_noise_never_makes_it_fall() -> None:
    """A clock that jumps where a kernel needs one more tile, and one on which less takes longer."""
    view = ModelView.of(make_model("bert"))

    def tiles(layout: Layout) -> float:
        return 10 + 3 * sum(-(-len(mlp.neurons) // 24) for mlp in layout.mlp)

    table = measure_table(view, write, clock(tiles))
    (curve,) = set(table.neurons)
    assert curve.saved(48, 24) == pytest.approx(3)
    assert curve.saved(48, 12) == pytest.approx(0), "36 neurons take as many tiles as 48"
    assert {curve.saved(4, 3) for curve in table.heads} == {0.0}
    backwards = measure_table(view, write, clock(lambda layout: 100 - even(layout) / 10))
    assert all(curve.ms == (0.0,) * len(curve.ms) for curve in (*backwards.heads, *backwards.neurons))


def with_table(view: ModelView, stats: HeadStats, *, flat: bool = False) -> HeadStats:
    """A table in which a millisecond is as much as a multiply-accumulate; in a flat one heads cost nothing."""
    heads, neurons, _ = stats[Stat.MACS]
    of_heads = [0.0 if flat else float(macs) for macs in heads]
    table = LatencyTable(
        total=float(total(stats)),
        heads=tuple(Curve(counts=(0, 4), ms=(0.0, 4 * macs)) for macs in of_heads),
        neurons=tuple(Curve(counts=(0, 48), ms=(0.0, 48 * float(macs))) for macs in neurons),
        device="a clock",
        threads=2,
        method="input 1x7",
    )
    return replace(stats, latency=table)


def test_a_budget_of_milliseconds_is_spent_as_one_of_macs_where_both_cost_the_same() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    stats = collect(view, task, examples, Prune(macs=0.5).needs())
    timed = with_table(view, stats)
    for share in (0.9, 0.7, 0.5):
        by_macs, by_time = Prune(macs=share).plan(view, stats), Prune(latency=share).plan(view, timed)
        assert by_time.edits == by_macs.edits
        assert timed.latency is not None
        left = timed.latency.predict(view.layout, by_time.predict(view.layout))
        assert left == pytest.approx(total(stats) - saved(view, by_macs, stats))
        assert "ms are predicted to stay" in by_time.summary
        assert by_time.summary.endswith("measured on a clock, 2 threads, input 1x7")


def test_what_saves_no_time_stays() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    timed = with_table(view, collect(view, task, examples, Prune(macs=0.5).needs()), flat=True)
    plan = Prune(latency=0.9).plan(view, timed)
    assert plan.edits
    assert not any(isinstance(edit, DropHeads) for edit in plan.edits)


def test_a_budget_of_latency_that_cannot_be_met_is_refused() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    with pytest.raises(PlanError, match="a budget of latency without a latency table"):
        make_plan(Prune(latency=0.5), view, task, examples)
    table = measure_table(view, write, clock(lambda layout: 100 + even(layout)))
    with pytest.raises(PlanError, match=r"latency: 0.5, but 0.\d+ of the latency cannot go"):
        make_plan(Prune(latency=0.5), view, task, examples, latency=table)
    for wrong in ({}, {"macs": 0.5, "latency": 0.5}):
        with pytest.raises(ValidationError, match="give either macs or latency"):
            Prune.model_validate(wrong)


def test_a_run_keeps_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once: a run that goes on makes the same plan, whatever the machine would measure by then."""
    asked: list[Layout] = []
    monkeypatch.setattr(timing.Timing, "_write", lambda self, view, path: write(view, path))
    monkeypatch.setattr(timing, "ort_clock", lambda row: clock(even, graphs=asked))
    folder = text_files(tmp_path / "run")
    passes = [{"prune": {"latency": 0.7}}]
    write_recipe(folder, {**TEXT, "passes": passes, "gate": {"max_drop": 100.0}, "export": {"precision": "fp32"}})
    found = run(folder)
    assert found.exit_code == 0, found.reason
    record = found.report["stages"][1]["record"]
    assert record["latency"]["predicted_ratio"] == pytest.approx(record["latency"]["measured_ratio"])
    assert record["latency"]["predicted_ratio"] <= 0.7
    assert record["latency"]["measured_ms"] == even(Layout.from_json(record["after"]))
    assert "prune: latency 6" in markdown(found.report)
    assert "1 thread, input 1x7" in markdown(found.report)
    planned = plan_passes(str(folder / "checkpoint"), str(folder / "recipe.yaml"))
    assert planned[0]["plan"]["edits"] == record["plan"]["edits"]
    measured = len(asked)
    assert (found.folder / "01-prune.latency" / "table.json").exists()
    monkeypatch.setattr(timing, "ort_clock", lambda row: clock(lambda layout: 1 / even(layout), graphs=asked))
    again = run(folder, "passes.0.ridge=2.0")
    assert again.report["stages"][1]["record"]["plan"]["edits"] == record["plan"]["edits"]
    assert len(asked) == measured + 2, "only what the new stage made was measured, beside what it was made of"
