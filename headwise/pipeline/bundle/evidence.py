"""What a bundle says about accuracy and cost: copied from the report, with where each was measured, without paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwise.pipeline.bundle.parts import Parts
from headwise.pipeline.report.summary import Report, Stage


def evidence(report: Report, parts: Parts) -> dict[str, Any]:
    """The outcome of the run, its data by name and digest, and every stage whose result is in the bundle."""
    checkpoint, device = report["checkpoint"], report["environment"]["device"]
    if checkpoint["folder"] is not None:
        checkpoint = {**checkpoint, "source": Path(checkpoint["source"]).name, "folder": None}
    return {
        **{key: report[key] for key in ("outcome", "reason", "data", "environment")},
        "checkpoint": checkpoint,
        **{key: report["recipe"][key] for key in ("gate", "passes", "export")},
        "stages": [_stage(stage, device) for stage in parts.used],
    }


def _stage(stage: Stage, device: str) -> dict[str, Any]:
    copied = {key: stage[key] for key in ("name", "kind", "status", "reason", "metrics", "verdicts", "cost")}
    engine = stage["engine"]
    where = device if engine is None else f"GPU of sm{engine['sm']}, {engine['runtime']} {engine['version']}"
    return {**copied, "measured_on": where if stage["metrics"] else None}
