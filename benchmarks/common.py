"""What the benchmarks share: a checkpoint with its task and samples, the options of a command, and result files."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from headwise.calibration.data import DataSpec, Table, load_table
from headwise.calibration.tasks import Examples, LanguageOptions, SimilarityOptions, Task, make_task
from headwise.export.runners import TorchRunner
from headwise.gates.cost import device_name
from headwise.gates.measure import Predictions, measure, predict
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.pipeline.store import installed_version

Row = dict[str, Any]

TIE = 0.3
"""Points of Spearman on STS-B dev that count as a tie; among ties fidelity decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Calibration samples, and every text in them."""

    examples: Examples
    texts: Set[str]


@dataclass(kw_only=True)
class Bench:
    """A checkpoint, its task, and the samples of every split with the untouched model's predictions on them.

    Attributes:
        texts: split -> the texts of every sample.
    """

    checkpoint: Checkpoint
    task: Task
    examples: Mapping[str, Examples]
    texts: Mapping[str, Sequence[tuple[str, ...]]]
    reference: dict[str, Predictions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = {split: self.predict(self.checkpoint, split) for split in self.examples}

    def calibration(self, table: Table) -> Calibration:
        texts = {text for column in table.columns.values() for text in column if isinstance(text, str)}
        return Calibration(examples=self.task.encode(table, self.checkpoint), texts=texts)

    def predict(self, checkpoint: Checkpoint, split: str) -> Predictions:
        with TorchRunner(checkpoint.module) as runner:
            return predict(runner, self.task, self.examples[split])

    def evaluate(self, checkpoint: Checkpoint, splits: Iterable[str], seen: Set[str]) -> Row:
        """Per split: the task's metric on all samples, closeness to the untouched model on those without seen texts."""
        row: Row = {}
        for split in splits:
            fresh = np.array([seen.isdisjoint(texts) for texts in self.texts[split]])
            found = measure(self.task, self.examples[split], self.reference[split], self.predict(checkpoint, split))
            row[split] = {found[0].metric: found[0].values()[1], "unseen": int(fresh.sum())}
            row[split] |= {m.metric: float(m.candidate[fresh].mean()) for m in found[1:]}
        return row

    def facts(self) -> Row:
        """What was measured on, and the untouched model there."""
        return {
            "checkpoint": self.checkpoint.digest,
            "data": {name: {"samples": len(e), "digest": e.digest} for name, e in self.examples.items()},
            "untouched": self.evaluate(self.checkpoint, self.examples, set()),
        }


def sts_bench(model: str, files: Mapping[str, str]) -> tuple[Bench, Table]:
    """The bench on splits of the STS benchmark, and the training table, which is one of the files."""
    columns: dict[str, str | int] = {"first": 5, "second": 6, "score": 4}
    specs = {name: DataSpec(path=path, delimiter="\t", header=False, columns=columns) for name, path in files.items()}
    checkpoint = load_checkpoint(model)
    task = make_task(SimilarityOptions(type="sentence-similarity", data=specs["train"]))
    tables = {name: load_table(spec, task.roles()) for name, spec in specs.items()}
    train = tables.pop("train")
    texts = {name: list(zip(t.columns["first"], t.columns["second"], strict=True)) for name, t in tables.items()}
    examples = {name: task.encode(table, checkpoint) for name, table in tables.items()}
    return Bench(checkpoint=checkpoint, task=task, examples=examples, texts=texts), train


def language_bench(model: str, text: str, documents: Mapping[str, range]) -> tuple[Bench, Table]:
    """The bench on these documents of a file that separates them by ``<|endoftext|>``, and all its documents."""
    spec = DataSpec(path=text, format="text", separator="<|endoftext|>")
    checkpoint, task = load_checkpoint(model), make_task(LanguageOptions(type="language-modeling", data=spec))
    table = load_table(spec, task.roles())
    examples = {split: task.encode(table.select(chosen), checkpoint) for split, chosen in documents.items()}
    # A window is not the text that it was cut from: windows that occur in two sets are to be counted instead.
    texts = {split: [()] * len(found) for split, found in examples.items()}
    return Bench(checkpoint=checkpoint, task=task, examples=examples, texts=texts), table


def best(rows: Sequence[Row]) -> Row:
    """The row to recommend, by dev alone: the highest fidelity among those within TIE of the highest Spearman."""
    top = max(row["dev"]["spearman"] for row in rows)
    return max((row for row in rows if row["dev"]["spearman"] >= top - TIE), key=lambda row: row["dev"]["fidelity"])


def rule() -> str:
    return f"within {TIE} points of the highest dev Spearman, the highest dev fidelity"


# -- commands ---------------------------------------------------------------------------------------------------------


def threads(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--threads", default=1, show_default=True, help="CPU threads for torch.")(command)


def common(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--model", required=True, help="Checkpoint.")(command)
    return click.option("--out", type=click.Path(path_type=Path), required=True, help="Results, no suffix.")(command)


def sts_files(*splits: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option per split, in this order."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for split in reversed(splits):
            command = click.option(f"--{split}", required=True, help=f"sts-{split}.csv as distributed.")(command)
        return command

    return add


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A result file.

    Attributes:
        title: heading of the Markdown file.
        writers: part -> what writes it as Markdown, in the order of the file.
    """

    title: str
    writers: Mapping[str, Callable[[Row], str]]

    def rows(self, out: Path, part: str, content: Row) -> list[Row]:
        """The rows of a run that was cut short, if all else was the same.

        Whether the code was, the file does not say: they are only used on demand.
        """
        path = out.with_suffix(".json")
        found = json.loads(path.read_text()).get(part, {}) if path.exists() else {}
        same = all(found.get(key) == value for key, value in content.items())
        rows: list[Row] = found["rows"] if found and same else []
        return rows

    def save(self, out: Path, part: str, content: Row) -> None:
        """Put one part into OUT.json, with how to repeat it, and write OUT.md from all parts."""
        path = out.with_suffix(".json")
        parts = json.loads(path.read_text()) if path.exists() else {}
        packages = ("headwise", "torch", "transformers", "numpy", "scipy")
        parts[part] = {
            "command": shlex.join(["python", *sys.argv]),
            "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in packages}},
            "device": device_name(),
            "threads": torch.get_num_threads(),
            **content,
        }
        path.write_text(json.dumps(parts, indent=1) + "\n")
        texts = [write(parts[name]) + origin(parts[name]) for name, write in self.writers.items() if name in parts]
        out.with_suffix(".md").write_text(f"# {self.title}\n\n" + "\n".join(texts))


def both(found: Row) -> str:
    return f"{found['spearman']:.2f} / {found['fidelity']:.4f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def origin(part: Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
    return f"\nMeasured on {part['device']}, {part['threads']} thread(s), with {versions}:\n\n    {part['command']}\n"
