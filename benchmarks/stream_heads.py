"""Streaming heads on a small language model: nats per token far into a text, and the bytes that its cache holds.

    python benchmarks/stream_heads.py --out benchmarks/stream_heads --model stories260k --text tinystories_sample.txt

Texts are stories in a row, cut into windows of 512 tokens. Losses are those of the second half of every window, where
tokens have been dropped. ``--rows N`` stops after N rows; the next call goes on behind them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Row, common, table, threads

from headwise.calibration.tasks import Examples, LanguageOptions, Task, make_task
from headwise.export.decoder import decoder_to_onnx
from headwise.export.generate import generate
from headwise.export.stepping import OrtDecoder
from headwise.model import surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.decoder import positions
from headwise.model.edits import EditPlan, StreamHeads
from headwise.model.view import ModelView
from headwise.passes.base import run_pass
from headwise.passes.stream_heads import StreamHeadsPass

LENGTH = 512
CALIBRATION, DEV, TEST = range(12), range(16, 32), range(36, 68)
SETTINGS = ((0.5, 4, 60), (0.75, 4, 12))
"""Ratio, first and last tokens."""
SEEDS, STEPS = range(2), 60
NEW = 200
"""Tokens that are written by torch and by ONNX Runtime, behind prompts of 256."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A model, and windows of text by split."""

    checkpoint: Checkpoint
    task: Task
    windows: Sequence[Sequence[int]]

    def loss(self, view: ModelView, split: Sequence[int]) -> float:
        """Mean nats per token of the second half of the windows."""
        found = []
        for start in range(0, len(split), 10):
            ids = torch.tensor([self.windows[number] for number in split[start : start + 10]])
            with torch.inference_mode():
                logits: Any = view.module(ids).logits
            half = LENGTH // 2
            scores, targets = logits[:, half - 1 : -1].flatten(0, 1), ids[:, half:].flatten()
            found.append(float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum")))
        return sum(found) / (len(split) * LENGTH // 2)

    def examples(self, split: Sequence[int]) -> Examples:
        """Windows as calibration samples."""
        rows = [np.asarray(self.windows[number], np.int64) for number in split]
        inputs = [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows]
        return Examples.of(inputs, source="stories", padding={"input_ids": 0.0, "attention_mask": 0.0})


def read(model: str, text: str) -> Data:
    """Stories in a row, every one with the tokens that the tokenizer puts around it."""
    checkpoint, task = load_checkpoint(model), make_task(LanguageOptions.model_validate(_task(text)))
    stories = [story.strip() for story in Path(text).read_text(encoding="utf-8").split("<|endoftext|>")]
    tokenizer, ids = checkpoint.tokenizer(), list[int]()
    for story in filter(None, stories):
        if len(ids) >= TEST.stop * LENGTH:
            break
        ids += tokenizer(story)["input_ids"]
    windows = [ids[start : start + LENGTH] for start in range(0, TEST.stop * LENGTH, LENGTH)]
    return Data(checkpoint=checkpoint, task=task, windows=windows)


def _task(text: str) -> Row:
    return {"type": "language-modeling", "data": {"path": text, "format": "text"}}


def variants() -> list[Row]:
    """What is measured: choices on dev, then the chosen options beside others on test."""
    ratio, sink, recent = SETTINGS[0]
    same = {"ratio": ratio, "sink": sink, "recent": recent}
    rows: list[Row] = [{"variant": "untouched", "split": "dev"}]
    for score in ("statistic", "gates"):
        for refit in (False, True):
            options = {**same, "score": score, "refit": refit, "steps": STEPS}
            rows.append({"variant": "stream", "split": "dev", "options": options})
    rows.append({"variant": "untouched", "split": "test"})
    for ratio, sink, recent in SETTINGS:
        same = {"ratio": ratio, "sink": sink, "recent": recent}
        scores: list[Row] = [{"score": "statistic"}, *({"score": "random", "seed": seed} for seed in SEEDS)]
        rows += [{"variant": "stream", "split": "test", "options": {**same, **score}} for score in scores]
        held = round((1 - ratio) * LENGTH + ratio * (sink + recent))
        rows += [
            {"variant": "all heads", "split": "test", "sink": first, "recent": held - first} for first in (0, sink)
        ]
    return rows


def several_windows() -> list[Row]:
    """One head that sees all, and a short and a long window for the others, with as many bytes as a setting above."""
    same = {"ratio": 0.95, "sink": 4, "recent": [28, 204]}
    scores: list[Row] = [{"score": "statistic"}, {"score": "random", "seed": 0}]
    return [{"variant": "stream", "split": "test", "options": {**same, **score}} for score in scores]


def measured(data: Data, row: Row) -> Row:
    """A row with its loss, and what its cache holds."""
    checkpoint = data.checkpoint.copy()
    view = checkpoint.view()
    found = dict(row)
    if row["variant"] == "stream":
        pass_ = StreamHeadsPass.model_validate(row["options"])
        record = run_pass(
            pass_, view, data.checkpoint.copy().view(), data.task, data.examples(CALIBRATION), batch_size=2
        )
        edits = [edit for edit in record.plan.edits if isinstance(edit, StreamHeads)]
        found["heads"] = {edit.layer: sorted(edit.windows) for edit in edits}
    elif row["variant"] == "all heads":
        every = [dict.fromkeys(layer.layout.kv, row["recent"]) for layer in view.attention]
        edits = [StreamHeads(layer=index, windows=windows, sink=row["sink"]) for index, windows in enumerate(every)]
        surgery.apply(view, EditPlan(edits=tuple(edits)))
    found["nats"] = data.loss(view, DEV if row["split"] == "dev" else TEST)
    cache = view.layout.cache
    found["cache_bytes"] = 4 * (cache.numbers * LENGTH + cache.bounded)
    return found


def written(data: Data) -> Row:
    """The chosen options in a graph: what its cache holds in truth, and whether it writes what torch writes."""
    ratio, sink, recent = SETTINGS[0]
    view = data.checkpoint.copy().view()
    pass_ = StreamHeadsPass(ratio=ratio, sink=sink, recent=recent)
    run_pass(pass_, view, data.checkpoint.copy().view(), data.task, data.examples(CALIBRATION), batch_size=4)
    prompts = [list(data.windows[number][: LENGTH // 2 - 7 * number % 50]) for number in range(TEST[0], TEST[0] + 4)]
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for number, prompt in enumerate(prompts):
        ids[number, width - len(prompt) :], mask[number, width - len(prompt) :] = prompt, 1
    module: Any = view.module
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": False}
    torch_ids = module.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=NEW, **options)[
        :, width:
    ].tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        info = decoder_to_onnx(view, ids[:2, -16:], path)
        with OrtDecoder(path, threads=1) as graph:
            texts = [text.tokens for text in generate(graph, prompts, new_tokens=NEW, batch=len(prompts))]
            graph.begin(1)
            window = np.array([data.windows[TEST[0]]], np.int64)
            seen = np.ones_like(window)
            graph(window, seen, positions(seen, LENGTH))
            held = sum(array.nbytes for array in graph.cached().values())
    return {
        "variant": "graph",
        "parity": max(found.max_abs for found in info.parity),
        "texts": len(prompts),
        "equal": sum(one == other for one, other in zip(texts, torch_ids, strict=True)),
        "cache_bytes": held,
    }


@click.command()
@common
@click.option("--text", required=True, help="Stories separated by <|endoftext|>.")
@click.option("--rows", "limit", type=int, help="Stop after so many new rows.")
@threads
def main(out: Path, model: str, text: str, limit: int | None, threads: int) -> None:
    """Measure every row that is not measured yet."""
    torch.set_num_threads(threads)
    data = read(model, text)
    facts = {"checkpoint": data.checkpoint.digest, "windows": len(data.windows)}
    results = Results(title="Heads that stream", writers={"stories": markdown})
    rows = results.rows(out, "stories", facts)
    for done, row in enumerate([*variants(), {"variant": "graph"}, *several_windows()][len(rows) :]):
        if done == limit:
            break
        rows.append(written(data) if row["variant"] == "graph" else measured(data, row))
        results.save(out, "stories", {**facts, "rows": rows})


def markdown(part: Row) -> str:
    """The tables."""
    rows = part["rows"]
    ids = {
        name: [row for row in rows if row.get("split") == name or (name == "graph" and row["variant"] == name)]
        for name in ("dev", "test", "graph")
    }
    text = (
        f"stories260k, 5 layers of 4 kv heads, {LENGTH} tokens, stories in a row. Nats per token of the second half of "
        f"each window. Calibration: {len(CALIBRATION)} windows; dev: {len(DEV)}; test: {len(TEST)}; no two overlap. "
        "Cache: float32, behind 512 tokens.\n\n## Choice of options, on dev\n\n"
        + table(("ratio", "sink + recent", "score", "refit", "nats"), [_choice(row) for row in ids["dev"]])
    )
    if ids["test"]:
        text += "\n## The default options beside others, on test\n\n" + table(
            ("heads", "sink + recent", "which heads", "nats", "cache KiB"), [_test(row) for row in ids["test"]]
        )
    for row in ids["graph"]:
        text += (
            f"\n## The graph\n\nDefault options, ratio {SETTINGS[0][0]}, {SETTINGS[0][1]} + {SETTINGS[0][2]} tokens: "
            f"{row['equal']} of {row['texts']} texts of {NEW} tokens behind prompts of about {LENGTH // 2}, in one "
            f"batch padded on the left, are those of torch without a cache. Behind {LENGTH} tokens the graph's cache "
            f"holds {row['cache_bytes'] / 1024:.1f} KiB. Largest difference from torch: {row['parity']:.1e}.\n"
        )
    return text


def _choice(row: Row) -> tuple[str, ...]:
    options = row.get("options")
    if options is None:
        return ("untouched", "", "", "", f"{row['nats']:.4f}")
    tokens = f"{options['sink']} + {options['recent']}"
    refit = "yes" if options["refit"] else "no"
    return (f"{options['ratio']:.0%}", tokens, options["score"], refit, f"{row['nats']:.4f}")


def _test(row: Row) -> tuple[str, ...]:
    numbers = (f"{row['nats']:.4f}", f"{row['cache_bytes'] / 1024:.1f}")
    if row["variant"] == "untouched":
        return ("untouched", "", "", *numbers)
    if row["variant"] == "all heads":
        return ("all have one window", f"{row['sink']} + {row['recent']}", "", *numbers)
    options = row["options"]
    which = f"random, seed {options['seed']}" if options["score"] == "random" else options["score"]
    recent = options["recent"]
    tokens = " or ".join(f"{options['sink']} + {one}" for one in ([recent] if isinstance(recent, int) else recent))
    return (f"{options['ratio']:.0%} stream", tokens, which, *numbers)


if __name__ == "__main__":
    main()
