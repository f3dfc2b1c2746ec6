"""Token pruning per head, per layer and by chance, on a sentence encoder, a vision transformer and a language model.

Commands, each of which writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/token_pruning.py sts  --out OUT --model DIR --train FILE --split test --data FILE
    python benchmarks/token_pruning.py long --out OUT --model DIR --train FILE --split test --data FILE
    python benchmarks/token_pruning.py vit  --out OUT --model DIR --work FOLDER
    python benchmarks/token_pruning.py language --out OUT --model stories260k --text FILE
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from common import Bench, Results, Row, both, common, sts_bench, table, threads
from prompt_pruning import markdown, measured, prompt_variants
from stream_heads import read

from headwise.calibration.data import Table
from headwise.calibration.tasks import Examples
from headwise.export.onnx import to_onnx
from headwise.export.runners import OrtRunner
from headwise.gates.cost import graph_cost, latency
from headwise.gates.model_cost import model_cost
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.passes.base import run_pass
from headwise.passes.prune_tokens import PruneTokens

METHODS: Mapping[str, Row] = {
    "per head": {},
    "per layer": {"per": "layer"},
    "by chance": {"score": "random"},
    "per head, rest dropped": {"rest": "drop"},
    "per layer, rest dropped": {"rest": "drop", "per": "layer"},
    "by chance, rest dropped": {"rest": "drop", "score": "random"},
    "per head, all queries asked": {"score": "received"},
    "per head, all queries asked, rest dropped": {"score": "received", "rest": "drop"},
    "per head, one pooled query": {"queries": 1},
    "per head, values not weighted": {"weighted": False},
}
STREAM: Mapping[str, Row] = {
    f"tokens leave, {rest}": {"reduce": "tokens", "rest": rest} for rest in ("drop", "fuse", "merge")
}
KEEPS = (0.5, 0.7, 0.35)
VIT_KEEPS = (0.75, 0.5, 0.35)
SENTENCES = 28
"""Sentences that make one long text: more than 512 tokens, which are cut."""


def pruned(bench_checkpoint: Checkpoint, task: object, examples: Examples, options: Row) -> tuple[Checkpoint, Row]:
    """A copy of the model that keeps a share of its tokens, and what the pass recorded."""
    candidate = bench_checkpoint.copy()
    pass_ = PruneTokens.model_validate(options)
    start = time.perf_counter()
    record = run_pass(pass_, candidate.view(), bench_checkpoint.copy().view(), task, examples)  # type: ignore[arg-type]
    shares = [1.0 if layer.tokens is None else layer.tokens.keep for layer in record.after.attention]
    return candidate, {
        "options": record.options,
        "shares": shares,
        "twin_error": record.twin_error,
        "seconds": time.perf_counter() - start,
    }


@click.group()
@threads
def main(threads: int) -> None:
    """Measure prune-tokens; every command writes its part of OUT.json and all of OUT.md."""
    torch.set_num_threads(threads)


def _encoder_rows(bench: Bench, part: str, out: Path, facts: Row, only: Sequence[str]) -> None:
    tokens = facts["tokens"]
    rows = RESULTS.rows(out, part, facts)
    done = [(row["method"], row["keep"]) for row in rows]
    split = next(iter(bench.examples))
    # Without a budget or thresholds the pass looks at no statistics: two samples are enough for its twin.
    few = Examples.of(bench.examples[split].rows[:4], source="first", padding=bench.examples[split].padding)
    for keep in KEEPS:
        for method, options in METHODS.items():
            if (method, keep) in done or (only and f"{method} {keep}" not in only):
                continue
            candidate, made = pruned(bench.checkpoint, bench.task, few, {"keep": keep, **options})
            inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.long)}
            cost = model_cost(candidate.view(), inputs).to_json()
            row = {"method": method, "keep": keep, **made, **cost, **bench.evaluate(candidate, [split], set())}
            rows.append(row)
            click.echo(json.dumps(row), err=True)
            order = [(m, k) for k in KEEPS for m in METHODS]
            rows.sort(key=lambda row: order.index((row["method"], row["keep"])))
            RESULTS.save(out, part, {**facts, "rows": rows})


def _encoder_facts(bench: Bench, tokens: int) -> Row:
    inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.long)}
    return {**bench.facts(), "tokens": tokens, "dense": model_cost(bench.checkpoint.view(), inputs).to_json()}


def _sts_options(command: object) -> object:
    for name, text in (("train", "sts-train.csv."), ("data", "The file that is evaluated."), ("split", "Its name.")):
        command = click.option(f"--{name}", required=True, help=text)(command)  # type: ignore[arg-type]
    return click.option("--only", multiple=True, help="Measure this row only, such as 'per head 0.5'.")(command)  # type: ignore[arg-type]


@main.command()
@common
@_sts_options
def sts(out: Path, model: str, train: str, split: str, data: str, only: Sequence[str]) -> None:
    """Every method on one split of the STS benchmark; a run that was cut short goes on."""
    bench, _ = sts_bench(model, {"train": train, split: data})
    _encoder_rows(bench, f"sts-{split}", out, _encoder_facts(bench, 128), only)


@main.command()
@common
@_sts_options
@click.option("--count", default=32, show_default=True, help="Pairs of long texts.")
def long(out: Path, model: str, count: int, only: Sequence[str], **given: str) -> None:
    """The same on texts of 512 tokens, made of neighbouring sentences of the file."""
    split, data = given["split"], given["data"]
    bench, _ = sts_bench(model, {"train": given["train"], split: data})
    pairs = bench.texts[split]
    groups = [[pairs[(start * SENTENCES + i) % len(pairs)] for i in range(SENTENCES * 2)] for start in range(count)]
    columns = {
        side: [" ".join(pair[i] for pair in group) for group in groups] for i, side in enumerate(("first", "second"))
    }
    texts = Table(columns={**columns, "score": [float(i) for i in range(count)]}, source=data, digest="")
    bench = Bench(
        checkpoint=bench.checkpoint,
        task=bench.task,
        examples={split: bench.task.encode(texts, bench.checkpoint)},
        texts={split: [()] * count},
    )
    _encoder_rows(bench, f"long-{split}", out, _encoder_facts(bench, 512), only)


@main.command()
@common
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the graphs.")
@click.option("--limit", type=int, help="Test images, from the first; by default all.")
def vit(out: Path, model: str, work: Path, limit: int | None) -> None:
    """Both outputs of examples/mnist_vit.py, on its test images, on ONNX Runtime with one thread."""
    checkpoint, test = load_checkpoint(model), np.load(Path(model) / "test.npz")
    images = test["image"][:limit]
    labels = {name: test[name][:limit] for name in ("digit", "parity")}
    work.mkdir(parents=True, exist_ok=True)
    made = {"dense": (checkpoint, {"method": "untouched", "keep": 1.0})}
    rows_ = [{"image": image} for image in images[:4]]
    few = Examples.of(rows_, source="first", padding={})
    for keep in VIT_KEEPS:
        for method, options in {**METHODS, **STREAM}.items():
            candidate, found = pruned(checkpoint, None, few, {"keep": keep, **options})
            made[f"{method} {keep}"] = (candidate, {"method": method, "keep": keep, **found})
    runners = {}
    rows = []
    for label, (candidate, row) in made.items():
        path = work / f"{label}.onnx"
        to_onnx(candidate.view().module, {"image": images[:2]}, path, dynamic={"image": (0,)})
        runners[label] = OrtRunner(path, threads=1)
        found = [runners[label]({"image": part}) for part in np.array_split(images, max(1, len(images) // 500))]
        right = {n: np.concatenate([part[n].argmax(1) for part in found]) == labels[n] for n in labels}
        accuracy = {name: 100 * float(hits.mean()) for name, hits in right.items()}
        rows.append({**row, **accuracy, "macs": graph_cost(path, {"image": (1, 1, 28, 28)}).macs})
        click.echo(json.dumps(rows[-1]), err=True)
    times = latency(runners, {"image": images[:1]}, rounds=200, warmup=20)
    for label, row in zip(made, rows, strict=True):
        row["latency_ms"] = times[label].median_ms
    RESULTS.save(out, "vit", {"checkpoint": checkpoint.digest, "images": len(images), "rows": rows})


@main.command()
@common
@click.option("--text", required=True, help="Stories separated by <|endoftext|>.")
def language(out: Path, model: str, text: str) -> None:
    """Nats per token behind a pruned prompt of 256 tokens, beside caches of as many bytes; a run cut short goes on."""
    data = read(model, text)
    facts = {"checkpoint": data.checkpoint.digest, "windows": len(data.windows)}
    rows = RESULTS.rows(out, "language", facts)
    for row in prompt_variants()[len(rows) :]:
        rows.append(measured(data, row))
        click.echo(json.dumps(rows[-1]), err=True)
        RESULTS.save(out, "language", {**facts, "rows": rows})


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_encoder(part: Row) -> str:
    split = next(iter(part["untouched"]))
    untouched, dense, long_texts = part["untouched"][split], part["dense"]["macs"], part["tokens"] == 512
    lines = [
        (
            f"{row['keep']:.0%}",
            row["method"],
            f"{row[split]['fidelity']:.4f}" if long_texts else both(row[split]),
            f"{100 * (1 - row['macs'] / dense):.1f} %",
        )
        for row in part["rows"]
    ]
    what = f"{part['data'][split]['samples']} pairs of texts of 512 tokens" if long_texts else "STS-B"
    spearman = "" if long_texts else f"The untouched model has a Spearman of {untouched['spearman']:.2f}. "
    head = ["keys kept", "method", "fidelity" if long_texts else "Spearman / fidelity", "fewer MACs"]
    return (
        f"## {what} ({split})\n\n{spearman}Fidelity is the mean cosine between the embeddings of the pruned and of the "
        f"untouched model. MACs are those of one text of {part['tokens']} tokens.\n\n" + table(head, lines)
    )


def _write_vit(part: Row) -> str:
    dense = part["rows"][0]
    lines = [
        (
            f"{row['keep']:.0%}",
            row["method"],
            f"{row['digit']:.2f}",
            f"{row['parity']:.2f}",
            f"{row['macs'] / 1e6:.2f} M",
            f"{row['latency_ms'] / dense['latency_ms']:.2f}",
        )
        for row in part["rows"]
    ]
    head = ["tokens kept", "method", "digit", "parity", "MACs", "latency / untouched"]
    return (
        f"## A vision transformer on {part['images']} test images of MNIST\n\n"
        "Accuracies in percent are those of the exported graphs on ONNX Runtime. Latencies are medians of one "
        "interleaved run, one image, one thread.\n\n" + table(head, lines)
    )


def _parts(names: Sequence[str]) -> Mapping[str, object]:
    own = {"vit": _write_vit, "language": markdown}
    return {name: own.get(name, _write_encoder) for name in names}


RESULTS = Results(
    title="Token pruning per head",
    writers=_parts(["sts-dev", "sts-test", "long-dev", "long-test", "vit", "language"]),  # type: ignore[arg-type]
)

if __name__ == "__main__":
    main()
