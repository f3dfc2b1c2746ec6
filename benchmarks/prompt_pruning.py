"""The part of token_pruning.py that measures prompts: nats per token of what follows them, and bytes of the cache.

Texts and splits are those of stream_heads.py: windows of 512 tokens, whose first half is the prompt.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, table
from stream_heads import CALIBRATION, DEV, LENGTH, TEST, Data

from headwise.export.decoder import DECODE, decoder_to_onnx
from headwise.export.generate import generate
from headwise.export.stepping import OrtDecoder, TorchDecoder
from headwise.model import surgery
from headwise.model.decoder import positions
from headwise.model.edits import EditPlan, StreamHeads
from headwise.model.prompt_tokens import single_tokens
from headwise.model.view import ModelView
from headwise.passes.base import run_pass
from headwise.passes.prune_tokens import PruneTokens

PROMPT = LENGTH // 2
KEEPS = (0.5, 0.25, 0.125)
SINK = 4
NEW = 100
"""Tokens that torch and ONNX Runtime write behind prompts."""
CHOICES: tuple[Row, ...] = (
    {},
    {"queries": 1},
    {"queries": 4},
    {"queries": 64},
    {"weighted": False},
    {"last": 0},
    {"per": "layer"},
    {"score": "received"},
    {"score": "accumulated"},
    {"score": "random"},
)


def prompt_variants() -> list[Row]:
    """What is measured: choices on dev, then the default options beside others on test, then the graph."""
    rows: list[Row] = [{"variant": "untouched", "split": "dev"}]
    for keep in (0.5, 0.125):
        rows += [{"variant": "prune", "split": "dev", "options": {"keep": keep, **choice}} for choice in CHOICES]
    rows.append({"variant": "untouched", "split": "test"})
    for keep in KEEPS:
        choices: list[Row] = [{}, {"score": "received"}, {"score": "accumulated"}, {"score": "random"}]
        rows += [{"variant": "prune", "split": "test", "options": {"keep": keep, **choice}} for choice in choices]
        rows += [{"variant": "last", "split": "test", "keep": keep, "sink": sink} for sink in (0, SINK)]
        rows.append({"variant": "window", "split": "test", "keep": keep, "sink": SINK})
    rows.append({"variant": "prune", "split": "test", "options": {"budget": 0.5}})
    return [*rows, {"variant": "graph", "options": {"keep": 0.5}}]


def measured(data: Data, row: Row) -> Row:
    """A row with its loss, and what its cache holds behind the prompt and behind the whole window."""
    if row["variant"] == "graph":
        return {**row, **_written(data, row["options"])}
    view = data.checkpoint.copy().view()
    found, split = dict(row), DEV if row["split"] == "dev" else TEST
    if row["variant"] == "last":
        found["nats"] = _loss_of_last(data, split, round(row["keep"] * PROMPT), row["sink"])
    else:
        if row["variant"] == "prune":
            _prune(data, view, row["options"])
        elif row["variant"] == "window":
            # As many tokens as the pruned cache holds at the end of the text.
            recent = round(row["keep"] * PROMPT) + LENGTH - PROMPT - row["sink"]
            windows = [dict.fromkeys(layer.layout.kv, recent) for layer in view.attention]
            edits = [StreamHeads(layer=i, windows=one, sink=row["sink"]) for i, one in enumerate(windows)]
            surgery.apply(view, EditPlan(edits=tuple(edits)))
        found["nats"] = data.loss(view, split)
    cache, token = view.layout.cache, data.checkpoint.copy().view().layout.cache.numbers
    if row["variant"] == "last":
        found["cache_bytes"] = 4 * token * (round(row["keep"] * PROMPT) + LENGTH - PROMPT)
    else:
        held = cache.prompt_numbers * PROMPT + cache.numbers * (LENGTH - PROMPT) + cache.bounded
        found["cache_bytes"] = round(4 * held)
    return found


def _prune(data: Data, view: ModelView, options: Row) -> None:
    calibration = data.examples(CALIBRATION if "budget" in options else CALIBRATION[:1])
    pass_ = PruneTokens.model_validate(options)
    run_pass(pass_, view, data.checkpoint.copy().view(), data.task, calibration, batch_size=2)


def _loss_of_last(data: Data, split: range, kept: int, sink: int) -> float:
    """Nats where every head keeps the last tokens of the prompt, and the first ones: as many bytes at every token."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    left = (key >= PROMPT - kept + sink) | (key < sink)
    mask = ((key <= query) & ((query < PROMPT) | left))[None, None]
    module: Any = data.checkpoint.copy().module
    total = 0.0
    for start in range(0, len(split), 10):
        ids = torch.tensor([data.windows[number] for number in split[start : start + 10]])
        with torch.inference_mode():
            logits = module(ids, attention_mask=mask.expand(len(ids), -1, -1, -1)).logits
        scores, targets = logits[:, PROMPT - 1 : -1].flatten(0, 1), ids[:, PROMPT:].flatten()
        total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
    return total / (len(split) * (LENGTH - PROMPT))


def _written(data: Data, options: Row) -> Row:
    """Graphs: whether they write what torch writes, in a batch padded on the left, and what their cache holds."""
    view = data.checkpoint.copy().view()
    _prune(data, view, options)
    prompts = [list(data.windows[number][: PROMPT - 7 * number % 50]) for number in range(TEST[0], TEST[0] + 4)]
    expected = [text.tokens for text in generate(TorchDecoder(view), prompts, new_tokens=NEW, batch=len(prompts))]
    alone = [generate(TorchDecoder(view), [prompt], new_tokens=NEW)[0].tokens for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ids = np.array([data.windows[0][:16]] * 2, np.int64)
        info = decoder_to_onnx(view, ids, path)
        with single_tokens():
            decoder_to_onnx(view, ids, path.with_name(DECODE))
        with OrtDecoder(path, decode=path.with_name(DECODE), threads=1) as graph:
            texts = [text.tokens for text in generate(graph, prompts, new_tokens=NEW, batch=len(prompts))]
            graph.begin(1)
            window = np.array([data.windows[TEST[0]][:PROMPT]], np.int64)
            seen = np.ones_like(window)
            graph(window, seen, positions(seen, PROMPT))
            held = sum(array.nbytes for array in graph.cached().values())
    return {
        "parity": max(found.max_abs for found in info.parity),
        "texts": len(prompts),
        "equal": sum(one == other for one, other in zip(texts, expected, strict=True)),
        "alone": sum(one == other for one, other in zip(texts, alone, strict=True)),
        "cache_bytes": held,
        "full_bytes": 4 * data.checkpoint.copy().view().layout.cache.numbers * PROMPT,
    }


def markdown(part: Row) -> str:
    """The tables."""
    rows = part["rows"]
    splits = {name: [row for row in rows if row.get("split") == name] for name in ("dev", "test")}
    text = (
        f"## A language model: stories260k behind pruned prompts\n\nWindows of {LENGTH} tokens, stories in a row; the "
        f"first {PROMPT} are the prompt. Nats per token of the other half. dev: {len(DEV)} windows; test: {len(TEST)}; "
        "no two overlap. Cache: float32, at the end of the window.\n\n### Choices, on dev\n\n"
        + table(("kept", "options", "nats"), [_choice(row) for row in splits["dev"]])
    )
    if splits["test"]:
        text += "\n### The default options beside others, on test\n\n" + table(
            ("kept of the prompt", "which tokens", "nats", "cache KiB"), [_test(row) for row in splits["test"]]
        )
    for row in rows:
        if row["variant"] == "graph":
            text += (
                f"\n### The graphs\n\nkeep {row['options']['keep']}: {row['equal']} of {row['texts']} texts of {NEW} "
                f"tokens behind prompts of about {PROMPT}, in one batch padded on the left, are those of torch; "
                f"{row['alone']} are those that torch writes for the prompt alone. Behind {PROMPT} tokens the cache "
                f"holds {row['cache_bytes'] / 1024:.1f} KiB, in the untouched model {row['full_bytes'] / 1024:.1f}. "
                f"Largest difference from torch: {row['parity']:.1e}.\n"
            )
    return text


def _choice(row: Row) -> tuple[str, ...]:
    options = {name: value for name, value in row.get("options", {}).items() if name != "keep"}
    kept = f"{row['options']['keep']:.1%}" if "options" in row else "untouched"
    return (kept, ", ".join(f"{name}: {value}" for name, value in options.items()) or "", f"{row['nats']:.4f}")


def _test(row: Row) -> tuple[str, ...]:
    numbers = (f"{row['nats']:.4f}", f"{row['cache_bytes'] / 1024:.1f}")
    if row["variant"] == "untouched":
        return ("100 %", "", *numbers)
    if row["variant"] == "prune":
        options = row["options"]
        kept = f"{options['keep']:.1%}" if "keep" in options else f"budget: {options['budget']}"
        return (kept, f"prune-tokens, {options.get('score', 'default')}", *numbers)
    first = f"the first {row['sink']} and " if row["sink"] else ""
    which = "the last of the prompt" if row["variant"] == "last" else "the last of all tokens: a sliding window"
    return (f"{row['keep']:.1%}", first + which, *numbers)
