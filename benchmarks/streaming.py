"""What memory a conversion takes that has one layer of a model in memory, by the size and the depth of the model.

    python benchmarks/streaming.py --out benchmarks/streaming --work DIR llama-7b
    python benchmarks/streaming.py --out benchmarks/streaming --work DIR grouped-7b
    python benchmarks/streaming.py --out benchmarks/streaming --work DIR depth

Makes Llamas with random bfloat16 weights, a layer at a time, and runs ``headwise convert`` on them in a process of its
own. Random weights say nothing about accuracy; memory, time and disk are those of a trained model of this shape.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from common import Results, Row, table, threads

from headwise.model.shards import write_index, write_shard

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model's shape, what is done to it, and on how many calibration tokens."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    name: str
    options: dict[str, Any]
    samples: int
    length: int = 128
    words: int = 32000

    def config(self) -> transformers.LlamaConfig:
        config = transformers.LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.words,
            architectures=["LlamaForCausalLM"],
        )
        config.dtype = "bfloat16"
        return config


LLAMA_7B = Case(
    layers=32,
    width=4096,
    hidden=11008,
    heads=32,
    kv_heads=32,
    name="share-kv",
    options={"kv_heads": 8, "grouping": "adjacent", "refit": False},
    samples=4,
)
GROUPED_7B = replace(
    LLAMA_7B, hidden=14336, kv_heads=8, name="latent-kv", options={"rank": 512, "rotary": 128, "refit": False}
)
NARROW = replace(
    LLAMA_7B,
    width=512,
    hidden=1408,
    heads=8,
    kv_heads=8,
    options={"kv_heads": 2, "grouping": "adjacent", "rounds": 0},
    samples=8,
)
CASES = {
    "llama-7b": (LLAMA_7B,),
    "grouped-7b": (GROUPED_7B,),
    "depth": tuple(replace(NARROW, layers=layers) for layers in (2, 8, 16)),
}


def make(case: Case, folder: Path) -> int:
    """Write a checkpoint with random weights, of which one layer is in memory; returns its bytes."""
    folder.mkdir(parents=True)
    config = case.config()
    config.save_pretrained(str(folder))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    generator = torch.Generator().manual_seed(0)
    paths = []
    for part, names in parts.items():
        paths.append(folder / f"model-{part.removesuffix('.weight')}.safetensors")
        write_shard(paths[-1], {name: _random(name, shapes[name], generator) for name in names})
    return write_index(folder, paths)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def watched(command: list[str]) -> Row:
    """Run a command to its end; the most memory that it had, in all and without pages of mapped files."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        text = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = max([anonymous, *(int(line.split()[1]) for line in text.splitlines() if "RssAnon" in line)])
        time.sleep(0.1)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return {
        "peak_gb": usage.ru_maxrss * 1024 / GB,
        "peak_anonymous_gb": anonymous * 1024 / GB,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def measure(case: Case, work: Path) -> Row:
    """Make a model, convert it, and take both away again."""
    source, out = work / "source", work / "out"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    size = make(case, source)
    tokens = np.random.default_rng(0).integers(0, case.words, (case.samples, case.length))
    np.savez(work / "tokens.npz", input_ids=tokens)
    data = {"path": str(work / "tokens.npz")}
    recipe = {
        "task": {"type": "fidelity", "data": data},
        "calibration": {"data": data},
        "passes": [{case.name: case.options}],
        "batch_size": 4,
    }
    (work / "recipe.json").write_text(json.dumps(recipe))
    command = ["convert", str(source), "--recipe", str(work / "recipe.json"), "--out", str(out)]
    found = watched([sys.executable, "-m", "headwise", *command])
    report = json.loads((out / "conversion.json").read_text())
    for folder in (source, out):
        shutil.rmtree(folder)
    seconds = [layer["seconds"] for layer in report["layers"]]
    return {
        **asdict(case),
        "source_gb": size / GB,
        "result_gb": report["bytes"] / GB,
        "stock": report["stock"],
        "seconds_per_layer": float(np.median(seconds)),
        "twin_error": max(entry["twin_error"] for layer in report["layers"] for entry in layer["passes"]),
        **found,
    }


def written(part: Row) -> str:
    """A table of the rows of a part."""
    head = ["model", "pass", "calibration tokens", "before", "after", "peak memory", "without mapped files", "time"]
    return "\n" + table(
        head,
        (
            [
                (
                    f"{row['layers']} layers, width {row['width']}, MLP {row['hidden']}, "
                    f"{row['heads']} query and {row['kv_heads']} kv heads"
                ),
                f"`{row['name']}: {json.dumps(row['options'])}`",
                f"{row['samples'] * row['length']:,}",
                f"{row['source_gb']:.2f} GB",
                f"{row['result_gb']:.2f} GB",
                f"{row['peak_gb']:.2f} GB",
                f"{row['peak_anonymous_gb']:.2f} GB",
                f"{row['seconds'] / 60:.1f} min",
            ]
            for row in part["rows"]
        ),
    )


RESULTS = Results(title="Conversion with one layer in memory", writers=dict.fromkeys(CASES, written))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results, no suffix.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for models of up to 30 GB.")
@click.option("--layers", type=click.IntRange(min=1), help="Other than those of the case.")
@threads
@click.argument("part", type=click.Choice(list(CASES)))
def main(out: Path, work: Path, layers: int | None, threads: int, part: str) -> None:
    """Measure the models of a part."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    work.mkdir(parents=True, exist_ok=True)
    cases = CASES[part] if layers is None else [replace(case, layers=layers) for case in CASES[part]]
    RESULTS.save(out, part, {"rows": [measure(case, work) for case in cases]})


if __name__ == "__main__":
    main()
