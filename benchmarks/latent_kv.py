"""Latent keys and values and layers that share them, measured without training: STS-B, and a small language model.

Three commands, each of which writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/latent_kv.py sts      --out OUT --model DIR --train FILE --test FILE
    python benchmarks/latent_kv.py push     --out OUT --model DIR --train FILE --dev FILE --test FILE
    python benchmarks/latent_kv.py language --out OUT --model DIR --text FILE
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from common import Bench, Calibration, Results, Row, both, common, language_bench, sts_bench, sts_files, table, threads
from pydantic import PrivateAttr
from torch import nn

from headwise.calibration.data import Table, sample
from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.model.access import hooked
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
    ("latent-kv", {"rank": 96}),
    ("share-layers", {}),
    ("latent-kv", {"rank": 64}),
    ("share-layers", {"rank": 256}),
    ("latent-kv", {"rank": 192}),
    ("latent-kv", {"rank": 256}),
    ("share-layers", {"rank": 128, "refit_mlp": True}),
    ("share-layers", {"rank": 256, "refit_mlp": True}),
    ("share-layers", {"refit_mlp": True}),
    ("latent-kv", {"rank": 96, "refit_mlp": True}),
    ("share-layers", {"rank": 64}),
    ("share-layers", {"how": "reuse"}),
    ("share-layers", {"how": "mean"}),
)
PUSHED: tuple[Row, ...] = tuple(
    {"factor": factor, "rank": rank, "refit_mlp": True} for factor, rank in ((3, 96), (2, 128), (6, 96))
)
"""Groups of layers with one latent, judged in float16, INT8 and INT4."""
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
def rounded_latents(module: nn.Module, largest: Mapping[str, torch.Tensor], bits: int) -> Iterator[None]:
    """Latents as signed integers, while the block runs.

    In INT8 there is one constant scale per layer, in INT4 one per number of the latent; 16 bits are not rounded.
    """
    levels = 2 ** (bits - 1) - 1

    def rounded(scale: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return (latent / scale).round().clamp(-levels, levels) * scale

    with ExitStack() as stack:
        for name, child in down_projections(module).items() if bits < 16 else ():
            scale = (largest[name] if bits == 4 else largest[name].max()) / levels
            hook = child.register_forward_hook(lambda _, __, found, scale=scale: rounded(scale, found))
            stack.enter_context(hooked(hook))
        yield


def down_projections(module: nn.Module) -> dict[str, nn.Module]:
    found = {name: child.down for name, child in module.named_modules() if isinstance(child, LatentKeys)}
    return {name: child for name, child in found.items() if child is not None}


def largest_latents(candidate: Any, calibration: Calibration) -> dict[str, torch.Tensor]:
    """The largest absolute value of every number of every latent on the calibration samples."""
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as stack, torch.inference_mode():
        for name, child in down_projections(candidate.module).items():

            def see(_: nn.Module, __: Any, found: torch.Tensor, name: str = name) -> None:
                largest = found.abs().flatten(0, -2).amax(0)
                seen[name] = torch.maximum(seen.get(name, largest), largest)

            stack.enter_context(hooked(child.register_forward_hook(see)))
        for batch in calibration.examples.batches(32):
            candidate.module(**{key: torch.as_tensor(value) for key, value in batch.inputs.items()})
    return seen


@click.group()
@threads
def main(threads: int) -> None:
    """Measure latents and shared layers; every command writes its part of OUT.json and all of OUT.md."""
    torch.set_num_threads(threads)


@main.command()
@common
@sts_files("train", "test")
@click.option("--samples", default=2048, show_default=True, help="Calibration pairs for the statistics.")
@click.option("--refit-samples", default=512, show_default=True, help="Calibration pairs for refits.")
@click.option("--resume", is_flag=True, help="Keep the rows of a run that was cut short.")
def sts(out: Path, model: str, samples: int, refit_samples: int, *, resume: bool, **files: str) -> None:
    """Latents per layer, and per pair of layers, of a sentence encoder."""
    bench, train = sts_bench(model, files)
    layers = ShareLayersPass()
    stats, few, seen = prepared(bench, train, samples, refit_samples, layers)
    content = {**bench.facts(), "samples": samples, "refit_samples": refit_samples}
    rows = RESULTS.rows(out, "sts", content) if resume else []
    there = [(row["pass"], row["options"]) for row in rows]
    plain = [("latent-kv", options) for options in LATENT] + [("share-layers", options) for options in SHARED]
    for name, options in (*plain, *REFITTED):
        pass_: Any = (PreparedLatent if name == "latent-kv" else PreparedLayers).model_validate(options)
        if (name, pass_.model_dump(mode="json", exclude_unset=True)) in there:
            continue
        candidate, row = apply(bench, few, stats, pass_)
        wanted = name == "share-layers" and options.get("rank") in QUANTIZED and "refit" not in options
        rows += judged(bench, candidate, row, few, seen, ("test",), bits=(16, 8) if wanted else (16,))
        RESULTS.save(out, "sts", {**content, "rows": rows})


@main.command()
@common
@sts_files("train", "dev", "test")
@click.option("--samples", default=1024, show_default=True, help="Calibration pairs for the statistics.")
@click.option("--refit-samples", default=512, show_default=True, help="Calibration pairs for refits.")
def push(out: Path, model: str, samples: int, refit_samples: int, **files: str) -> None:
    """Fewer bytes than a latent per pair of layers has: larger groups, fewer bits."""
    bench, train = sts_bench(model, files)
    rows: list[Row] = []
    facts = bench.facts()
    for options in PUSHED:
        pass_ = PreparedLayers.model_validate(options)
        stats, few, seen = prepared(bench, train, samples, refit_samples, ShareLayersPass.model_validate(options))
        candidate, row = apply(bench, few, stats, pass_)
        rows += judged(bench, candidate, row, few, seen, ("dev", "test"), bits=(16, 8, 4))
        RESULTS.save(out, "push", {**facts, "samples": samples, "refit_samples": refit_samples, "rows": rows})


def prepared(
    bench: Bench, train: Table, samples: int, refit_samples: int, layers: ShareLayersPass
) -> tuple[HeadStats, Calibration, Set[str]]:
    """Statistics, the samples for refits, and all texts of both."""
    calibration = bench.calibration(sample(train, samples, seed=0))
    view = bench.checkpoint.copy().view()
    stats = collect(view, bench.task, calibration.examples, layers.needs(), pairs=layers.pairs(view))
    few = bench.calibration(sample(train, refit_samples, seed=0))
    return stats, few, calibration.texts | few.texts


def judged(
    bench: Bench,
    candidate: Any,
    row: Row,
    few: Calibration,
    seen: Set[str],
    splits: tuple[str, ...],
    *,
    bits: tuple[int, ...],
) -> list[Row]:
    """The row with its accuracy, once for every number of bits."""
    largest = largest_latents(candidate, few) if len(bits) > 1 else {}
    found = []
    for count in bits:
        with rounded_latents(candidate.module, largest, count):
            share = row["share"] * count / 16
            found.append({**row, "share": share, "bits": count, **bench.evaluate(candidate, splits, seen)})
        click.echo(json.dumps(found[-1]), err=True)
    return found


@main.command()
@common
@click.option("--text", required=True, help="Documents separated by <|endoftext|>.")
@click.option("--judged", default=50, show_default=True, help="Documents to measure, from the start of the file.")
@click.option("--samples", default=48, show_default=True, help="Calibration documents, those that follow.")
def language(out: Path, model: str, text: str, judged: int, samples: int) -> None:
    """Both routes to latent attention, beside fewer kv heads with as many bytes, of a causal language model."""
    bench, documents = language_bench(model, text, {"test": range(judged)})
    calibration = bench.calibration(documents.select(range(judged, judged + samples)))
    rows: list[Row] = []
    shared = calibration.examples.shared_with(bench.examples["test"])
    facts = bench.facts()
    for pass_ in language_passes(bench.checkpoint.copy().view()):
        candidate, row = apply(bench, calibration, None, pass_)
        rows.append({**row, **bench.evaluate(candidate, ("test",), calibration.texts)})
        click.echo(json.dumps(rows[-1]), err=True)
        content = {**facts, "judged": judged, "samples": samples, "shared": shared, "rows": rows}
        RESULTS.save(out, "language", content)


def language_passes(view: ModelView) -> list[Pass]:
    """For every budget: fewer kv heads where that number of bytes can be met, all routes, and layers that share."""
    found: list[Pass] = []
    layout = next(iter(view.layout.attention))
    for budget in BUDGETS:
        numbers = round(budget * layout.kv_width)
        heads = numbers // (2 * layout.head_dim)
        if heads:
            found.append(ShareKVHeads(kv_heads=heads))
        # A quarter of the numbers rotary was the best of 4, 8, 12, 16 and 24 at half the bytes.
        merged = {"route": "merge", "rotary": max(2, numbers // 4)}
        paper = {**merged, "basis": "real", "select": "norm"}
        every = {"route": "heads", "rotary": 2 * len(layout.kv)}
        for options in (merged, paper, every):
            if options["rotary"] < numbers:
                found.append(LatentKVPass.model_validate({"rank": numbers - options["rotary"], **options}))
        found.append(LatentKVPass(rank=numbers, route="rebuild"))
        # One latent for two layers has the numbers of both.
        found.append(ShareLayersPass(rank=2 * numbers))
    return found


# -- writing ----------------------------------------------------------------------------------------------------------


def sts_text(part: Row) -> str:
    body = [
        [
            row["pass"],
            settings(row["options"]) + ("" if row["bits"] == 16 else f", INT{row['bits']} latents"),
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


def push_text(part: Row) -> str:
    body = [
        [
            settings(row["options"]),
            str(row["bits"]),
            f"{row['share']:.1%}",
            both(row["dev"]),
            both(row["test"]),
        ]
        for row in part["rows"]
    ]
    untouched = part["untouched"]
    return (
        "## Fewer bytes: larger groups of layers, fewer bits\n\n"
        "`share-layers` with one latent per group and its refit. Spearman x 100 / fidelity, as above; the untouched "
        f"model has {untouched['dev']['spearman']:.2f} on dev and {untouched['test']['spearman']:.2f} on test. INT8 "
        "has one constant scale per layer, INT4 one per number of the latent. Calibration: "
        f"{part['samples']} training pairs; {part['refit_samples']} for refits and scales.\n\n"
        + table(["options", "bits", "KV", "dev", "test"], body)
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


RESULTS = Results(
    title="Latent keys and values without training",
    writers={"sts": sts_text, "push": push_text, "language": language_text},
)


if __name__ == "__main__":
    main()
