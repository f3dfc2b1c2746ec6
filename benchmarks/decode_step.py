"""What one more token costs on ONNX Runtime, by the length of the context and by what the layers cache.

    python benchmarks/decode_step.py --out benchmarks/decode_step --work DIR

Makes Llama-shaped models with random weights, exports each with its cache, and times calls of one token behind 512,
2048 and 8192 cached tokens, all variants in turn within every round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
import torch
import transformers

from headwise.device.session import open_session, ports
from headwise.export.decoder import decoder_to_onnx
from headwise.export.ports import IDS, MASK, POSITIONS
from headwise.gates.cost import device_name
from headwise.model import surgery
from headwise.model.cache import is_past
from headwise.model.edits import ShareKV
from headwise.model.latent_form import Form, latent_form
from headwise.model.layout import AttentionLayout
from headwise.model.view import ModelView

HEADS, HEAD_DIM, WIDTH, LAYERS, HIDDEN, WORDS = 16, 64, 1024, 4, 2816, 4096
CONTEXTS = (512, 2048, 8192)
LATENT, ROTARY = 192, 64
Edit = Callable[[AttentionLayout], AttentionLayout]


def grouped(kv_heads: int) -> Edit:
    """A layer whose query heads share so many kv heads."""
    size = HEADS // kv_heads
    groups = tuple(tuple(range(start, start + size)) for start in range(0, HEADS, size))
    return ShareKV(layer=0, groups=groups).apply


def latent(layout: AttentionLayout) -> AttentionLayout:
    """A layer that caches a latent and one rotary key for all heads: as many numbers as two kv heads."""
    return replace(layout, latent=LATENT, rotary=ROTARY, unrotated=HEAD_DIM)


VARIANTS: dict[str, tuple[Edit | None, Form]] = {
    "dense": (None, "auto"),
    "GQA, 4 kv heads": (grouped(4), "auto"),
    "GQA, 2 kv heads": (grouped(2), "auto"),
    "MQA, 1 kv head": (grouped(1), "auto"),
    "MLA, latent 192 and rotary 64, absorbed": (latent, "absorbed"),
    "MLA, the same, not absorbed": (latent, "unabsorbed"),
}
"""What becomes of a layer of 16 kv heads, and how latents are computed with."""


def make(edit: Edit | None, form: Form, path: Path) -> ModelView:
    """Export a model with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=HIDDEN,
        vocab_size=WORDS,
        max_position_embeddings=2 * CONTEXTS[-1],
    )
    torch.manual_seed(0)
    view = ModelView.of(transformers.LlamaForCausalLM(config).eval().requires_grad_(False))
    if edit is not None:
        layout = view.layout
        surgery.reshape(view, replace(layout, attention=tuple(map(edit, layout.attention))))
        for parameter in view.module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    with latent_form(form):
        decoder_to_onnx(view, np.array([[5, 9, 7], [3, 8, 6]]), path)
    return view


def step(session: ort.InferenceSession, context: int, generator: np.random.Generator) -> Any:
    """A call that reads one token behind ``context`` cached ones."""
    feed = {
        IDS: np.array([[7]], np.int64),
        MASK: np.ones((1, context + 1), np.int64),
        POSITIONS: np.array([[context]], np.int64),
    }
    for name, (dtype, dims) in ports(session.get_inputs()).items():
        if is_past(name):
            feed[name] = generator.standard_normal((1, dims[1], context, dims[3]), np.float32).astype(dtype)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
    outputs = [item.name for item in session.get_outputs()]
    return lambda: session.run_with_ort_values(outputs, values)


def timed(calls: dict[str, Any], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every call, one call of each variant per round."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results, without the suffix.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the graphs.")
@click.option("--rounds", default=40, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(out: Path, work: Path, rounds: int, threads: int) -> None:
    """Time one step of every variant at every context."""
    work.mkdir(parents=True, exist_ok=True)
    sessions, cached = {}, {}
    for index, (name, (edit, form)) in enumerate(VARIANTS.items()):
        path = work / f"variant{index}.onnx"
        cached[name] = make(edit, form, path).layout.cache.numbers
        sessions[name] = open_session(path, threads=threads)
    rows = []
    for context in CONTEXTS:
        generator = np.random.default_rng(0)
        times = timed({name: step(session, context, generator) for name, session in sessions.items()}, rounds)
        dense = np.array(times["dense"])
        for name, found in times.items():
            ratios = dense / np.array(found)
            rows.append(
                {
                    "context": context,
                    "variant": name,
                    "cache_mib": cached[name] * context * 4 / 2**20,
                    "median_ms": float(np.median(found)),
                    "p10_ms": float(np.percentile(found, 10)),
                    "dense_over_this": float(np.median(dense) / np.median(found)),
                    "ratio_quartiles": [float(np.percentile(ratios, q)) for q in (25, 75)],
                }
            )
    result = {
        "command": f"python benchmarks/decode_step.py --out OUT --work DIR --rounds {rounds} --threads {threads}",
        "device": device_name(),
        "threads": threads,
        "rounds": rounds,
        "versions": {package: version(package) for package in ("onnxruntime", "torch", "transformers")},
        "model": f"Llama, {LAYERS} layers, width {WIDTH}, {HEADS} query heads of {HEAD_DIM}, MLP {HIDDEN}, fp32",
        "rows": rows,
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    about = (
        f"{result['model']}, batch 1, random weights. {result['device']}, {result['threads']} thread(s), ONNX Runtime "
        f"{result['versions']['onnxruntime']}; median of {result['rounds']} rounds, all variants in turn in each, on a "
        "machine that other processes kept busy too: ratios say more than milliseconds."
    )
    lines = [
        "# One more token on ONNX Runtime",
        "",
        about,
        "",
        f"`{result['command']}`",
        "",
        "| context | variant | cache MiB | ms per token | fastest tenth | dense / this | quartiles of the ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['context']} | {row['variant']} | {row['cache_mib']:.1f} | {row['median_ms']:.2f} "
            f"| {row['p10_ms']:.2f} | {row['dense_over_this']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
