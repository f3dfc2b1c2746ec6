"""Head pruning, measured: every score, share and recovery on STS-B, and whole kv groups of a language model.

Three commands, each of which writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/head_pruning.py scores   --out OUT --model DIR --train FILE --dev FILE --test FILE
    python benchmarks/head_pruning.py options  --out OUT --model DIR --train FILE --dev FILE --test FILE
    python benchmarks/head_pruning.py language --out OUT --model DIR --text FILE
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from common import (
    Bench,
    Calibration,
    Results,
    Row,
    best,
    both,
    common,
    language_bench,
    rule,
    sts_bench,
    sts_files,
    table,
    threads,
)
from pydantic import PrivateAttr

from headwise.calibration.data import Table, sample
from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.tasks import Examples
from headwise.model.edits import EditPlan
from headwise.model.view import ModelView
from headwise.passes.base import run_pass
from headwise.passes.prune_heads import PruneHeads

RATIOS = (0.25, 0.50, 0.66)
ZEROED = {"fold_mean": False, "refit": False}
RECOVERIES: Mapping[str, Row] = {"zeroed": ZEROED, "mean-fold": {"refit": False}, "refit": {}}
RANDOM: tuple[Row, ...] = tuple({"score": "random", "seed": seed} for seed in range(3))
SCORES: tuple[Row, ...] = (
    *RANDOM,
    {"score": "weight-norm"},
    {"score": "contribution", "scope": "layer"},
    {"score": "contribution"},
    {"score": "michel"},
    {"score": "fisher"},
    {"score": "gauss-newton"},
)
LANGUAGE_SCORES = (*RANDOM, {"score": "contribution"}, {"score": "gauss-newton"})
LANGUAGE_RATIOS = (0.25, 0.50)
LANGUAGE_RECOVERIES: Mapping[str, Row] = {"zeroed": ZEROED, "refit, ridge 1": {}, "refit, ridge 0.01": {"ridge": 0.01}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the options grid; ``steps`` are shares of the heads that go in all, after each step."""

    score: str
    samples: int = 1024
    ridge: float = 1.0
    draws: int = 4
    steps: tuple[float, ...] = (1.0,)


GRID = (
    *(Setting(score=s, samples=n) for s in ("contribution", "gauss-newton") for n in (512, 1024, 2048)),
    *(Setting(score=s, ridge=r) for s in ("contribution", "gauss-newton") for r in (0.3, 3.0)),
    *(Setting(score="gauss-newton", draws=d) for d in (1, 16)),
    *(Setting(score=s, steps=(0.5, 1.0)) for s in ("contribution", "gauss-newton")),
)


class Planned(PruneHeads):
    """Head pruning with a plan made beforehand, so that one collection of statistics serves many settings."""

    _made: EditPlan = PrivateAttr()

    def needs(self) -> frozenset[Stat]:
        return frozenset()

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        return self._made


def prune(bench: Bench, view: ModelView, pass_: PruneHeads, stats: HeadStats, calibration: Examples) -> list[list[int]]:
    """Prune in place. The kv heads that every layer keeps, which are its query heads where none is shared."""
    planned = Planned(**pass_.model_dump())
    planned._made = pass_.plan(view, stats)
    run_pass(planned, view, bench.checkpoint.copy().view(), bench.task, calibration)
    return [list(layer.kv) for layer in view.layout.attention]


def measure_cells(
    bench: Bench, calibration: Calibration, cells: Sequence[tuple[str, PruneHeads]], splits: Sequence[str]
) -> list[Row]:
    """Every (recovery, pass) on a copy of the model, from one collection of statistics."""
    needs = frozenset[Stat]().union(*(pass_.needs() for _, pass_ in cells))
    stats = collect(bench.checkpoint.copy().view(), bench.task, calibration.examples, needs)
    rows = []
    for recovery, pass_ in cells:
        candidate = bench.checkpoint.copy()
        row = {"recovery": recovery, **pass_.model_dump()}
        row["kept"] = prune(bench, candidate.view(), pass_, stats, calibration.examples)
        rows.append(row | bench.evaluate(candidate, splits, calibration.texts))
        say(rows[-1])
    return rows


def measure_setting(bench: Bench, train: Table, setting: Setting, ratio: float, splits: Sequence[str]) -> Row:
    """One row of the options grid. Each step collects statistics on the model that the step before it left."""
    start = time.perf_counter()
    calibration = bench.calibration(sample(train, setting.samples, seed=0))
    candidate = bench.checkpoint.copy()
    view = candidate.view()
    heads = sum(len(layer.query) for layer in view.layout.attention)
    for step in setting.steps:
        left = sum(len(layer.query) for layer in view.layout.attention)
        gone = left - heads + round(step * ratio * heads)
        options = {"ratio": gone / left, "score": setting.score, "ridge": setting.ridge}
        pass_ = PruneHeads.model_validate(options)
        stats = collect(view, bench.task, calibration.examples, pass_.needs(), draws=setting.draws)
        kept = prune(bench, view, pass_, stats, calibration.examples)
    row = {**asdict(setting), "ratio": ratio, "kept": kept, "seconds": time.perf_counter() - start}
    row |= bench.evaluate(candidate, splits, calibration.texts)
    say(row)
    return row


def cells_of(
    scores: Sequence[Row], ratios: Sequence[float], recoveries: Mapping[str, Row]
) -> list[tuple[str, PruneHeads]]:
    return [
        (recovery, PruneHeads.model_validate({"ratio": ratio, **score, **options}))
        for ratio in ratios
        for score in scores
        for recovery, options in recoveries.items()
    ]


def say(row: Row) -> None:
    click.echo(json.dumps({**row, "kept": [len(layer) for layer in row["kept"]]}), err=True)


# -- commands ---------------------------------------------------------------------------------------------------------


@click.group()
@threads
def main(threads: int) -> None:
    """Measure head pruning; every command writes its part of OUT.json and all of OUT.md."""
    torch.set_num_threads(threads)


@main.command()
@common
@sts_files("train", "dev", "test")
@click.option("--samples", default=512, show_default=True, help="Calibration pairs.")
def scores(out: Path, model: str, samples: int, **files: str) -> None:
    """All scores x shares x recoveries."""
    bench, train = sts_bench(model, files)
    calibration = bench.calibration(sample(train, samples, seed=0))
    rows = measure_cells(bench, calibration, cells_of(SCORES, RATIOS, RECOVERIES), ("dev", "test"))
    RESULTS.save(out, "scores", {**bench.facts(), "samples": samples, "rows": rows})


@main.command()
@common
@sts_files("train", "dev", "test")
@click.option("--ratio", default=0.5, show_default=True, help="Share of heads at which the options are chosen.")
def options(out: Path, model: str, ratio: float, **files: str) -> None:
    """Calibration size, ridge, draws and steps, chosen on dev; the choice at every share."""
    bench, train = sts_bench(model, files)
    grid = [measure_setting(bench, train, setting, ratio, ("dev",)) for setting in GRID]
    choice = GRID[grid.index(best(grid))]
    chosen = [measure_setting(bench, train, choice, share, ("dev", "test")) for share in RATIOS]
    RESULTS.save(out, "options", {**bench.facts(), "grid": grid, "chosen": chosen})


@main.command()
@common
@click.option("--text", required=True, help="Documents separated by <|endoftext|>.")
@click.option("--judged", default=300, show_default=True, help="Documents to measure, from the start of the file.")
@click.option("--samples", default=128, show_default=True, help="Calibration documents, those that follow.")
def language(out: Path, model: str, text: str, judged: int, samples: int) -> None:
    """Whole kv groups of a causal language model."""
    bench, documents = language_bench(model, text, {"test": range(judged)})
    calibration = bench.calibration(documents.select(range(judged, judged + samples)))
    rows = measure_cells(bench, calibration, cells_of(LANGUAGE_SCORES, LANGUAGE_RATIOS, LANGUAGE_RECOVERIES), ("test",))
    content = {
        **bench.facts(),
        "judged": judged,
        "samples": samples,
        "shared": calibration.examples.shared_with(bench.examples["test"]),
        "rows": rows,
    }
    RESULTS.save(out, "language", content)


# -- writing ----------------------------------------------------------------------------------------------------------


def scores_text(part: Row) -> str:
    untouched, unseen = part["untouched"], {split: part["rows"][0][split]["unseen"] for split in ("dev", "test")}
    text = (
        "## Scores, shares and recoveries on STS-B\n\n"
        f"Each cell is Spearman x 100 / fidelity. The untouched model has {untouched['dev']['spearman']:.2f} on dev "
        f"and {untouched['test']['spearman']:.2f} on test. Fidelity is the mean cosine between the embeddings of the "
        "pruned and of the untouched model, over the pairs of which calibration saw neither sentence "
        f"({unseen['dev']} of dev, {unseen['test']} of test). Calibration: {part['samples']} training pairs, sampled "
        "with seed 0; ridge 1. All heads compete with each other, except where it says per layer. Random "
        f"choice is the mean over {len(RANDOM)} seeds. Kept heads are those with refit, first layer first.\n"
    )
    for ratio in RATIOS:
        rows = [row for row in part["rows"] if row["ratio"] == ratio]
        body = []
        for score, scope in dict.fromkeys((row["score"], row["scope"]) for row in rows):
            group = [row for row in rows if (row["score"], row["scope"]) == (score, scope)]
            columns = [[row for row in group if row["recovery"] == recovery] for recovery in RECOVERIES]
            cells = [both(average(column, split)) for split in ("dev", "test") for column in columns]
            kept = heads(columns[-1][0]) if len(columns[-1]) == 1 else ""
            body.append([score + (" per layer" if scope == "layer" else ""), *cells, kept])
        head = [f"{split}, {recovery}" for split in ("dev", "test") for recovery in RECOVERIES]
        chosen = best([row for row in rows if row["score"] != "random"])
        text += f"\n### {ratio:.0%} of the heads removed\n\n" + table(["score", *head, "kept heads"], body)
        text += f"\nChosen on dev: {chosen['score']} with {chosen['recovery']}, {both(chosen['test'])} on test.\n"
    return text + f"\nThe rule of choice: {rule()}.\n"


def options_text(part: Row) -> str:
    def line(row: Row) -> list[str]:
        steps = ", then ".join(f"{step * row['ratio']:.0%}" for step in row["steps"])
        draws = str(row["draws"]) if row["score"] == "gauss-newton" else ""
        return [row["score"], str(row["samples"]), f"{row['ridge']:g}", draws, steps, heads(row), both(row["dev"])]

    head = ["score", "pairs", "ridge", "draws", "removed", "kept heads", "dev"]
    chosen = [[*line(row), both(row["test"]), f"{row['seconds']:.0f} s"] for row in part["chosen"]]
    return (
        f"## Options, chosen on STS-B dev\n\nAll with refit. The rule: {rule()}.\n\n"
        + table(head, map(line, part["grid"]))
        + "\nThe chosen options at every share. In this part, test was measured for these rows only. The time is that "
        "of statistics and refit.\n\n" + table([*head, "test", "time"], chosen)
    )


def language_text(part: Row) -> str:
    rows, untouched = part["rows"], part["untouched"]["test"]
    body = []
    for ratio, score, recovery in dict.fromkeys((row["ratio"], row["score"], row["recovery"]) for row in rows):
        group = [row for row in rows if (row["ratio"], row["score"], row["recovery"]) == (ratio, score, recovery)]
        found = average(group, "test")
        kept = heads(group[0]) if len(group) == 1 else ""
        body.append([f"{ratio:.0%}", score, recovery, f"{found['nats']:.4f}", f"{found['agreement']:.4f}", kept])
    return (
        "## Whole kv groups of a Llama model on TinyStories\n\n"
        f"The untouched model has {untouched['nats']:.4f} nats per token on the first {part['judged']} documents. "
        f"Calibration: the {part['samples']} documents that follow; {part['shared']} windows occur in both. A unit is "
        "a kv head with all query heads that read it. Agreement is the share of positions whose most likely next token "
        f"is that of the untouched model. Random choice is the mean over {len(RANDOM)} seeds.\n\n"
        + table(["removed", "score", "recovery", "nats per token", "agreement", "kept kv heads"], body)
    )


def average(rows: Sequence[Row], split: str) -> Row:
    return {metric: float(np.mean([row[split][metric] for row in rows])) for metric in rows[0][split]}


def heads(row: Row) -> str:
    return " ".join(str(len(layer)) for layer in row["kept"])


RESULTS = Results(
    title="Head pruning without training",
    writers={"scores": scores_text, "options": options_text, "language": language_text},
)

if __name__ == "__main__":
    main()
