"""Fewer kv heads and fewer attention maps, measured: every method side by side on STS-B and on a language model.

Four commands, each of which writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/kv_sharing.py methods  --out OUT --model DIR --train FILE --test FILE --keep MODELS
    python benchmarks/kv_sharing.py options  --out OUT --model DIR --train FILE --dev FILE
    python benchmarks/kv_sharing.py engines  --out OUT --models MODELS
    python benchmarks/kv_sharing.py language --out OUT --model DIR --text FILE
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common import Bench, Calibration, Results, Row, both, common, language_bench, sts_bench, sts_files, table, threads

from headwise.artifacts import digest_file
from headwise.calibration.data import sample
from headwise.export.onnx import to_onnx
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.runners import OrtRunner
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine, profiles_for
from headwise.gates.cost import graph_cost
from headwise.gates.model_cost import model_cost
from headwise.model.attend import Form, form
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.saving import save_checkpoint
from headwise.passes import PASSES
from headwise.passes.base import run_pass

SHARING: dict[str, Row] = {
    # As it was published: nothing but the mean of the projections, biases included (arXiv 2305.13245).
    "mean of neighbours": {"merge": "mean", "grouping": "adjacent", "fold_bias": False, "refit": False},
    "mean of neighbours, refit": {"merge": "mean", "grouping": "adjacent"},
    "mean after alignment": {"merge": "align", "refit": False},
    "subspace": {"refit": False},
    "subspace, refit": {},
    "subspace, reconstruction": {"reconstruct": 4},
}
CLUSTERING: dict[str, Row] = {
    "attention maps": {"affinity": "maps", "refit": False},
    "change of the output": {"refit": False},
    "change of the output, refit": {"refit_mlp": False, "reconstruct": 0},
    "attention maps, refit with MLPs": {"affinity": "maps", "reconstruct": 0},
    "change of the output, refit with MLPs": {"reconstruct": 0},
    "attention maps, reconstruction": {"affinity": "maps"},
    "change of the output, reconstruction": {},
    "attention maps, reconstruction, all pairs": {"affinity": "maps"},
}
KV_HEADS = (6, 4, 3, 2)
CLUSTERS = (6, 4)
METHODS = (
    *(("share-kv", "subspace, refit", {"kv_heads": n}) for n in KV_HEADS),
    *(("cluster-heads", "change of the output, reconstruction", {"clusters": n}) for n in CLUSTERS),
    ("cluster-heads", "change of the output, reconstruction", {"ratio": 0.5}),
    ("cluster-heads", "change of the output, refit with MLPs", {"ratio": 0.5, "reconstruct": 0}),
    *(("share-kv", name, {"kv_heads": 6, **SHARING[name]}) for name in list(SHARING)[:4]),
    *(("share-kv", name, {"kv_heads": n, **SHARING[name]}) for n in KV_HEADS[1:] for name in list(SHARING)[:4:3]),
    *(("share-kv", "subspace, reconstruction", {"kv_heads": n, "reconstruct": 4}) for n in KV_HEADS),
    *(("cluster-heads", name, {"clusters": n, **CLUSTERING[name]}) for n in CLUSTERS for name in list(CLUSTERING)[:-2]),
    ("cluster-heads", "attention maps, reconstruction, all pairs", {"clusters": 6, "affinity": "maps"}),
)
"""In the order in which they are measured: what is recommended comes first."""
GRID: tuple[tuple[str, int, Row], ...] = (
    *(("share-kv", n, {"kv_heads": 6, "ridge": ridge}) for n in (512, 2048) for ridge in (0.01, 0.1, 1.0)),
    ("share-kv", 2048, {"kv_heads": 6, "rounds": 0}),
    ("share-kv", 2048, {"kv_heads": 6, "weighted": False}),
    *(
        ("cluster-heads", n, {"clusters": 6, "ridge": ridge, "reconstruct": 0})
        for n in (512, 2048)
        for ridge in (0.1, 1.0)
    ),
    *(
        ("cluster-heads", 1024, {"clusters": 6, "refit_mlp": mlp, "reconstruct": epochs})
        for mlp, epochs in ((False, 0), (True, 0), (True, 2), (True, 4), (True, 8))
    ),
)
LANGUAGE_KV_HEADS = (2, 1)
LENGTH = 128
"""Tokens at which the costs of the sentence encoder are counted."""
PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "One day, Tom and his dog went to the park.",
    "The little bird was sad because",
    "Mom said,",
)
NEW_TOKENS = 96


def compress(bench: Bench, calibration: Calibration, name: str, options: Row) -> tuple[Checkpoint, Row]:
    """A compressed copy of the model, and the row that says what was done."""
    candidate = bench.checkpoint.copy()
    pass_ = PASSES[name].model_validate(options)
    start = time.perf_counter()
    record = run_pass(pass_, candidate.view(), bench.checkpoint.copy().view(), bench.task, calibration.examples)
    layout = record.after.attention
    return candidate, {
        "pass": name,
        "options": record.options,
        "samples": len(calibration.examples),
        "kv": [len(layer.kv) for layer in layout],
        "scoring": [len(layer.scoring) for layer in layout],
        "twin_error": record.twin_error,
        "refit": record.refit,
        "seconds": time.perf_counter() - start,
    }


def say(row: Row) -> None:
    click.echo(json.dumps({key: value for key, value in row.items() if key not in ("refit", "text")}), err=True)


# -- commands ---------------------------------------------------------------------------------------------------------


@click.group()
@threads
def main(threads: int) -> None:
    """Measure share-kv and cluster-heads; every command writes its part of OUT.json and all of OUT.md."""
    torch.set_num_threads(threads)


@main.command()
@common
@sts_files("train", "test")
@click.option("--samples", default=2048, show_default=True, help="Calibration pairs.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the models with refit, for `engines`.")
@click.option("--resume", is_flag=True, help="Keep the rows of a run that was cut short, made by the same code.")
@click.option("--only", multiple=True, help="Methods to measure, by name; with --resume.")
def methods(
    out: Path, model: str, samples: int, keep: Path | None, resume: bool, only: Sequence[str], **files: str
) -> None:
    """Every method, with the passes' default options."""
    bench, train = sts_bench(model, files)
    facts = {**bench.facts(), "samples": samples}
    rows = RESULTS.rows(out, "methods", facts) if resume else []
    done = [(row["pass"], row["options"], row["samples"]) for row in rows]
    for name, method, options in METHODS:
        count = len(train) if method.endswith("all pairs") else samples
        if (name, PASSES[name].model_validate(options).model_dump(mode="json"), count) in done or (
            only and method not in only
        ):
            continue
        calibration = bench.calibration(sample(train, count, seed=0))
        candidate, made = compress(bench, calibration, name, options)
        inputs = {"input_ids": torch.ones(1, LENGTH, dtype=torch.long)}
        cost = model_cost(candidate.view(), inputs).to_json()
        rows.append({"method": method, **made, **cost, **bench.evaluate(candidate, bench.examples, calibration.texts)})
        say(rows[-1])
        if keep is not None and method in ("subspace, refit", "change of the output, reconstruction"):
            kind, size = next(iter(options.items()))
            save_checkpoint(candidate, candidate.view(), keep / f"{name} {kind} {size}")
        RESULTS.save(out, "methods", {**facts, "rows": rows})


@main.command()
@common
@sts_files("train", "dev")
def options(out: Path, model: str, **files: str) -> None:
    """Calibration size, ridge, rounds, weights, MLPs and reconstruction, on dev."""
    bench, train = sts_bench(model, files)
    facts, rows = bench.facts(), []
    for name, samples, options in GRID:
        calibration = bench.calibration(sample(train, samples, seed=0))
        candidate, made = compress(bench, calibration, name, options)
        rows.append({**made, **bench.evaluate(candidate, bench.examples, calibration.texts)})
        say(rows[-1])
        RESULTS.save(out, "options", {**facts, "rows": rows})


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results, no suffix.")
@click.option("--models", type=click.Path(path_type=Path, exists=True), required=True, help="What `methods` kept.")
@click.option("--target", default="sm86", show_default=True, help="Built for this GPU, which is not needed.")
@click.option("--resume", is_flag=True, help="Keep the rows of models that are not in the folder any more.")
def engines(out: Path, models: Path, target: str, resume: bool) -> None:
    """FP16 engines of the kept models, built but not run, and the kernels in them."""
    folders = sorted(path for path in models.iterdir() if path.is_dir())
    old = RESULTS.rows(out, "engines", {"target": target}) if resume else []
    rows = [row for row in old if row["model"] not in {folder.name for folder in folders}]
    for folder in folders:
        checkpoint = load_checkpoint(folder)
        clustered = any(layer.clustered for layer in checkpoint.view().layout.attention)
        forms: tuple[Form, ...] = ("gathered", "fused") if clustered else ("fused",)
        for name in forms:
            rows.append({"model": folder.name, "form": name, **engine(checkpoint, target, name)})
            say(rows[-1])
            RESULTS.save(out, "engines", {"target": target, "rows": rows})


@main.command()
@common
@click.option("--text", required=True, help="Documents separated by <|endoftext|>.")
@click.option("--judged", default=300, show_default=True, help="Documents to measure, from the start of the file.")
@click.option("--samples", default=128, show_default=True, help="Calibration documents, those that follow.")
def language(out: Path, model: str, text: str, judged: int, samples: int) -> None:
    """Fewer kv heads of a causal language model, and the text that the exported graphs write."""
    bench, documents = language_bench(model, text, {"test": range(judged)})
    calibration = bench.calibration(documents.select(range(judged, judged + samples)))
    shared = calibration.examples.shared_with(bench.examples["test"])
    facts = {**bench.facts(), "judged": judged, "samples": samples, "shared": shared}
    rows = []
    for count in LANGUAGE_KV_HEADS:
        for method, options in SHARING.items():
            candidate, made = compress(bench, calibration, "share-kv", {"kv_heads": count, **options})
            found = bench.evaluate(candidate, bench.examples, calibration.texts)
            rows.append({"method": method, **made, **found, "text": written_twice(candidate, calibration)})
            say(rows[-1])
            RESULTS.save(out, "language", {**facts, "rows": rows})


# -- graphs and engines -----------------------------------------------------------------------------------------------


def engine(checkpoint: Checkpoint, target: str, name: Form) -> Row:
    """Export in a form of clustered layers, convert to fp16, build, and count."""
    texts = ["A man is playing a large flute.", "A woman plays."]
    inputs = dict(checkpoint.tokenizer()(texts, padding=True, return_tensors="np"))
    view = checkpoint.copy().view()
    with tempfile.TemporaryDirectory() as scratch:
        graph, half = Path(scratch, "model.onnx"), Path(scratch, "half.onnx")
        with form(name):
            to_onnx(view.module, inputs, graph, dynamic=dict.fromkeys(inputs, (0, 1)))
        cost = graph_cost(graph, dict.fromkeys(inputs, (1, LENGTH)), [layer.path for layer in view.attention])
        convert_precision(graph, half, "fp16")
        profiles = profiles_for(half, ExportSpec(), {"sequence": checkpoint.longest_sequence() or LENGTH})
        info = build_engine(half, Path(scratch, "engine"), resolve_target(target), profiles=profiles).to_json()
        return {
            "digest": digest_file(graph),
            "macs": cost.macs,
            "attention_macs": cost.attention_macs,
            "layers": len(view.attention),
            **{key: info[key] for key in ("runtime", "version", "bytes", "seconds", "listing", "profiles")},
        }


def written_twice(checkpoint: Checkpoint, calibration: Calibration) -> list[Row]:
    """What torch writes greedily with its kv cache, and what the exported graph writes, which sees all tokens anew."""
    tokenizer, view = checkpoint.tokenizer(), checkpoint.copy().view()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "model.onnx")
        examples = calibration.examples
        to_onnx(view.module, examples.example_batch(), path, dynamic=examples.dynamic_axes())
        rows = []
        for prompt in PROMPTS:
            start = tokenizer(prompt, return_tensors="pt")["input_ids"]
            tokens = {"torch": by_torch(checkpoint.copy(), start), "graph": by_graph(path, start.tolist()[0])}
            rows.append({"prompt": prompt, **{name: tokenizer.decode(ids) for name, ids in tokens.items()}})
            rows[-1] |= {"tokens": NEW_TOKENS, "equal": tokens["torch"] == tokens["graph"]}
    return rows


def by_torch(checkpoint: Checkpoint, start: torch.Tensor) -> list[int]:
    module: Any = checkpoint.module
    module.generation_config.eos_token_id = None
    with torch.no_grad():
        found = module.generate(start, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    ids: list[int] = found[0].tolist()
    return ids


def by_graph(path: Path, ids: Sequence[int]) -> list[int]:
    written = list(ids)
    with OrtRunner(path, threads=1) as runner:
        for _ in range(NEW_TOKENS):
            row = torch.tensor([written]).numpy()
            logits = runner({"input_ids": row, "attention_mask": row * 0 + 1})["logits"]
            written.append(int(logits[0, -1].argmax()))
    return written


# -- writing ----------------------------------------------------------------------------------------------------------


def methods_text(part: Row) -> str:
    unseen = part["rows"][0]["test"]["unseen"]
    whole = [row for row in part["rows"] if row["samples"] != part["samples"]]
    note = f" All pairs are {whole[0]['samples']}, and leave {whole[0]['test']['unseen']} unseen." if whole else ""
    text = (
        "## Every method on STS-B\n\n"
        f"The untouched model has a Spearman of {part['untouched']['test']['spearman']:.2f} on test. Fidelity is the "
        "mean cosine between the embeddings of the compressed and of the untouched model, over the pairs of which "
        f"calibration saw neither sentence ({unseen} of {part['data']['test']['samples']}). Calibration: "
        f"{part['samples']} training pairs, sampled with seed 0.{note} Where the method does not say else, options are "
        f"the defaults of the passes. MACs are those of {LENGTH} tokens.\n"
    )
    order = [*SHARING, *CLUSTERING]
    for name, what in (("share-kv", "kv heads per layer"), ("cluster-heads", "heads with scores, per layer")):
        rows = [row for row in part["rows"] if row["pass"] == name]
        rows.sort(key=lambda row: (-sum(left(row)), order.index(row["method"])))
        body = [
            [
                compact(left(row)),
                row["method"],
                f"{row['test']['spearman']:.2f}",
                f"{row['test']['fidelity']:.4f}",
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['macs'] / 1e9:.3f} G",
            ]
            for row in rows
        ]
        head = [what, "method", "Spearman", "fidelity", "parameters", "MACs"]
        text += f"\n### {name}\n\n" + table(head, body)
    return text


def left(row: Row) -> list[int]:
    """Heads of every layer that have keys and values, or scores."""
    counts: list[int] = row["kv"] if row["pass"] == "share-kv" else row["scoring"]
    return counts


def options_text(part: Row) -> str:
    body = [
        [
            row["pass"],
            compact(left(row)),
            str(row["samples"]),
            f"{row['options']['ridge']:g}",
            str(row["options"].get("rounds", "")),
            str(row["options"].get("weighted", "")).lower(),
            str(row["options"].get("refit_mlp", "")).lower(),
            str(row["options"].get("reconstruct", "")),
            both(row["dev"]),
        ]
        for row in part["rows"]
    ]
    head = ["pass", "heads left", "pairs", "ridge", "rounds", "weighted", "MLPs", "epochs", "dev"]
    return "## Options on STS-B dev\n\nThe last column is Spearman x 100 / fidelity, as above.\n\n" + table(head, body)


def engines_text(part: Row) -> str:
    rows = part["rows"]
    body = [
        [
            row["model"],
            row["form"] if row["model"].startswith("cluster") else "",
            f"{row['listing']['fused_attention']} in {row['layers']} layers",
            str(row["listing"]["layers"]),
            f"{row['attention_macs'] / 1e9:.3f} G",
            f"{row['bytes'] / 1e6:.1f} MB",
        ]
        for row in rows
    ]
    head = ["model", "form", "fused attention kernels", "kernels in all", "attention MACs", "engine"]
    return (
        f"## Engines for {part['target']}\n\nFP16, built with {rows[0]['runtime']} {rows[0]['version']} without a GPU "
        "and not run; counted in the builder's own list of kernels. Clustered layers have two forms, of which "
        f"`export.clusters` chooses. MACs are those of {LENGTH} tokens, in the graph.\n\n" + table(head, body)
    )


def language_text(part: Row) -> str:
    rows, untouched = part["rows"], part["untouched"]["test"]
    body = []
    for row in rows:
        found, equal = row["test"], sum(text["equal"] for text in row["text"])
        cells = [compact(row["kv"]), row["method"], f"{found['nats']:.4f}", f"{found['agreement']:.4f}"]
        body.append([*cells, f"{equal} of {len(row['text'])}"])
    example = rows[-1]["text"][0]["graph"]
    return (
        "## A Llama model on TinyStories\n\n"
        f"The untouched model has {untouched['nats']:.4f} nats per token on the first {part['judged']} documents. "
        f"Calibration: the {part['samples']} documents that follow; {part['shared']} windows occur in both. Agreement "
        "is the share of positions whose most likely next token is that of the untouched model. Equal texts: from "
        f"{len(PROMPTS)} prompts, torch writes {NEW_TOKENS} tokens greedily with its kv cache, and so does the "
        "exported graph of the same compressed model on ONNX Runtime, which sees all tokens anew each time.\n\n"
        + table(["kv heads per layer", "method", "nats per token", "agreement", "equal texts"], body)
        + "\nThe graph of the last row writes:\n\n"
        + "\n".join(f"> {line}" for line in example.removeprefix("<s>").strip().splitlines())
        + "\n"
    )


def compact(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else " ".join(map(str, counts))


RESULTS = Results(
    title="Fewer kv heads and fewer attention maps without training",
    writers={"methods": methods_text, "options": options_text, "engines": engines_text, "language": language_text},
)

if __name__ == "__main__":
    main()
