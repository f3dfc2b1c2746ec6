"""What became of the neurons of every MLP, as the rows of a table in plans and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwise.model.layout import Layout, ranges
from headwise.pipeline.report.summary import ABSENT, Report

PLANNED = ("MLP", "Before", "After", "Removed (original ids)")
_HEADINGS = (*PLANNED, "Refit error before", "after")
_SHOWN = 6
"""Runs of neighbouring ids that are written out; the others are in report.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronTable:
    """The MLPs of one pass stage.

    Attributes:
        stage: its name.
        headline: how many neurons went.
        headings, rows: one row per MLP.
    """

    stage: str
    headline: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def neuron_tables(report: Report) -> list[NeuronTable]:
    """One table per stage that removed neurons."""
    found = []
    for stage in report["stages"]:
        record = stage.get("record") or {}
        if "plan" not in record or not removes_neurons(record["plan"]):
            continue
        fits = {int(fit["layer"]): fit for fit in record.get("refit") or [] if fit.get("part") == "mlp"}
        rows = [(*row, *_errors(fits.get(index))) for index, row in enumerate(neuron_rows(record))]
        table = NeuronTable(stage=stage["name"], headline=neuron_count(record), headings=_HEADINGS, rows=tuple(rows))
        found.append(table)
    return found


def removes_neurons(plan: Mapping[str, Any]) -> bool:
    """Whether a plan has edits of MLPs."""
    return any(edit["type"] == "drop-neurons" for edit in plan["edits"])


def neuron_count(record: Mapping[str, Any]) -> str:
    """``1024 of 3072 neurons``, from the layouts before and after."""
    before, after = (sum(len(m.neurons) for m in Layout.from_json(record[w]).mlp) for w in ("before", "after"))
    return f"{before - after} of {before} neurons"


def neuron_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Per MLP a row under ``PLANNED``, of a plan or of what a pass did."""
    before, after = (Layout.from_json(record[when]).mlp for when in ("before", "after"))
    notes = record["plan"].get("mlp_notes", {})
    rows: list[tuple[str, ...]] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        kept = set(new.neurons)
        gone = ranges([neuron for neuron in old.neurons if neuron not in kept]).split(" ")
        text = " ".join(gone[:_SHOWN]) + (f" and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else "")
        note = notes.get(str(index))
        words = (text or "none") + (f" ({note})" if note else "")
        rows.append((str(index), str(len(old.neurons)), str(len(new.neurons)), words))
    return rows


def _errors(fit: Mapping[str, Any] | None) -> tuple[str, str]:
    return (ABSENT, ABSENT) if fit is None else (f"{fit['before']:.3g}", f"{fit['after']:.3g}")
