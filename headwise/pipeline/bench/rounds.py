"""Time graphs, checkpoints and engines against each other: in turn, round by round, each in a process of its own.

All processes are started several times. A process keeps the memory that it got when it started, and the first one gets
more scattered pages than the next: that alone makes one and the same graph a percent or two slower, in every round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.device.bundle import ARCHIVE, ONNX
from headwise.errors import DataError
from headwise.export.random_inputs import Case
from headwise.export.variants import ENGINES
from headwise.gates.cost import device_name
from headwise.gates.speed import Speedup, speed_words
from headwise.pipeline.bench.parent import Child
from headwise.pipeline.folders import bench_graph, dense_graph, is_run, usual_tokens
from headwise.pipeline.graphs import GRAPH
from headwise.pipeline.monitor import Monitor, Silent
from headwise.pipeline.report.document import read_report

Times = NDArray[np.float64]
Orders = NDArray[np.int64]
"""The indices of all variants, by round."""

_TOKENS = 128
_STARTS = 6
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
        rounds: measured calls of each, over all starts.
        warmup: calls of each before that, at every start.
        starts: how often the processes are started anew, in turn in the order given and in the reverse; None: 6 times,
            or as often as there are rounds.
        confidence: of intervals.
    """

    provider: str = "cpu"
    threads: int = 1
    batch: int = 1
    tokens: int | None = None
    past: int | None = None
    vocabulary: int | None = None
    rounds: int = 60
    warmup: int = 5
    starts: int | None = None
    confidence: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What one case took at one start: the shapes of the inputs, and milliseconds by variant and round."""

    shapes: list[Any]
    times: Times


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What one start found out: about the variants, and by case."""

    variants: list[dict[str, Any]]
    cases: dict[str, Case]
    timed: dict[str, _Timed]


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
    times = min(_STARTS, options.rounds) if options.starts is None else options.starts
    if options.rounds < times:
        raise DataError(
            f"{options.rounds} rounds for {times} starts",
            expected="at least one round per start",
            fix="raise --rounds, or lower --starts",
        )
    watcher: Monitor = monitor or Silent()
    watcher.start("bench")
    load = machine_load()
    found = _resolve(artifacts, options.provider)
    usual = min(filter(None, (usual_tokens(Path(path)) for _, path in found)), default=None)
    starts = []
    for number, orders in enumerate(np.array_split(_orders(len(found), options.rounds), times)):
        with ExitStack() as stack:
            children = _start(stack, found, options, watcher, reverse=number % 2 == 1)
            cases = _cases(children, options, usual)
            timed = {name: _time(children, name, case, options, watcher, orders) for name, case in cases.items()}
            variants = [{**child.about, **child.ask("memory"), "artifact": child.label} for child in children]
        starts.append(_Start(variants=variants, cases=cases, timed=timed))
    first = starts[0]
    return {
        "device": device_name(),
        "load": load,
        "provider": options.provider,
        "threads": options.threads,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "starts": times,
        "confidence": options.confidence,
        "variants": [{key: value for key, value in variant.items() if key != "inputs"} for variant in first.variants],
        "cases": [_case(name, case, starts, options.confidence) for name, case in first.cases.items()],
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
        if (path / ARCHIVE).exists():
            raise DataError(
                f"{artifact} is a bundle",
                expected="runs, graphs, checkpoints or engines, or a bundle with --ssh USER@BOARD",
                fix=f"time it with headwise verify {artifact}, or name {path / 'graphs' / ONNX / GRAPH}",
            )
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
    if longest is not None and tokens > longest:
        short = [child.label for child in children if child.about["longest"] == longest]
        raise DataError(
            f"--seq {tokens}, but {', '.join(short)} takes {longest} tokens at most",
            expected=f"a length from 1 to {longest}",
            fix=f"give --seq {longest} or less",
        )
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


def _start(
    stack: ExitStack, found: Sequence[tuple[str, str]], options: BenchOptions, watcher: Monitor, *, reverse: bool
) -> list[Child]:
    """A process for each, in the order of ``found``, started in this order or in the reverse."""
    advance = watcher.work("load", len(found))
    children = {}
    for index in reversed(range(len(found))) if reverse else range(len(found)):
        children[index] = stack.enter_context(Child(*found[index], options.threads, options.provider))
        advance(1)
    return [children[index] for index in range(len(found))]


def _time(
    children: Sequence[Child], name: str, case: Case, options: BenchOptions, watcher: Monitor, orders: Orders
) -> _Timed:
    """One case at one start: every variant once per round, in the orders of the rounds."""
    speaks: Mapping[str, Any] = next((child.about["inputs"] for child in children if child.about["inputs"]), {})
    shapes = [child.ask("prepare", case=asdict(case), others=speaks)["shapes"] for child in children]
    advance = watcher.work(f"{name}, {len(orders)} rounds", len(orders))
    for child in children:
        for _ in range(options.warmup):
            child.ask("call")
    times = np.empty((len(children), len(orders)))
    for number, order in enumerate(orders):
        for index in order:
            times[index, number] = children[index].ask("time")["ms"]
        advance(1)
    return _Timed(shapes=shapes, times=times)


def _orders(count: int, rounds: int) -> Orders:
    """An order for every round: one that is drawn, then its reverse, so that nothing comes first more often."""
    random = np.random.default_rng(0)
    drawn = [random.permutation(count) for _ in range((rounds + 1) // 2)]
    return np.array([order for each in drawn for order in (each, each[::-1])][:rounds])


def _case(name: str, case: Case, starts: Sequence[_Start], confidence: float) -> dict[str, Any]:
    """What all starts say about one case."""
    timed = [start.timed[name] for start in starts]
    variants = starts[0].variants
    results = []
    for index, variant in enumerate(variants):
        own = np.concatenate([each.times[index] for each in timed])
        result = {
            "artifact": variant["artifact"],
            "median_ms": float(np.median(own)),
            "p90_ms": float(np.percentile(own, 90)),
            "inputs": timed[0].shapes[index],
            "speedup": None,
            "verdict": "",
            "times_ms": own.tolist(),
        }
        if index:
            speed = Speedup.of_starts(
                [(each.times[0].tolist(), each.times[index].tolist()) for each in timed], confidence
            )
            # A graph is more than its weights: bytes compare only where both are of one kind.
            alike = variant["runtime"] == variants[0]["runtime"]
            smaller = alike and variant["bytes"] < _SMALLER * variants[0]["bytes"]
            result |= {"speedup": speed.to_json(), "verdict": speed_words(speed, smaller=smaller)}
        results.append(result)
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
