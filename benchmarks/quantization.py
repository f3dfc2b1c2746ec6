"""Quantization, measured: every format on a sentence encoder, its engines, and its speed on a CPU.

Each command writes its part of OUT.json and all of OUT.md; benchmarks/README.md has the details.

    python benchmarks/quantization.py options --out OUT --work DIR --model DIR --train FILE --data DEV_FILE
    python benchmarks/quantization.py formats --out OUT --work DIR --model DIR --train FILE --data TEST_FILE
    python benchmarks/quantization.py others  --out OUT --work DIR --model DIR --train FILE --data TEST_FILE \
        [--graph NAME=FILE]...
    python benchmarks/quantization.py language --out OUT --work DIR --model DIR --train TEXT --data TEXT
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from common import Row, table
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

import headwise
from headwise.calibration.data import DataSpec, load_table, sample
from headwise.calibration.tasks import SimilarityOptions, make_task
from headwise.errors import ExportError
from headwise.export.runners import OrtRunner, TorchRunner
from headwise.gates.cost import device_name, latency
from headwise.gates.measure import measure, predict
from headwise.model.checkpoint import load_checkpoint
from headwise.pipeline.store import installed_version

ALL = ("sm75", "sm86", "sm89", "sm120")
AMPERE, ADA, BLACKWELL = ALL[1:], ALL[2:], ALL[3:]
PLAIN = {"smooth": None, "clip": False, "bias_correction": False}
SEPARATOR = "<|endoftext|>"
HALF = {"prune-heads": {"ratio": 0.5, "score": "contribution"}}
FLOAT = {"matrices": {"*": "float"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row: options of ``quantize`` (None leaves it out), passes before it, targets, and what is not quantized."""

    name: str
    options: Row | None
    before: tuple[Row, ...] = ()
    targets: tuple[str, ...] = ()
    precision: str = "fp16"

    @property
    def passes(self) -> list[Row]:
        return [*self.before, *([] if self.options is None else [{"quantize": self.options}])]


FORMATS = (
    Case(name="fp16", options=None, targets=ALL),
    Case(name="bf16", options=None, targets=AMPERE, precision="bf16"),
    Case(name="int8, absmax, nothing else", options=PLAIN, targets=("sm86",)),
    Case(name="int8", options={}, targets=ALL),
    Case(name="int8, weights only", options={"weights_only": True}, targets=ALL),
    Case(name="fp8", options={"format": "fp8"}, targets=ADA),
    Case(name="fp8, weights only", options={"format": "fp8", "weights_only": True}, targets=ADA),
    Case(name="int4, nearest, nothing else", options={"format": "int4", **PLAIN}, targets=("sm86",)),
    Case(name="int4", options={"format": "int4"}, targets=AMPERE),
    Case(name="int4, gptq", options={"format": "int4", "rounding": "gptq"}, targets=AMPERE),
    Case(name="nvfp4", options={"format": "nvfp4"}, targets=BLACKWELL),
    Case(name="nvfp4, gptq", options={"format": "nvfp4", "rounding": "gptq"}, targets=BLACKWELL),
    Case(
        name="nvfp4, weights only, gptq",
        options={"format": "nvfp4", "weights_only": True, "rounding": "gptq"},
        targets=BLACKWELL,
    ),
    Case(name="mxfp8, weights only", options={"format": "mxfp8"}, targets=ADA),
    Case(name="keys and values in int8", options={**FLOAT, "kv": "int8"}, targets=ALL),
    Case(name="keys and values in fp8", options={**FLOAT, "kv": "fp8"}, targets=ADA),
    Case(name="embeddings in int8", options={**FLOAT, "embeddings": "int8"}, targets=ALL),
    Case(name="int8, embeddings in int8", options={"embeddings": "int8"}, targets=ALL),
    Case(
        name="int4, gptq, embeddings in int4",
        options={"format": "int4", "rounding": "gptq", "embeddings": "int4"},
        targets=AMPERE,
    ),
    Case(
        name="int4, gptq, at most 0.5 points of fidelity",
        options={"format": "int4", "rounding": "gptq", "budget": {"max_drop": 0.5}},
        targets=AMPERE,
    ),
    Case(
        name="int4, gptq, at most 8 MB of matrices",
        options={"format": "int4", "rounding": "gptq", "budget": {"size": 8.0}},
        targets=AMPERE,
    ),
    Case(name="cpu: int8, nothing else", options=PLAIN, targets=("cpu",)),
    Case(name="cpu: int8", options={}, targets=("cpu",)),
    Case(name="cpu: int8, embeddings in int8", options={"embeddings": "int8"}, targets=("cpu",)),
    Case(name="cpu: half of the heads, fp32", options=None, before=(HALF,), targets=("cpu",)),
    Case(name="cpu: half of the heads, int8", options={}, before=(HALF,), targets=("cpu",)),
    *(
        Case(
            name=f"cpu: {share:.0%} of the multiply-accumulates, int8",
            options={},
            before=({"prune": {"macs": share}},),
            targets=("cpu",),
        )
        for share in (0.75, 0.66, 0.5)
    ),
)
OPTIONS = (
    *(Case(name=f"int8, smooth {s}", options={"smooth": s}) for s in (None, 0.5, 0.8, 0.9, "auto")),
    *(Case(name=f"int8, {c}", options={"calibration": c}) for c in ("percentile", "mse", "entropy")),
    *(Case(name=f"fp8, smooth {s}", options={"format": "fp8", "smooth": s}) for s in (None, "auto")),
    *(
        Case(name=f"{f}, smooth {s}, {r}", options={"format": f, "smooth": s, "rounding": r})
        for f in ("int4",)
        for s in (None, "auto")
        for r in ("nearest", "gptq")
    ),
    *(Case(name=f"cpu: int8, smooth {s}", options={"smooth": s}, targets=("cpu",)) for s in (None, "auto")),
)
LANGUAGE = (
    Case(name="fp16", options=None),
    Case(name="int8, nothing else", options=PLAIN),
    Case(name="int8", options={}),
    Case(name="int8, weights only", options={"weights_only": True}),
    Case(name="fp8", options={"format": "fp8"}),
    Case(name="fp8, weights only", options={"format": "fp8", "weights_only": True}),
    Case(name="int4, nearest, nothing else", options={"format": "int4", **PLAIN}),
    Case(name="int4", options={"format": "int4"}),
    Case(name="int4, gptq", options={"format": "int4", "rounding": "gptq"}),
    Case(name="nvfp4", options={"format": "nvfp4"}),
    Case(name="nvfp4, weights only, gptq", options={"format": "nvfp4", "weights_only": True, "rounding": "gptq"}),
    Case(name="keys and values in int8", options={**FLOAT, "kv": "int8"}),
    Case(name="keys and values in fp8", options={**FLOAT, "kv": "fp8"}),
)
JUDGED = 300
"""Documents of the text that judge; as many calibration samples as asked for are drawn from those that follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What every command is given."""

    out: Path
    work: Path
    model: str
    train: Path
    data: Path
    samples: int
    only: tuple[str, ...] = ()

    def source(self, path: Path) -> Row:
        columns = {"first": 5, "second": 6, **({"score": 4} if path == self.data else {})}
        return {"path": str(path), "delimiter": "\t", "header": False, "columns": columns}

    def recipe(self, case: Case) -> Row:
        return {
            "task": {"type": "sentence-similarity", "metric": "spearman", "data": self.source(self.data)},
            "calibration": {"data": self.source(self.train), "samples": self.samples},
            "passes": case.passes,
            "targets": list(case.targets),
            "export": {"precision": case.precision},
            "gate": {"max_drop": 100, "on_fail": "warn"},
        }

    def scores(self, metrics: Mapping[str, Row]) -> Row:
        found = metrics["spearman"]
        drop = found["reference"] - found["value"]
        return {"spearman": found["value"], "drop": drop, "fidelity": metrics["fidelity"]["value"] / 100}


class LanguageInputs(Inputs):
    """The same for a language model and a text file."""

    def recipe(self, case: Case) -> Row:
        documents = self.data.read_text(encoding="utf-8").split(SEPARATOR)
        files = {"judged": documents[:JUDGED], "calibration": documents[JUDGED:]}
        for name, part in files.items():
            (self.work / f"{name}.txt").write_text(SEPARATOR.join(part), encoding="utf-8")
        data = {
            name: {"path": str(self.work / f"{name}.txt"), "format": "text", "separator": SEPARATOR} for name in files
        }
        return {
            **super().recipe(case),
            "task": {"type": "language-modeling", "data": data["judged"]},
            "calibration": {"data": data["calibration"], "samples": self.samples},
            "export": {"precision": case.precision, "cache": False},
        }

    def scores(self, metrics: Mapping[str, Row]) -> Row:
        found = metrics["nats"]
        drop = found["value"] - found["reference"]
        return {"nats": found["value"], "drop": drop, "agreement": metrics["agreement"]["value"] / 100}


def run_case(inputs: Inputs, case: Case) -> Row:
    """One run of the pipeline. Runs that begin alike share a folder, so that what they have in common is made once."""
    folder = inputs.work / "-".join([inputs.data.stem, *(name for entry in case.before for name in entry)])
    found = headwise.compress(inputs.model, inputs.recipe(case), folder)
    stages = {stage["name"]: stage for stage in found.report["stages"]}
    judged = stages["cpu" if "cpu" in stages else "quantize" if "quantize" in stages else case.precision]
    row = {
        "name": case.name,
        "passes": case.passes,
        **(inputs.scores({metric["metric"]: metric for metric in judged["metrics"]}) if judged["metrics"] else {}),
        "graph_mb": judged["cost"]["file_bytes"] / 1e6,
        "latency": judged["cost"].get("latency") if "cpu" in stages else None,
        "scales": (judged.get("record") or {}).get("scales"),
        "kv": (judged.get("record") or {}).get("kv"),
        "engines_mb": {},
        "kernels": {},
    }
    for target in case.targets:
        stage = stages.get(f"engine-{target}")
        if stage is not None and stage.get("cost", {}).get("file_bytes"):
            row["engines_mb"][target] = stage["cost"]["file_bytes"] / 1e6
            kernels = [verdict for verdict in stage["verdicts"] if verdict["gate"] == "kernels"]
            row["kernels"][target] = "; ".join(f"{v['output']} {v['outcome']}, {v['reason']}" for v in kernels)
    rows = (judged.get("record") or {}).get("matrices") or []
    row["float"] = [entry["name"] for entry in rows if entry["scheme"] == "float"]
    return row


def measure_cases(inputs: Inputs, part: str, cases: Iterable[Case]) -> None:
    """Run cases and write after each of them; rows that were measured before are replaced."""
    known = {row["name"]: row for row in load(inputs.out).get(part, {}).get("rows", [])}
    wanted = list(cases)
    for case in wanted:
        if not inputs.only or case.name in inputs.only:
            known[case.name] = run_case(inputs, case)
            print(json.dumps({key: value for key, value in known[case.name].items() if key != "float"}), flush=True)
            save(inputs, part, {"rows": [known[c.name] for c in wanted if c.name in known]})


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration samples, one at a time, as ONNX Runtime's tools want them."""

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self.batches, None)


def measure_others(inputs: Inputs, graphs: Mapping[str, Path]) -> None:
    """What other tools make of the same fp32 graph and calibration samples, judged on the same data."""
    dense = inputs.work / inputs.data.stem / "01-onnx" / "model.onnx"
    checkpoint = load_checkpoint(inputs.model)
    data = DataSpec.model_validate(inputs.source(inputs.data))
    task = make_task(SimilarityOptions(type="sentence-similarity", metric="spearman", data=data))
    examples = task.encode(load_table(data, task.roles()), checkpoint)
    train = load_table(DataSpec.model_validate(inputs.source(inputs.train)), task.roles(labels=False))
    calibration = task.encode(sample(train, inputs.samples, 0), checkpoint, labels=False)
    static = inputs.work / "quantize_static.onnx"
    names = {item.name for item in ort.InferenceSession(dense, providers=["CPUExecutionProvider"]).get_inputs()}
    stored = [{key: value for key, value in batch.inputs.items() if key in names} for batch in calibration.batches(1)]
    arrays = {f"{index}.{key}": value for index, batch in enumerate(stored) for key, value in batch.items()}
    np.savez(inputs.work / "calibration.npz", **arrays)
    if not static.exists():
        quantize_static(dense, static, Reader(stored), quant_format=QuantFormat.QDQ)
    with TorchRunner(checkpoint.module) as runner:
        reference = predict(runner, task, examples)
    one = {key: np.ones((1, 128), array.dtype) for key, array in examples.example_batch().items() if key in names}

    def judged(path: Path) -> Row:
        with OrtRunner(path, integer=True) as runner:
            found = measure(task, examples, reference, predict(runner, task, examples))
        scores = {entry.metric: entry.values() for entry in found}
        with OrtRunner(dense, threads=1) as first, OrtRunner(path, threads=1, integer=True) as second:
            times = latency({"dense": first, "this": second}, one)
        before, after = scores["spearman"]
        ratio = times["this"].median_ms / times["dense"].median_ms
        return {
            "spearman": after,
            "drop": before - after,
            "fidelity": scores["fidelity"][1] / 100,
            "latency": {
                "median_ms": times["this"].median_ms,
                "reference_ms": times["dense"].median_ms,
                "ratio": ratio,
            },
        }

    rows = []
    for name, path in {"onnxruntime quantize_static, defaults": static, **graphs}.items():
        try:
            row = judged(path)
        except ExportError as error:
            row = {"error": error.found.replace(str(path), path.name)[:300]}
        rows.append({"name": name, "graph_mb": path.stat().st_size / 1e6, **row})
        print(json.dumps(rows[-1]), flush=True)
    save(inputs, "others", {"rows": rows})


# -- writing ----------------------------------------------------------------------------------------------------------


def load(out: Path) -> Row:
    path = out.with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else {}


def save(inputs: Inputs, part: str, content: Row) -> None:
    """Put one part into OUT.json, with what is needed to repeat it, and write OUT.md from all parts."""
    parts = load(inputs.out)
    packages = ("headwise", "torch", "transformers", "onnx", "onnxruntime", "tensorrt-rtx")
    versions = {name: installed_version(name) for name in packages}
    parts[part] = {
        "command": shlex.join(["python", *without(sys.argv, "--only")]),
        "versions": {"python": platform.python_version(), **versions},
        "device": device_name(),
        "data": inputs.data.name,
        "samples": inputs.samples,
        **content,
    }
    inputs.out.with_suffix(".json").write_text(json.dumps(parts, indent=1) + "\n")
    texts = [WRITERS[name](parts[name]) + origin(parts[name]) for name in WRITERS if name in parts]
    inputs.out.with_suffix(".md").write_text("# Quantization without training\n\n" + "\n".join(texts))


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Arguments without an option and its values: a part keeps the rows that were measured before."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest)
        else:
            kept.append(argument)
    return kept


def formats_text(part: Row) -> str:
    rows = part["rows"]
    engines = [row for row in rows if not row["name"].startswith("cpu")]
    body = [
        [row["name"], *score(row), *(size(row["engines_mb"].get(target)) for target in ALL), size(row["graph_mb"])]
        for row in engines
    ]
    text = (
        f"## Formats, {part['data']}\n\n"
        "All linear layers in the format unless the name says otherwise; what is not quantized is fp16. Judged: the "
        "graph that the engines are built from, on ONNX Runtime. The drop is in points of Spearman. Fidelity is the "
        "mean cosine between the embeddings of the quantized and of the untouched model. Sizes of engines and graph "
        "in MB; a dash is a target that was not built or has no such format. "
        f"Calibration: {part['samples']} training pairs.\n\n"
    )
    head = ["format", "Spearman", "drop", "fidelity", *(f"{target}" for target in ALL), "graph"]
    text += table(head, body)
    for row in rows:
        if "budget" in str(row["passes"]):
            text += f"\n{row['name']}: {', '.join(row['float']) or 'nothing'} left in fp16.\n"
    pairs = [(row["name"], target, why) for row in rows for target, why in row["kernels"].items()]
    broken = [f"{name}: {target}: {why}" for name, target, why in pairs if "FAIL" in why]
    checked = sum(bool(why) for _, _, why in pairs)
    text += f"\nThe builder's list of kernels was compared with the plan for {checked} engines"
    text += "; these broke it:\n\n" + "".join(f"- {line}\n" for line in broken) if broken else "; all keep it.\n"
    cpu = [row for row in rows if row["name"].startswith("cpu")]
    if cpu:
        text += "\n### Target cpu\n\nOne thread, 1 x 128, median, in one interleaved run with the untouched graph.\n\n"
        text += table(
            ["graph", "Spearman", "drop", "fidelity", "ms", "fp32 ms", "times faster", "graph MB"],
            [[row["name"].removeprefix("cpu: "), *score(row), *speed(row), size(row["graph_mb"])] for row in cpu],
        )
    return text


def options_text(part: Row) -> str:
    return f"## Options, chosen on {part['data']}\n\n" + table(
        ["options", "Spearman", "drop", "fidelity", "scales folded", "explicit"],
        [
            [row["name"], *score(row), *(str((row["scales"] or {}).get(key, "-")) for key in ("folded", "explicit"))]
            for row in part["rows"]
        ],
    )


def others_text(part: Row) -> str:
    return (
        "## Beside it: other tools on the same graph and samples\n\n"
        + table(
            ["tool", "Spearman", "drop", "fidelity", "ms", "fp32 ms", "times faster", "graph MB"],
            [
                [row["name"], *([*score(row), *speed(row)] if "error" not in row else ["-"] * 6), size(row["graph_mb"])]
                for row in part["rows"]
            ],
        )
        + "".join(f"\n{row['name']}: {row['error']}\n" for row in part["rows"] if "error" in row)
    )


def language_text(part: Row) -> str:
    return (
        "## A language model\n\n"
        f"Nats per token on the first {JUDGED} documents; calibration: {part['samples']} windows of those that follow. "
        "Agreement is the share of positions whose most likely next token is that of the untouched model.\n\n"
    ) + table(
        ["format", "nats", "more than untouched", "agreement", "graph MB", "keys and values per channel"],
        [
            [
                row["name"],
                f"{row['nats']:.4f}",
                f"{row['drop']:.4f}",
                f"{row['agreement']:.4f}",
                f"{row['graph_mb']:.3f}",
            ]
            + ([f"{row['kv']['per_channel']} of {row['kv']['tensors']}"] if row["kv"] else ["-"])
            for row in part["rows"]
        ],
    )


WRITERS = {"formats": formats_text, "others": others_text, "options": options_text, "language": language_text}


def score(row: Row) -> list[str]:
    if "spearman" not in row:
        return ["-"] * 3  # no runtime here has the precision
    return [f"{row['spearman']:.2f}", f"{row['drop']:.2f}", f"{row['fidelity']:.4f}"]


def speed(row: Row) -> list[str]:
    this, dense = row["latency"]["median_ms"], row["latency"]["reference_ms"]
    return [f"{this:.1f}", f"{dense:.1f}", f"{dense / this:.2f}"]


def size(megabytes: float | None) -> str:
    return "-" if megabytes is None else f"{megabytes:.1f}"


def origin(part: Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
    return f"\nMeasured on {part['device']} with {versions}:\n\n    {part['command']}\n"


@click.command()
@click.argument("part", type=click.Choice(["options", "formats", "others", "language"]))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the runs; kept.")
@click.option("--model", required=True)
@click.option("--train", type=click.Path(path_type=Path), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="What is judged: dev or test.")
@click.option("--samples", default=512, help="Calibration pairs.")
@click.option("--only", multiple=True, help="Name of a case; all of them without it.")
@click.option("--graph", multiple=True, help="NAME=FILE: a graph of another tool, for the part others.")
def main(part: str, graph: tuple[str, ...], **given: Any) -> None:
    inputs = (LanguageInputs if part == "language" else Inputs)(**given)
    inputs.work.mkdir(parents=True, exist_ok=True)
    if part == "others":
        named = dict(entry.split("=", 1) for entry in graph)
        measure_others(inputs, {name: Path(path) for name, path in named.items()})
    else:
        measure_cases(inputs, part, {"options": OPTIONS, "formats": FORMATS, "language": LANGUAGE}[part])


if __name__ == "__main__":
    main()
