"""A budget of multiply-accumulates or of latency, spent on heads, on MLP neurons, or on both, without training.

Three commands, each of which writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/mac_budget.py options --out OUT --model DIR --train FILE --dev FILE
    python benchmarks/mac_budget.py budgets --out OUT --model DIR --train FILE --test FILE
    python benchmarks/mac_budget.py milliseconds --out OUT --model DIR --train FILE --test FILE
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from common import Bench, Calibration, Results, Row, best, both, common, rule, sts_bench, sts_files, table, threads
from pydantic import PrivateAttr

from headwise.calibration.data import sample
from headwise.calibration.shapes import cost_row
from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.export.onnx import to_onnx
from headwise.export.runners import OrtRunner
from headwise.gates.cost import graph_cost, latency
from headwise.gates.timing import measure_table, ort_clock
from headwise.model.checkpoint import Checkpoint
from headwise.model.edits import EditPlan
from headwise.model.view import ModelView
from headwise.passes.base import Pass, run_pass
from headwise.passes.prune import Prune
from headwise.passes.prune_heads import PruneHeads
from headwise.passes.prune_mlp import PruneMlp
from headwise.passes.recovery import Recovery

SHARES = (0.75, 0.66, 0.50)
SEQUENCE = 128
GRID: tuple[Row, ...] = tuple(
    {"score": score, "ridge": ridge}
    for score in ("gauss-newton", "reconstruction", "contribution")
    for ridge in (0.1, 1.0)
)


class Planned(Pass):
    """A pass with a plan made beforehand, so that one collection of statistics serves many settings."""

    name = "planned"
    _of: Pass = PrivateAttr()
    _plan: EditPlan = PrivateAttr()

    def needs(self) -> frozenset[Stat]:
        return frozenset()

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        return self._plan

    def recovery(self) -> Recovery | None:
        return self._of.recovery()


def prune(bench: Bench, pass_: Pass, stats: HeadStats, calibration: Calibration) -> tuple[Checkpoint, Row]:
    """A pruned copy, and what it has left."""
    start = time.perf_counter()
    candidate = bench.checkpoint.copy()
    view = candidate.view()
    planned = Planned()
    planned._of, planned._plan = pass_, pass_.plan(view, stats)
    run_pass(planned, view, bench.checkpoint.copy().view(), bench.task, calibration.examples)
    row = {
        "heads": [len(layer.query) for layer in view.layout.attention],
        "neurons": [len(mlp.neurons) for mlp in view.layout.mlp],
        "seconds": time.perf_counter() - start,
    }
    return candidate, row


def passes(stats: HeadStats, share: float, options: Row) -> dict[str, Pass | None]:
    """What spends the budget in each way; None where it does not reach."""
    of_heads, of_neurons, (total,) = (macs.tolist() for macs in stats[Stat.MACS])
    counts = [len(tensor) for tensor in stats[Stat.UNIT_GAUSS_NEWTON]]
    heads, neurons = counts[: len(of_heads)], counts[len(of_heads) :]
    whole_heads = sum(macs * count for macs, count in zip(of_heads, heads, strict=True))
    whole_neurons = sum(macs * count for macs, count in zip(of_neurons, neurons, strict=True))
    of = {"heads": (1 - share) * total / whole_heads, "neurons": (1 - share) * total / whole_neurons}
    most = 1 - len(heads) / sum(heads)
    ridge = {"ridge": options["ridge"]}
    return {
        "heads": PruneHeads(ratio=of["heads"], score="gauss-newton", **ridge) if of["heads"] <= most else None,
        "neurons": PruneMlp(ratio=of["neurons"], **options),
        "both": Prune(macs=share, **options),
    }


@click.group()
@threads
def main(threads: int) -> None:
    """Measure budgets; every command writes its part of OUT.json and all of OUT.md."""
    torch.set_num_threads(threads)


def samples_option(command: Any) -> Any:
    return click.option("--samples", default=2048, show_default=True, help="Calibration pairs.")(command)


@main.command()
@common
@samples_option
@sts_files("train", "dev")
def options(out: Path, model: str, samples: int, **files: str) -> None:
    """Scores and ridges at half of the multiply-accumulates, on dev."""
    bench, train = sts_bench(model, files)
    calibration = bench.calibration(sample(train, samples, seed=0))
    made = [Prune(macs=SHARES[-1], **setting) for setting in GRID]
    needs = frozenset[Stat]().union(*(pass_.needs() for pass_ in made))
    stats = collect(bench.checkpoint.copy().view(), bench.task, calibration.examples, needs, sequence=SEQUENCE)
    rows = []
    for setting, pass_ in zip(GRID, made, strict=True):
        candidate, row = prune(bench, pass_, stats, calibration)
        rows.append({**setting, **row, **bench.evaluate(candidate, ("dev",), calibration.texts)})
        click.echo(rows[-1], err=True)
    RESULTS.save(out, "options", {**bench.facts(), "samples": samples, "rows": rows})


@main.command()
@common
@samples_option
@sts_files("train", "test")
@click.option("--score", default="gauss-newton", show_default=True, help="As chosen on dev.")
@click.option("--ridge", default=1.0, show_default=True, help="As chosen on dev.")
def budgets(out: Path, model: str, samples: int, score: str, ridge: float, **files: str) -> None:
    """Heads, neurons, and both, at every share; latencies of all graphs in one interleaved run."""
    bench, train = sts_bench(model, files)
    calibration = bench.calibration(sample(train, samples, seed=0))
    chosen = {"score": score, "ridge": ridge}
    needs = Prune(macs=0.5, **chosen).needs() | {Stat.GAUSS_NEWTON, Stat.UNIT_GAUSS_NEWTON}
    stats = collect(bench.checkpoint.copy().view(), bench.task, calibration.examples, needs, sequence=SEQUENCE)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        graphs = {"untouched": Path(scratch, "untouched.onnx")}
        cost = {"untouched": export(bench, bench.checkpoint.copy(), graphs["untouched"])}
        for share in SHARES:
            for kind, pass_ in passes(stats, share, chosen).items():
                if pass_ is None:
                    rows.append({"share": share, "kind": kind})
                    continue
                candidate, row = prune(bench, pass_, stats, calibration)
                found = bench.evaluate(candidate, ("test",), calibration.texts)
                name = f"{kind}-{share}"
                graphs[name] = Path(scratch, f"{name}.onnx")
                cost[name] = export(bench, candidate, graphs[name])
                rows.append({"share": share, "kind": kind, "macs": cost[name], **row, **found})
                click.echo(rows[-1], err=True)
        load = os.getloadavg()[0]
        measured = latencies(bench, graphs)
    for row in rows:
        if "macs" in row:
            row["latency_ms"] = measured[f"{row['kind']}-{row['share']}"]
    content = {**chosen, "samples": samples, "load": load, "dense_macs": cost["untouched"]}
    RESULTS.save(out, "budgets", {**bench.facts(), **content, "dense_latency_ms": measured["untouched"], "rows": rows})


@main.command()
@common
@samples_option
@sts_files("train", "test")
@click.option("--score", default="gauss-newton", show_default=True, help="As chosen on dev.")
@click.option("--ridge", default=1.0, show_default=True, help="As chosen on dev.")
def milliseconds(out: Path, model: str, samples: int, score: str, ridge: float, **files: str) -> None:
    """Budgets of latency: what the table predicts, and what the graphs take."""
    bench, train = sts_bench(model, files)
    calibration = bench.calibration(sample(train, samples, seed=0))
    passes = {share: Prune.model_validate({"latency": share, "score": score, "ridge": ridge}) for share in SHARES}
    view = bench.checkpoint.copy().view()
    row = cost_row(bench.checkpoint.module, bench.examples["test"], SEQUENCE)
    load = os.getloadavg()[0]
    timed = measure_table(view, lambda of, path: write_graph(bench, of, path), ort_clock(row))
    stats = collect(view, bench.task, calibration.examples, passes[SHARES[0]].needs(), sequence=SEQUENCE)
    stats = replace(stats, latency=timed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        graphs = {"untouched": Path(scratch, "untouched.onnx")}
        dense = export(bench, bench.checkpoint.copy(), graphs["untouched"])
        for share, pass_ in passes.items():
            candidate, row = prune(bench, pass_, stats, calibration)
            predicted = timed.predict(view.layout, candidate.view().layout) / timed.total
            graphs[str(share)] = Path(scratch, f"{share}.onnx")
            macs = export(bench, candidate, graphs[str(share)]) / dense
            found = bench.evaluate(candidate, ("test",), calibration.texts)
            rows.append({"share": share, "predicted": predicted, "macs": macs, **row, **found})
            click.echo(rows[-1], err=True)
        measured = latencies(bench, graphs)
    for row in rows:
        row["measured"] = measured[str(row["share"])] / measured["untouched"]
    content = {"score": score, "ridge": ridge, "samples": samples, "load": load, "table": timed.to_json()}
    RESULTS.save(out, "milliseconds", {**bench.facts(), **content, "rows": rows})


def export(bench: Bench, checkpoint: Checkpoint, path: Path) -> int:
    """Write the graph; its multiply-accumulates for one text of 128 tokens."""
    write_graph(bench, checkpoint.view(), path)
    row = cost_row(bench.checkpoint.module, bench.examples["test"], SEQUENCE)
    return graph_cost(path, {name: array.shape for name, array in row.items()}).macs


def write_graph(bench: Bench, view: ModelView, path: Path) -> None:
    examples = bench.examples["test"]
    to_onnx(view.module, examples.example_batch(), path, dynamic=examples.dynamic_axes())


def latencies(bench: Bench, graphs: dict[str, Path]) -> dict[str, float]:
    """Median of 100 interleaved calls of every graph, one text of 128 tokens, one thread."""
    row = cost_row(bench.checkpoint.module, bench.examples["test"], SEQUENCE)
    with ExitStack() as stack:
        runners = {name: stack.enter_context(OrtRunner(path, threads=1)) for name, path in graphs.items()}
        return {name: found.median_ms for name, found in latency(runners, row, rounds=100, warmup=10).items()}


def options_text(part: Row) -> str:
    rows = [[row["score"], f"{row['ridge']:g}", *sizes(row), both(row["dev"])] for row in part["rows"]]
    chosen = best(part["rows"])
    return (
        "## Options at half of the multiply-accumulates, chosen on STS-B dev\n\n"
        f"Calibration: {part['samples']} training pairs. Cells are Spearman x 100 / fidelity; untouched "
        f"{part['untouched']['dev']['spearman']:.2f}.\n\n"
        + table(["score", "ridge", "kept heads", "kept neurons", "dev"], rows)
        + f"\nChosen: {chosen['score']} with ridge {chosen['ridge']:g} ({rule()}).\n"
    )


def budgets_text(part: Row) -> str:
    untouched, dense = part["untouched"], part["dense_latency_ms"]
    rows = [["all", "untouched", "1.00", "", "", both(untouched["test"]), f"{dense:.2f} ms"]]
    for row in part["rows"]:
        if "macs" not in row:
            rows.append([f"{row['share']:.0%}", row["kind"], "out of reach", "", "", "", ""])
            continue
        ms = f"{row['latency_ms']:.2f} ms ({row['latency_ms'] / dense:.2f})"
        macs = f"{row['macs'] / part['dense_macs']:.3f}"
        rows.append([f"{row['share']:.0%}", row["kind"], macs, *sizes(row), both(row["test"]), ms])
    return (
        "## Heads, neurons, or both\n\n"
        f"Score {part['score']}, ridge {part['ridge']:g}, {part['samples']} calibration pairs, no training. Cells are "
        "Spearman x 100 on test / fidelity on the pairs of which calibration saw neither sentence. MACs are counted in "
        "the exported graph at 128 tokens, as a share of the untouched one. Latency: ONNX Runtime, fp32, one text of "
        "128 tokens, one thread, median of 100 calls, all graphs interleaved in one run; load average "
        f"{part['load']:.1f} when it began.\n\n"
        + table(["budget", "spent on", "MACs", "kept heads", "kept neurons", "test", "latency"], rows)
    )


def milliseconds_text(part: Row) -> str:
    timed = part["table"]
    rows = [
        [
            f"{row['share']:.0%}",
            f"{row['predicted']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['macs']:.3f}",
            *sizes(row),
            both(row["test"]),
        ]
        for row in part["rows"]
    ]
    return (
        "## A budget of latency\n\n"
        f"`prune: {{latency: ...}}`, score {part['score']}, ridge {part['ridge']:g}, {part['samples']} calibration "
        "pairs. Shares are of the untouched model. Predicted: by the table that the budget was spent with, in which "
        f"the untouched model takes {timed['total']:.2f} ms. Measured: all graphs interleaved in one run, as above. "
        f"{timed['device']}, {timed['threads']} thread(s), {timed['method']}; load average {part['load']:.1f} when the "
        "table was begun. The last column is Spearman x 100 / fidelity, as above.\n\n"
        + table(["budget", "predicted", "measured", "MACs", "kept heads", "kept neurons", "test"], rows)
    )


def sizes(row: Row) -> list[str]:
    return [" ".join(map(str, row[key])) for key in ("heads", "neurons")]


RESULTS = Results(
    title="A budget of multiply-accumulates or latency without training",
    writers={"options": options_text, "budgets": budgets_text, "milliseconds": milliseconds_text},
)


if __name__ == "__main__":
    main()
