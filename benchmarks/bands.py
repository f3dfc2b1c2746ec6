"""Bands on a sentence encoder: what long texts lose where half of the heads see neighbours and global tokens only.

    python benchmarks/bands.py --out benchmarks/bands --model all-MiniLM-L6-v2 --train sts-train.csv --dev sts-dev.csv \
        --test sts-test.csv

Texts are first sentences of the STS benchmark in a row, cut at 512 tokens. Fidelity is the cosine between the
embeddings of the untouched and the edited model. ``--rows N`` stops after N rows; the next call goes on behind them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from common import Results, Row, common, sts_files, table, threads
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.calibration.data import DataSpec, load_table
from headwise.calibration.tasks import Examples, FidelityOptions, Task, make_task
from headwise.export.runners import TorchRunner
from headwise.gates.measure import Predictions, measure, predict
from headwise.gates.model_cost import model_cost
from headwise.model.attend import replaced
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.forward import to_torch
from headwise.model.layout import AttentionLayout
from headwise.passes.base import run_pass
from headwise.passes.stream_heads import StreamHeadsPass

LENGTH, SENTENCES = 512, 90
TEXTS = {"train": 6, "dev": 8, "test": 15}
SINK, RECENT = 16, 32
"""What the test rows have; to be confirmed by the rows of dev."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A model, and texts by split with the predictions of the untouched model on them."""

    checkpoint: Checkpoint
    task: Task
    examples: Mapping[str, Examples]
    reference: Mapping[str, Predictions]


def read(model: str, files: Mapping[str, str]) -> Data:
    """Sentences in a row, from all over a file; the task takes the first 512 tokens."""
    checkpoint = load_checkpoint(model)
    columns: dict[str, str | int] = {"text": 5}
    examples = {}
    options = {"outputs": ("last_hidden_state",), "max_length": LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        for split, file in files.items():
            spec = DataSpec(path=file, delimiter="\t", header=False, columns=columns)
            sentences = load_table(spec, ("text",)).columns["text"]
            starts = [number * len(sentences) // TEXTS[split] for number in range(TEXTS[split])]
            path = Path(folder) / f"{split}.csv"
            pd.DataFrame({"text": [" ".join(sentences[at : at + SENTENCES]) for at in starts]}).to_csv(
                path, index=False
            )
            long = DataSpec(path=str(path), columns={"text": "text"})
            task = make_task(FidelityOptions.model_validate({"data": long, **options}))
            examples[split] = task.encode(load_table(long, ("text",)), checkpoint)
    reference = {split: predicted(checkpoint, task, examples[split]) for split in ("dev", "test")}
    return Data(checkpoint=checkpoint, task=task, examples=examples, reference=reference)


def predicted(checkpoint: Checkpoint, task: Task, examples: Examples) -> Predictions:
    """What a model makes of texts."""
    with TorchRunner(checkpoint.module) as runner:
        return predict(runner, task, examples)


def scores(sink: int, window: int) -> int:
    """Scores of one head in a text of 512 tokens: of chunks, and of global tokens."""
    return -(-LENGTH // window) * window * (sink + 3 * window) + sink * LENGTH


def variants(layers: int, heads: int) -> list[Row]:
    """What is measured: choices on dev, then the chosen options beside others on test."""
    rows: list[Row] = []
    for sink in (1, 16):
        options = {"ratio": 0.5, "sink": sink, "recent": 32, "refit": False, "score": "random"}
        rows += [{"split": "dev", "options": options}, {"split": "dev", "options": options, "one_way": True}]
    for sink, recent, refit in ((1, 32, True), (16, 32, True), (16, 32, False)):
        rows.append({"split": "dev", "options": {"ratio": 0.5, "sink": sink, "recent": recent, "refit": refit}})
    same = {"sink": SINK, "recent": RECENT}
    rows.append({"split": "test", "options": {"ratio": 0.5, **same}})
    rows += [{"split": "test", "options": {"ratio": 0.5, **same, "score": "random", "seed": seed}} for seed in (0, 1)]
    budget = (LENGTH**2 + scores(SINK, RECENT)) // 2
    wide = max(window for window in range(1, LENGTH // 3) if scores(SINK, window) <= budget)
    every = [list(range(heads))] * layers
    rows.append({"split": "test", "options": {"heads": every, "sink": SINK, "recent": wide}})
    return rows


def measured(data: Data, row: Row) -> Row:
    """A row with its fidelity and its work."""
    checkpoint = data.checkpoint.copy()
    view = checkpoint.view()
    pass_ = StreamHeadsPass.model_validate(row["options"])
    run_pass(pass_, view, data.checkpoint.copy().view(), data.task, data.examples["train"], batch_size=2)
    split = row["split"]
    with ExitStack() as stack:
        for layer in (layer for layer in view.attention if row.get("one_way") and layer.layout.streaming):
            stack.enter_context(replaced(layer.caller, partial(one_way, layer.layout)))
        found = predicted(checkpoint, data.task, data.examples[split])
    (fidelity,) = measure(data.task, data.examples[split], data.reference[split], found)
    return {**row, "fidelity": float(fidelity.candidate.mean()), "macs": macs(data, checkpoint)}


def one_way(
    layout: AttentionLayout,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Attention in which all see the first tokens, and these see their band only, by a mask; texts have no padding."""
    column = torch.arange(query.shape[2])
    distance, first = (column[:, None] - column).abs(), column < layout.sink
    shown = torch.stack([(distance < (window or len(column))) | first for window in layout.windows])[None]
    mixed: torch.Tensor = sdpa_attention_forward(module, query, key, value, shown, **options)[0]
    return mixed


def macs(data: Data, checkpoint: Checkpoint) -> int:
    """Multiply-accumulates of one text of 512 tokens."""
    batch = next(iter(data.examples["dev"].batches(1)))
    return model_cost(checkpoint.view(), to_torch(batch.inputs)).macs


@click.command()
@common
@sts_files("train", "dev", "test")
@click.option("--rows", "limit", type=int, help="Stop after so many new rows.")
@threads
def main(out: Path, model: str, train: str, dev: str, test: str, limit: int | None, threads: int) -> None:
    """Measure every row that is not measured yet."""
    torch.set_num_threads(threads)
    data = read(model, {"train": train, "dev": dev, "test": test})
    facts = {"checkpoint": data.checkpoint.digest, "texts": TEXTS, "untouched": macs(data, data.checkpoint)}
    results = Results(title="Bands in an encoder", writers={"sentences": markdown})
    rows = results.rows(out, "sentences", facts)
    layout = data.checkpoint.view().layout.attention
    for done, row in enumerate(variants(len(layout), len(layout[0].kv))[len(rows) :]):
        if done == limit:
            break
        rows.append(measured(data, row))
        results.save(out, "sentences", {**facts, "rows": rows})


def markdown(part: Row) -> str:
    """The tables."""
    counts = part["texts"]
    text = (
        f"A sentence encoder, texts of {LENGTH} tokens: sentences in a row. Fidelity is the cosine between the "
        f"embeddings of the untouched and the edited model. Calibration: {counts['train']} texts of the training file; "
        f"dev: {counts['dev']}; test: {counts['test']}. MACs: of one text; untouched "
        f"{part['untouched'] / 1e9:.2f} G.\n"
    )
    for split in ("dev", "test"):
        rows = [_line(row) for row in part["rows"] if row["split"] == split]
        if rows:
            head = ("heads with bands", "sink + recent", "which", "refit", "fidelity", "GMACs")
            text += f"\n## {split}\n\n" + table(head, rows)
    return text


def _line(row: Row) -> tuple[str, ...]:
    options = row["options"]
    share = f"{options['ratio']:.0%}" if "ratio" in options else "all"
    ranked = f"random, seed {options.get('seed', 0)}" if options.get("score") == "random" else "statistic"
    which = ranked if "ratio" in options else ""
    refit = "yes" if options.get("refit", True) else "no"
    which += ", first tokens see a band too" if row.get("one_way") else ""
    tokens = f"{options['sink']} + {options['recent']}"
    return (share, tokens, which, refit, f"{row['fidelity']:.4f}", f"{row['macs'] / 1e9:.2f}")


if __name__ == "__main__":
    main()
