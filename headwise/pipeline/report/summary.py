"""What every form of the report says, as text: the rows of the tables, and numbers with their units.

The terminal, the HTML page and the Markdown file print these rows, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.gates.speed import GATE as SPEED

Report = Mapping[str, Any]
Stage = Mapping[str, Any]

ABSENT = "–"
COSTS = {
    "parameters": "Parameters",
    "macs": "MACs",
    "attention_macs": "Attention MACs",
    "kv_bytes_per_token": "KV per token",
    "kv_bytes_per_prompt_token": "KV per prompt token",
    "kv_bytes_windows": "KV of windows",
    "file_bytes": "Size",
    "latency": "Latency",
}
"""Entries of a stage's ``cost`` with their headings, in the order of the tables."""

GOES_ON = frozenset({"warned", "rolled-back"})
"""Statuses of a stage whose gate said no, after which the recipe says to carry on (``on_fail``)."""
ENGINE_HEADINGS = ("Target", "Runtime", "Size", "Build", "Layers", "Fused attention", "GEMMs by type")

_PROMPT = "kv_bytes_per_prompt_token"
_BYTES = frozenset({"kv_bytes_per_token", "kv_bytes_per_prompt_token", "kv_bytes_windows", "file_bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """One metric of one output at one stage.

    Attributes:
        stage, status: of the stage; several rows may have the same.
        output, metric: what was measured; empty where the stage measured nothing.
        value: with its unit.
        drop: how much worse than the untouched model, with the interval; negative is better.
        limit: the largest drop that the gate allows.
        verdict: the outcome, or ``ABSENT`` where nothing is judged.
        reason: why, where the outcome is not PASS.
    """

    stage: str
    status: str
    output: str = ""
    metric: str = ""
    value: str = ABSENT
    drop: str = ABSENT
    limit: str = ABSENT
    verdict: str = ABSENT
    reason: str = ""


def accuracy_rows(report: Report) -> Iterator[AccuracyRow]:
    """A row for every metric of every stage, and one for a stage that has none."""
    measured_anywhere = (m for stage in report["stages"] for m in stage.get("metrics") or [])
    units = {(m["output"], m["metric"]): m["unit"] for m in measured_anywhere}
    for stage in report["stages"]:
        metrics = stage.get("metrics") or []
        verdicts = {(v["output"], v["metric"]): v for v in stage.get("verdicts") or []}
        measured = {(m["output"], m["metric"]) for m in metrics}
        entries = [(m, verdicts.get((m["output"], m["metric"]))) for m in metrics]
        entries += [(v, v) for key, v in verdicts.items() if key not in measured]
        for metric, verdict in entries:
            yield _accuracy_row(stage, metric, verdict, units.get((metric["output"], metric["metric"]), ""))
        if not entries:
            yield AccuracyRow(stage=stage["name"], status=stage["status"], reason=stage.get("reason") or "")


def _accuracy_row(stage: Stage, metric: Mapping[str, Any], verdict: Mapping[str, Any] | None, unit: str) -> AccuracyRow:
    row = {"stage": stage["name"], "status": stage["status"], "output": metric["output"], "metric": metric["metric"]}
    value = with_unit(metric.get("value"), unit)
    if verdict is None:
        return AccuracyRow(**row, value=value)
    if verdict.get("gate") == SPEED:
        return _speed_row(stage, verdict, row)
    drop = number(verdict.get("difference"), unit)
    interval = [number(end, unit) for end in verdict.get("interval") or (None, None)]
    if ABSENT not in interval:
        drop = f"{drop} [{', '.join(interval)}]"
    outcome = str(verdict["outcome"])
    reason = "" if outcome == "PASS" else verdict.get("reason") or ""
    limit = number(verdict.get("limit"), unit)
    return AccuracyRow(**row, value=value, drop=drop, limit=limit, verdict=outcome, reason=reason)


def _speed_row(stage: Stage, verdict: Mapping[str, Any], row: Mapping[str, str]) -> AccuracyRow:
    """A speedup is no drop: how many times faster, the interval of that, and the least that is wanted."""
    speed = _speed(stage).get("speedup")
    return AccuracyRow(
        **row,
        value=f"{speed['ratio']:.2f}×" if speed else ABSENT,
        drop="[{:.2f}, {:.2f}]".format(*speed["interval"]) if speed else ABSENT,
        limit=f"≥ {verdict['limit']:.2f}",
        verdict=str(verdict["outcome"]),
        reason="" if verdict["outcome"] == "PASS" else verdict["reason"],
    )


def cost_columns(report: Report) -> list[str]:
    """The costs that are not zero at some stage, in the order of ``COSTS``; an encoder has no kv cache.

    What a token of a prompt holds is one of them where it is less than what any token holds.
    """
    stages = report["stages"]
    found = [name for name in COSTS if any(cost(stage, name) for stage in stages)]
    if all(cost(stage, _PROMPT) in (None, cost(stage, "kv_bytes_per_token")) for stage in stages):
        return [name for name in found if name != _PROMPT]
    return found


def cost(stage: Stage, name: str) -> float | None:
    """A cost of a stage as a number (the latency in ms), or None where the stage did not measure it."""
    value = (stage.get("cost") or {}).get(name)
    if name == "latency" and value is not None:
        value = value.get("median_ms")
    return None if value is None else float(value)


def cost_ratio(report: Report, stage: Stage, name: str) -> float | None:
    """A cost as a part of the untouched model's; None for the stage that the others are compared with.

    A latency is compared with the reference of its own interleaved run, everything else with the first stage that
    knows the cost.
    """
    value = cost(stage, name)
    if name == "latency":
        base = ((stage.get("cost") or {}).get("latency") or {}).get("reference_ms")
    else:
        first = next((s for s in report["stages"] if cost(s, name) is not None), stage)
        base = None if first is stage else cost(first, name)
    return value / base if value is not None and base else None


def cost_text(report: Report, stage: Stage, name: str) -> str:
    """For example ``1.21 M 61 %``."""
    value, ratio = cost(stage, name), cost_ratio(report, stage, name)
    if value is None:
        return ABSENT
    return amount(name, value) + ("" if ratio is None else f" {ratio:.0%}".replace("%", "\N{NO-BREAK SPACE}%"))


def amount(name: str, value: float) -> str:
    """A cost with its unit: ``1.2 ms``, ``45.9 MB``, ``22.7 M``; the space between them does not break."""
    if name == "latency":
        return f"{value:.3g}\N{NO-BREAK SPACE}ms"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\N{NO-BREAK SPACE}{prefix}{'B' if name in _BYTES else ''}"
    return f"{value:.0f}" + ("\N{NO-BREAK SPACE}B" if name in _BYTES else "")


def notes(report: Report) -> list[str]:
    """What the numbers rest on: how latencies were measured, budgets spent, and how exact surgery and export were."""
    return [
        *(f"Latency: {note}" for note in _latency_notes(report)),
        *(f"{stage['name']}: {words}" for stage in report["stages"] if (words := _speed(stage).get("verdict"))),
        *_exactness_notes(report),
    ]


def _speed(stage: Stage) -> Mapping[str, Any]:
    """Latency and speedup of a stage; empty where it was not timed."""
    return (stage.get("cost") or {}).get("latency") or {}


def _exactness_notes(report: Report) -> Iterator[str]:
    for stage in report["stages"]:
        record = stage.get("record") or {}
        if record.get("plan", {}).get("summary"):
            yield f"{stage['name']}: {record['plan']['summary']}"
        if record.get("latency"):
            yield f"{stage['name']}: {_budgeted(record['latency'])}"
        if record.get("twin_error") is not None:
            yield f"{stage['name']}: the edited model differs from its exact twin by {record['twin_error']:.1g} at most"
        if record.get("parity"):
            worst = max(entry["max_abs"] for entry in record["parity"])
            shapes = len({entry["shape"] for entry in record["parity"]})
            yield f"{stage['name']}: the graph differs from torch by {worst:.1g} at most, over {shapes} input shapes"
        if record.get("decode"):
            worst = max(entry["max_abs"] for entry in record["decode"]["parity"])
            yield (
                f"{stage['name']}: calls of one token have a graph of their own; it differs from torch by {worst:.1g} "
                "at most"
            )
        if record.get("single"):
            yield f"{stage['name']}: {_single(stage, record['single']['absorbed'])}"
        if record.get("forms"):
            yield f"{stage['name']}: {_forms(record['forms'])}"


def _single(stage: Stage, absorbed: Sequence[str]) -> str:
    """What the graph of single tokens has of a plan; ONNX Runtime has no integer product of one head."""
    found = "calls of one token have a graph of their own, with the same codes and scales"
    if not absorbed:
        return found
    kept = "in fp32, with the numbers of their codes" if stage["name"] == "cpu" else "in codes, for weights only"
    return f"{found}; {len(absorbed)} matrices of latents, which it multiplies queries and outputs with, are {kept}"


def _budgeted(latency: Mapping[str, Any]) -> str:
    """A latency budget: what the table predicted, and what was measured."""
    threads = latency["threads"]
    machine = latency["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
    return (
        f"latency {latency['predicted_ratio']:.1%} predicted, {latency['measured_ratio']:.1%} measured "
        f"({amount('latency', latency['measured_ms'])} of {amount('latency', latency['reference_ms'])}; {machine}, "
        f"{latency['method']})"
    )


def _forms(forms: Mapping[str, Any]) -> str:
    each = "; ".join(
        f"{name} {amount('macs', forms['macs'][name])} MACs, {amount('latency', ms)} on ONNX Runtime"
        for name, ms in forms["latency_ms"].items()
    )
    return f"clustered layers in the {forms['form']} form, because {forms['why']} ({each})"


def _latency_notes(report: Report) -> list[str]:
    """How every distinct latency was measured: a number without its device means nothing."""
    notes: dict[str, None] = {}
    for stage in report["stages"]:
        latency = (stage.get("cost") or {}).get("latency")
        if latency:
            threads = latency.get("threads")
            parts = [
                latency.get("device"),
                f"{threads} thread{'s' * (threads > 1)}" if threads else None,
                latency.get("method"),
            ]
            notes[", ".join(str(part) for part in parts if part)] = None
    return list(notes)


def with_unit(value: float | None, unit: str) -> str:
    """A metric's value for reading; points of 100 go without a unit, as everyone writes accuracies."""
    text = number(value, unit)
    return text if unit in ("", "points") or text == ABSENT else f"{text}\N{NO-BREAK SPACE}{unit}"


def number(value: float | None, unit: str = "") -> str:
    """A metric's value or difference: two decimals for points, four for everything else."""
    if value is None or math.isnan(value):
        return ABSENT
    text = f"{value:.2f}" if unit == "points" else f"{value:.4f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def seconds(value: float | None) -> str:
    """``0.4 s``, ``12 s``, ``2 min 5 s``."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f}\N{NO-BREAK SPACE}s" if value < 10 else f"{value:.0f}\N{NO-BREAK SPACE}s"
    return f"{int(value) // 60}\N{NO-BREAK SPACE}min {int(value) % 60}\N{NO-BREAK SPACE}s"


def problems(report: Report) -> list[tuple[str, str]]:
    """(stages, reason) of everything that did not simply pass; stages with the same reason are named together."""
    found: dict[str, list[str]] = {}
    for stage in report["stages"]:
        for reason in _reasons(stage):
            found.setdefault(reason, []).append(stage["name"])
    return [(", ".join(stages), reason) for reason, stages in found.items()]


def _reasons(stage: Stage) -> list[str]:
    """Reasons of the verdicts, after the outputs that they are about; the stage's own where that says more."""
    outputs: dict[str, list[str]] = {}
    for verdict in stage.get("verdicts") or []:
        if verdict["outcome"] != "PASS":
            named = outputs.setdefault(verdict.get("reason") or verdict["outcome"], [])
            if verdict["outcome"] != "NOT RUN":
                named.append(f"{verdict['output']} {verdict['metric']}")
    reasons = [f"{', '.join(named)}: {reason}" if named else reason for reason, named in outputs.items()]
    own = stage.get("reason")
    if own and stage["status"] != "passed" and (not reasons or stage["status"] in ("error", "interrupted")):
        reasons.append(own)
    return reasons


def engine_rows(report: Report) -> list[tuple[str, ...]]:
    """One row per engine that was built, under ``ENGINE_HEADINGS``."""
    rows: list[tuple[str, ...]] = []
    for stage in report["stages"]:
        engine = stage.get("engine")
        if not engine:
            continue
        sm = f"sm{engine['sm']}"
        name = engine["target"] + ("" if engine["target"] == sm else f" ({sm})")
        rows.append(_engine_row(name, engine))
        if engine.get("decode_engine"):
            rows.append(_engine_row(f"{name}, single tokens", engine["decode_engine"]))
    return rows


def _engine_row(name: str, engine: Mapping[str, Any]) -> tuple[str, ...]:
    listing = engine.get("listing") or {}
    gemms = ", ".join(f"{count} {dtype}" for dtype, count in (listing.get("gemms") or {}).items())
    return (
        name,
        f"{engine['runtime']} {engine['version']}",
        amount("file_bytes", engine["bytes"]),
        seconds(engine["seconds"]),
        str(listing.get("layers", ABSENT)),
        str(listing.get("fused_attention", ABSENT)),
        gemms or ABSENT,
    )
