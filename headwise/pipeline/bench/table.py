"""What a comparison of speeds found, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.pipeline.bench.rounds import case_words
from headwise.pipeline.report.summary import ABSENT, amount

_BUSY = 0.5
_WARNING = (
    "This machine was busy ({:.1f} processes per core before the start): long calls are interrupted more often than "
    "short ones, which flatters whatever is faster. Measure again on an idle one."
)


def bench_table(found: Mapping[str, Any]) -> RenderableType:
    """Tables of times, one of memory, and in words how each compares with the first."""
    parts: list[RenderableType] = []
    for case in found["cases"]:
        table = Table(box=box.SIMPLE_HEAD, title=case_words(case), title_justify="left", title_style="bold")
        for heading in ("", "Median", "p90"):
            table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
        for result in case["results"]:
            times = (amount("latency", result[key]) for key in ("median_ms", "p90_ms"))
            table.add_row(result["artifact"], *times)
        parts.append(table)
        parts += [Text(f"{r['artifact']}: {r['verdict']}") for r in case["results"] if r["verdict"]]
    memory = Table(box=box.SIMPLE_HEAD, title="Size and memory", title_justify="left", title_style="bold")
    for heading in ("", "Runtime", "Size", "Peak memory", "of it the model"):
        numbers = heading not in ("", "Runtime")
        memory.add_column(heading, justify="right" if numbers else "left", overflow="fold", no_wrap=bool(heading))
    for variant in found["variants"]:
        sizes = (variant[key] for key in ("bytes", "peak_bytes", "model_bytes"))
        cells = (ABSENT if size is None else amount("file_bytes", size) for size in sizes)
        memory.add_row(variant["artifact"], f"{variant['runtime']} {variant['version']}", *cells)
    parts += [memory, Text(how(found), style="dim")]
    if (found["load"] or 0) > _BUSY:
        parts.append(Text(_WARNING.format(found["load"]), style="yellow"))
    return Group(*parts)


def how(found: Mapping[str, Any]) -> str:
    """What the numbers rest on."""
    threads, starts = found["threads"], found["starts"]
    devices = {variant["device"] for variant in found["variants"]}
    device = ", ".join(found["device"] if name == "cpu" else name for name in sorted(devices))
    return (
        f"{device}; {threads} thread{'s' * (threads > 1)} each; {found['rounds']} rounds over {starts} "
        f"start{'s' * (starts > 1)}, {found['warmup']} calls to warm up at each; one timed call of each per round, in "
        "an order drawn for the round or its reverse; memory is that of the CPU."
    )
