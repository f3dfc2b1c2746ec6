"""How long a call takes on this device, and how much memory that needs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from headwise.device.arrays import Arrays
from headwise.device.checks import PASS, Check
from headwise.device.machine import peak_memory

WARMUP = 5


def latency(run: Callable[[Arrays], object], feed: Arrays, rounds: int) -> Check:
    """Percentiles of the wall time of one call on host arrays; for an engine with the copies to and from the GPU.

    Args:
        run: the artifact.
        feed: inputs of every call.
        rounds: measured calls, after some to warm up.
    """
    for _ in range(WARMUP):
        run(feed)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(feed)
        times.append(1e3 * (time.perf_counter() - start))
    points = {f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 90, 99)}
    size = "x".join(map(str, next(iter(feed.values())).shape))
    text = ", ".join(f"{name.removesuffix('_ms')} {value:.3g} ms" for name, value in points.items())
    return Check(
        name="latency",
        outcome=PASS,
        found=f"{text} over {rounds} calls, first input {size}",
        values={**points, "rounds": rounds, "warmup": WARMUP, "input": size},
    )


def memory(device_bytes: int | None) -> Check:
    """The peak of the process, and what the engine took of the device memory; None without a GPU."""
    peak = peak_memory()
    parts = [] if peak is None else [f"peak of the process {peak / 2**20:,.0f} MiB"]
    parts += [] if device_bytes is None else [f"device memory of the engine {device_bytes / 2**20:,.0f} MiB"]
    values = {"peak_bytes": peak, "device_bytes": device_bytes}
    return Check(name="memory", outcome=PASS, found=", ".join(parts) or "not told by this system", values=values)
