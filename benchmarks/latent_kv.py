"""Latent keys and values and layers that share them, measured without training: STS-B, and a small language model.

Two commands, each of which writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/latent_kv.py sts      --out OUT --model DIR --train FILE --test FILE
    python benchmarks/latent_kv.py language --out OUT --model DIR --text FILE
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from head_pruning import Bench, Calibration, Row, common, origin, sts_bench, table
from pydantic import PrivateAttr
from torch import nn

from headwise.calibration.data import DataSpec, load_table, sample
from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.tasks import LanguageOptions, make_task
from headwise.gates.cost import device_name
from headwise.model.access import hooked
from headwise.model.checkpoint import load_checkpoint
from headwise.model.edits import EditPlan
from headwise.model.latent import LatentKeys
from headwise.model.surgery import Payloads
from headwise.model.view import ModelView
from headwise.passes.base import Pass, run_pass
from headwise.passes.latent_kv import LatentKVPass
from headwise.passes.share_kv import ShareKVHeads
from headwise.passes.share_layers import ShareLayersPass

WEIGHTS = {"method": "weights", "weighted": False, "balanced": False, "refit": False}
LATENT: tuple[Row, ...] = (
    {"rank": 384, "refit": False},
    {"rank": 128, **WEIGHTS},
    *({"rank": rank, "refit": False} for rank in (256, 192, 128, 96, 64)),
    {"budget": 128 / 768, "refit": False},
)
SHARED: tuple[Row, ...] = (
    {"how": "reuse", "refit": False},
    {"refit": False},
    *({"rank": rank, "refit": False} for rank in (256, 128)),
)
REFITTED: tuple[tuple[str, Row], ...] = (
    ("latent-kv", {"rank": 128}),
    ("share-layers", {"rank": 128}),
    ("latent-kv", {"rank": 64}),
    ("share-layers", {"rank": 64}),
    ("share-layers", {}),
    ("latent-kv", {"rank": 96}),
    ("share-layers", {"how": "reuse"}),
    ("share-layers", {"how": "mean"}),
    ("latent-kv", {"rank": 192}),
    ("latent-kv", {"rank": 256}),
)
QUANTIZED = (128, 64)
"""Ranks of latents that are also judged in INT8."""
BUDGETS = (0.5, 0.25, 0.125)


class Prepared:
    """A pass that works on statistics collected beforehand, so that one collection serves many settings."""

    _stats: HeadStats = PrivateAttr()

    def needs(self) -> frozenset[Stat]:
        return frozenset()

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        return super().plan(view, self._stats)  # type: ignore[misc,no-any-return]

    def payloads(self, view: ModelView, stats: HeadStats, plan: EditPlan) -> Payloads:
        return super().payloads(view, self._stats, plan)  # type: ignore[misc,no-any-return]


class PreparedLatent(Prepared, LatentKVPass):
    """``latent-kv`` on statistics collected beforehand."""


class PreparedLayers(Prepared, ShareLayersPass):
    """``share-layers`` on statistics collected beforehand."""

    def pairs(self, view: ModelView) -> Mapping[int, int]:
        return {}


def apply(bench: Bench, calibration: Calibration, stats: HeadStats | None, pass_: Pass) -> tuple[Any, Row]:
    """The model behind a pass, and what is to be said about it."""
    candidate = bench.checkpoint.copy()
    view = candidate.view()
    if stats is not None:
        pass_._stats = stats  # type: ignore[attr-defined]
    record = run_pass(pass_, view, bench.checkpoint.copy().view(), bench.task, calibration.examples)
    before = sum(layer.kv_width for layer in record.before.attention)
    numbers = sum(layer.kv_width for layer in record.after.attention)
    row = {"pass": pass_.name, "options": pass_.model_dump(mode="json", exclude_unset=True)}
    ranks = [layer.latent for layer in record.after.attention]
    return candidate, {**row, "numbers": numbers, "share": numbers / before, "ranks": ranks, "twin": record.twin_error}


@contextmanager
def int8_latents(module: nn.Module, largest: Mapping[str, float]) -> Iterator[None]:
    """Latents rounded to 8 bits with one constant scale per layer, while the block runs."""

    def rounded(scale: float, latent: torch.Tensor) -> torch.Tensor:
        return (latent / scale).round().clamp(-127, 127) * scale

    with ExitStack() as stack:
        for name, child in down_projections(module).items():
            scale = largest[name] / 127
            hook = child.register_forward_hook(lambda _, __, found, scale=scale: rounded(scale, found))
            stack.enter_context(hooked(hook))
        yield


def down_projections(module: nn.Module) -> dict[str, nn.Module]:
    found = {name: child.down for name, child in module.named_modules() if isinstance(child, LatentKeys)}
    return {name: child for name, child in found.items() if child is not None}


def largest_latents(bench: Bench, candidate: Any, calibration: Calibration) -> dict[str, float]:
    """The largest absolute latent of every layer on the calibration samples."""
    seen: dict[str, float] = {}
    with ExitStack() as stack, torch.inference_mode():
        for name, child in down_projections(candidate.module).items():

            def see(_: nn.Module, __: Any, found: torch.Tensor, name: str = name) -> None:
                seen[name] = max(seen.get(name, 0.0), float(found.abs().max()))

            stack.enter_context(hooked(child.register_forward_hook(see)))
        for batch in calibration.examples.batches(32):
            candidate.module(**{key: torch.as_tensor(value) for key, value in batch.inputs.items()})
    return seen


@click.group()
@click.option("--threads", default=1, show_default=True, help="CPU threads for torch.")
def main(threads: int) -> None:
    """Measure latents and shared layers; every command writes its part of OUT.json and all of OUT.md."""
    torch.set_num_threads(threads)


@main.command()
@common
@click.option("--train", required=True, help="sts-train.csv as distributed.")
@click.option("--test", required=True, help="sts-test.csv as distributed.")
@click.option("--samples", default=2048, show_default=True, help="Calibration pairs for the statistics.")
@click.option("--refit-samples", default=512, show_default=True, help="Calibration pairs for refits.")
def sts(out: Path, model: str, samples: int, refit_samples: int, **files: str) -> None:
    """Latents per layer, and per pair of layers, of a sentence encoder."""
    bench, train = sts_bench(model, files)
    calibration = bench.calibration(sample(train, samples, seed=0))
    layers = ShareLayersPass()
    view = bench.checkpoint.copy().view()
    stats = collect(view, bench.task, calibration.examples, layers.needs(), pairs=layers.pairs(view))
    few = bench.calibration(sample(train, refit_samples, seed=0))
    seen = calibration.texts | few.texts
    rows: list[Row] = []
    plain = [("latent-kv", options) for options in LATENT] + [("share-layers", options) for options in SHARED]
    for name, options in (*plain, *REFITTED):
        pass_: Any = (PreparedLatent if name == "latent-kv" else PreparedLayers).model_validate(options)
        candidate, row = apply(bench, few, stats, pass_)
        rows.append({**row, "int8": False, **bench.evaluate(candidate, ("test",), seen)})
        click.echo(json.dumps(rows[-1]), err=True)
        if name == "share-layers" and options.get("rank") in QUANTIZED and "refit" not in options:
            with int8_latents(candidate.module, largest_latents(bench, candidate, few)):
                found = bench.evaluate(candidate, ("test",), seen)
            # Half the bytes of the float16 numbers that shares are counted in.
            rows.append({**row, "share": row["share"] / 2, "int8": True, **found})
            click.echo(json.dumps(rows[-1]), err=True)
        save(out, "sts", bench, {"samples": samples, "refit_samples": refit_samples, "rows": rows})


@main.command()
@common
@click.option("--text", required=True, help="Documents separated by <|endoftext|>.")
@click.option("--judged", default=200, show_default=True, help="Documents to measure, from the start of the file.")
@click.option("--samples", default=128, show_default=True, help="Calibration documents, those that follow.")
def language(out: Path, model: str, text: str, judged: int, samples: int) -> None:
    """Both routes to latent attention, beside fewer kv heads with as many bytes, of a causal language model."""
    spec = DataSpec(path=text, format="text", separator="<|endoftext|>")
    checkpoint, task = load_checkpoint(model), make_task(LanguageOptions(type="language-modeling", data=spec))
    documents = load_table(spec, task.roles())
    test = task.encode(documents.select(range(judged)), checkpoint)
    bench = Bench(checkpoint=checkpoint, task=task, examples={"test": test}, texts={"test": [()] * len(test)})
    calibration = bench.calibration(documents.select(range(judged, judged + samples)))
    rows: list[Row] = []
    for pass_ in language_passes(checkpoint.copy().view()):
        candidate, row = apply(bench, calibration, None, pass_)
        rows.append({**row, **bench.evaluate(candidate, ("test",), calibration.texts)})
        click.echo(json.dumps(rows[-1]), err=True)
    content = {"judged": judged, "samples": samples, "shared": calibration.examples.shared_with(test), "rows": rows}
    save(out, "language", bench, content)


def language_passes(view: ModelView) -> list[Pass]:
    """For every budget: fewer kv heads where that number of bytes can be met, and both routes."""
    found: list[Pass] = []
    layout = next(iter(view.layout.attention))
    for budget in BUDGETS:
        numbers = round(budget * layout.kv_width)
        heads = numbers // (2 * layout.head_dim)
        if heads:
            found.append(ShareKVHeads(kv_heads=heads))
        for rotary in (r for r in (4, 8, 12, 16, 24) if r < numbers):
            options = {"rotary": rotary, "rank": numbers - rotary}
            found.append(LatentKVPass.model_validate({"route": "merge", **options}))
            if rotary == 8:
                paper = {"basis": "real", "select": "norm"}
                found.append(LatentKVPass.model_validate({"route": "merge", **paper, **options}))
            if rotary % (2 * len(layout.kv)) == 0:
                found.append(LatentKVPass.model_validate({"route": "heads", **options}))
    return found


# -- writing ----------------------------------------------------------------------------------------------------------


def save(out: Path, part: str, bench: Bench, content: Row) -> None:
    """Put one part into OUT.json, with what is needed to repeat it, and write OUT.md from all parts."""
    path = out.with_suffix(".json")
    parts = json.loads(path.read_text()) if path.exists() else {}
    packages = ("headwise", "torch", "transformers", "numpy", "scipy")
    if "untouched" not in parts.get(part, {}) or len(content["rows"]) <= 1:
        parts.setdefault(part, {})["untouched"] = bench.evaluate(bench.checkpoint, bench.examples, set())
    parts[part] |= {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "checkpoint": bench.checkpoint.digest,
        "data": {name: {"samples": len(e), "digest": e.digest} for name, e in bench.examples.items()},
        **content,
    }
    path.write_text(json.dumps(parts, indent=1) + "\n")
    writers = {"sts": sts_text, "language": language_text}
    texts = [writer(parts[name]) + origin(parts[name]) for name, writer in writers.items() if name in parts]
    out.with_suffix(".md").write_text("# Latent keys and values without training\n\n" + "\n".join(texts))


def sts_text(part: Row) -> str:
    body = [
        [
            row["pass"],
            settings(row["options"]) + (", INT8 latents" if row["int8"] else ""),
            f"{row['share']:.1%}",
            f"{row['test']['spearman']:.2f}",
            f"{row['test']['fidelity']:.4f}",
        ]
        for row in part["rows"]
    ]
    unseen = part["rows"][0]["test"]["unseen"]
    return (
        "## STS-B test\n\n"
        f"The untouched model has {part['untouched']['test']['spearman']:.2f} Spearman x 100. Fidelity is the mean "
        f"cosine to its embeddings, over the {unseen} pairs of which calibration saw neither sentence. KV is the share "
        "of the bytes that float16 keys and values of all heads have per token. Options not named are the defaults. "
        f"Calibration: {part['samples']} training pairs, sampled with seed 0; {part['refit_samples']} for refits.\n\n"
        + table(["pass", "options", "KV", "Spearman", "fidelity"], body)
    )


def language_text(part: Row) -> str:
    body = [
        [
            f"{row['share']:.1%}",
            row["pass"],
            settings(row["options"]),
            f"{row['test']['nats']:.4f}",
            f"{row['test']['agreement']:.4f}",
        ]
        for row in part["rows"]
    ]
    untouched = part["untouched"]["test"]
    return (
        "## A Llama model on TinyStories\n\n"
        f"The untouched model has {untouched['nats']:.4f} nats per token on the first {part['judged']} documents. KV "
        f"is the share of its kv bytes per token. Calibration: the {part['samples']} documents that follow; "
        f"{part['shared']} windows occur in both. Agreement is the share of positions whose most likely next token is "
        "that of the untouched model.\n\n" + table(["KV", "pass", "options", "nats per token", "agreement"], body)
    )


def settings(options: Mapping[str, Any]) -> str:
    words = {True: "yes", False: "no"}
    found = [f"{key} {words.get(value, value) if isinstance(value, bool) else value}" for key, value in options.items()]
    return ", ".join(part if "." not in part else part[:14] for part in found) or "defaults"


if __name__ == "__main__":
    main()
