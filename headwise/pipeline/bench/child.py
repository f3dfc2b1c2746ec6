"""The process of one thing that is timed: ``python -m headwise.pipeline.bench.child SPEC``.

A process of its own gives every variant its own threads and its own peak of memory. It reads one JSON order per line
and answers each with one line; it does nothing in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from headwise.device.arrays import Port
from headwise.errors import HeadwiseError
from headwise.export.random_inputs import Case
from headwise.export.variants import Variant, open_variant

Answer = dict[str, Any]


def main() -> None:
    """Serve orders until there are no more; whatever libraries print goes to the error output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    # A parent that was interrupted reads no answers any more.
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        spec = json.loads(sys.argv[1])
        served = Served(**spec)
        for line in sys.stdin:
            answers.write(json.dumps(_caught(served.answer, json.loads(line))) + "\n")


class Served:
    """A variant, and what can be asked of it; the first order is to load it."""

    def __init__(self, artifact: str, threads: int, provider: str) -> None:
        self._open = partial(open_variant, artifact, threads=threads, provider=provider)
        self._before = memory("VmRSS")

    def answer(self, order: Mapping[str, Any]) -> Answer:
        """Carry an order out."""
        orders = {
            "load": self._load,
            "prepare": self._prepare,
            "call": self._call,
            "time": self._time,
            "memory": self._memory,
        }
        return orders[order["do"]](order)

    def _load(self, order: Mapping[str, Any]) -> Answer:
        """What the parent has to know about it."""
        del order
        start = time.perf_counter()
        self._variant: Variant = self._open()
        seconds = time.perf_counter() - start
        variant = self._variant
        names = ("runtime", "version", "device", "vocabulary", "cached", "longest", "bytes")
        inputs = {name: [port.dtype, list(port.dims)] for name, port in variant.inputs.items()}
        return {**{name: getattr(variant, name) for name in names}, "inputs": inputs, "load_seconds": seconds}

    def _prepare(self, order: Mapping[str, Any]) -> Answer:
        others = {name: Port(dtype, tuple(dims)) for name, (dtype, dims) in order["others"].items()}
        return {"shapes": self._variant.prepare(Case(**order["case"]), others)}

    def _call(self, order: Mapping[str, Any]) -> Answer:
        del order
        self._variant.reset()
        self._variant.call()
        return {}

    def _time(self, order: Mapping[str, Any]) -> Answer:
        """A call behind one that is not timed: that one finds the caches as another process left them."""
        self._call(order)
        self._variant.reset()
        start = time.perf_counter()
        self._variant.call()
        return {"ms": 1e3 * (time.perf_counter() - start)}

    def _memory(self, order: Mapping[str, Any]) -> Answer:
        del order
        peak, before = memory("VmHWM"), self._before
        return {
            "peak_bytes": peak,
            "model_bytes": None if peak is None or before is None else max(0, peak - before),
        }


def memory(entry: str) -> int | None:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (at its highest) of this process; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)


def _caught(work: Callable[[Mapping[str, Any]], Answer], order: Mapping[str, Any]) -> Answer:
    """An answer, or the error in its place."""
    try:
        return work(order)
    except HeadwiseError as error:
        return {"error": [type(error).__name__, error.found, error.expected, error.fix]}
    except Exception as error:  # anything that a model can raise
        traceback.print_exc()
        return {"error": [None, f"{type(error).__name__}: {error}".strip(), "", ""]}


if __name__ == "__main__":
    main()
