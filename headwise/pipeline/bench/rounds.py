"""Time graphs, checkpoints and engines against each other: in turn, round by round, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from headwise.errors import DataError
from headwise.export.random_inputs import Case
from headwise.export.variants import ENGINES
from headwise.gates.cost import device_name
from headwise.gates.speed import Speedup, speed_words
from headwise.pipeline.bench.parent import Child
from headwise.pipeline.folders import bench_graph, dense_graph, is_run, usual_tokens
from headwise.pipeline.monitor import Monitor, Silent
from headwise.pipeline.report.document import read_report

_TOKENS = 128
_SMALLER = 0.99
"""A model counts as smaller from one percent on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How to measure.

    Attributes:
        provider: ``cpu``, ``cuda`` or ``tensorrt``, of graphs and checkpoints; engines run on the GPU.
        threads: CPU threads of each.
        batch: rows.
        tokens: of an input; None for 128, or what the models can take.
        past: tokens in the cache of a decoder when it adds one; None for as many as ``tokens``.
        vocabulary: where the models do not say it.
        rounds: measured calls of each.
        warmup: calls of each before that.
        confidence: of intervals.
    """

    provider: str = "cpu"
    threads: int = 1
    batch: int = 1
    tokens: int | None = None
    past: int | None = None
    vocabulary: int | None = None
    rounds: int = 50
    warmup: int = 5
    confidence: float = 0.95


def bench(artifacts: Sequence[str], options: BenchOptions, *, monitor: Monitor | None = None) -> dict[str, Any]:
    """Time things against the first of them; plain data, see docs/speed.md.

    Args:
        artifacts: folders of runs (their graphs), checkpoints (in PyTorch), files ``.onnx``, engines. A single run is
            compared with the untouched model's graph.
        options: how.
        monitor: receives progress.

    Raises:
        HeadwiseError: something cannot be loaded or run here, or there is nothing to compare.
    """
    watcher: Monitor = monitor or Silent()
    watcher.start("bench")
    load = machine_load()
    found = _resolve(artifacts, options.provider)
    usual = min(filter(None, (usual_tokens(Path(path)) for _, path in found)), default=None)
    with ExitStack() as stack:
        advance = watcher.work("load", len(found))
        children = []
        for label, path in found:
            children.append(stack.enter_context(Child(label, path, options.threads, options.provider)))
            advance(1)
        cases = [
            _time(children, name, case, options, watcher) for name, case in _cases(children, options, usual).items()
        ]
        variants = [{**child.about, **child.ask("memory"), "artifact": child.label} for child in children]
    return {
        "device": device_name(),
        "load": load,
        "provider": options.provider,
        "threads": options.threads,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "confidence": options.confidence,
        "variants": [{key: value for key, value in variant.items() if key != "inputs"} for variant in variants],
        "cases": cases,
    }


def machine_load() -> float | None:
    """Processes per core that want to run, over the last minute; None where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None


def _resolve(artifacts: Sequence[str], provider: str) -> list[tuple[str, str]]:
    """(label, what is run) of everything; a run stands for its graph."""
    found: list[tuple[str, str]] = []
    for artifact in artifacts:
        path = Path(artifact)
        if is_run(path):
            report = read_report(path)
            if len(artifacts) == 1:
                found.append((f"{artifact} (untouched)", str(dense_graph(path, report))))
            found.append((artifact, str(bench_graph(path, report, provider))))
            continue
        if path.suffix in {".onnx", *ENGINES} and not path.exists():
            raise DataError(f"{artifact} does not exist", expected="a graph or an engine", fix="check the path")
        found.append((artifact, artifact))
    if len(found) < 2:
        raise DataError(
            f"only {', '.join(artifacts) or 'nothing'} to time",
            expected="two things to compare, or one run, which is compared with its untouched model",
            fix="name a second graph, checkpoint, engine or run",
        )
    return found


def _cases(children: Sequence[Child], options: BenchOptions, usual: int | None) -> dict[str, Case]:
    """What is timed: a forward pass, or where all keep a cache the prompt and one token behind it."""
    longest = min((child.about["longest"] for child in children if child.about["longest"]), default=None)
    tokens = options.tokens or usual or min(_TOKENS, longest or _TOKENS)
    known = [child.about["vocabulary"] for child in children if child.about["vocabulary"]]
    case = Case(batch=options.batch, tokens=tokens, vocabulary=options.vocabulary or min(known, default=None))
    past = tokens if options.past is None else options.past
    if not all(child.about["cached"] for child in children):
        if options.past is not None:
            without = [child.label for child in children if not child.about["cached"]]
            raise DataError(
                f"--past {options.past}, but {', '.join(without)} runs without a cache here",
                expected="graphs with a cache, or checkpoints of decoders that keep one",
                fix="leave --past out: whole sequences can be timed",
            )
        return {"forward": case}
    return {"prefill": replace(case, past=0), "step": replace(case, tokens=1, past=past)}


def _time(children: Sequence[Child], name: str, case: Case, options: BenchOptions, watcher: Monitor) -> dict[str, Any]:
    """One case: every variant once per round, in an order that is drawn for each round."""
    speaks: Mapping[str, Any] = next((child.about["inputs"] for child in children if child.about["inputs"]), {})
    shapes = [child.ask("prepare", case=asdict(case), others=speaks)["shapes"] for child in children]
    advance = watcher.work(f"{name}, {options.rounds} rounds", options.rounds)
    for child in children:
        for _ in range(options.warmup):
            child.ask("call")
    random = np.random.default_rng(0)
    times = np.empty((len(children), options.rounds))
    for number in range(options.rounds):
        for index in random.permutation(len(children)):
            times[index, number] = children[index].ask("call")["ms"]
        advance(1)
    first = children[0]
    results = []
    for child, own, shape in zip(children, times, shapes, strict=True):
        speed = Speedup.of(times[0].tolist(), own.tolist(), options.confidence)
        smaller = child.about["bytes"] < _SMALLER * first.about["bytes"]
        results.append(
            {
                "artifact": child.label,
                "median_ms": float(np.median(own)),
                "p90_ms": float(np.percentile(own, 90)),
                "inputs": shape,
                "speedup": None if child is first else speed.to_json(),
                "verdict": "" if child is first else speed_words(speed, smaller=smaller),
                "times_ms": own.tolist(),
            }
        )
    return {"name": name, "batch": case.batch, "tokens": case.tokens, "past": case.past, "results": results}


def case_words(case: Mapping[str, Any]) -> str:
    """``forward, batch 1, 128 tokens``: what was timed, from the sizes that the inputs really had."""
    sizes = {tuple(shape) for result in case["results"] for shape in result["inputs"].values()}
    parts = [case["name"], f"batch {case['batch']}"]
    if any(case["tokens"] in shape[1:] for shape in sizes):
        parts.append(f"{case['tokens']} token{'s' * (case['tokens'] > 1)}")
    if case["past"]:
        parts.append(f"{case['past']} in the cache")
    return ", ".join(parts)
