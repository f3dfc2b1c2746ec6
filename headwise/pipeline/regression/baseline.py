"""The baseline of a regression check: a small JSON file beside the code, with the limits and what was once accepted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from headwise.artifacts import write_atomic
from headwise.errors import DataError, RecipeError
from headwise.gates.judge import GateSpec
from headwise.pipeline.explain import explain
from headwise.pipeline.report.summary import Report, Stage
from headwise.spec import Spec

FORMAT: Literal["headwise.baseline/1"] = "headwise.baseline/1"


class Accepted(Spec):
    """One metric of one output as it was accepted."""

    output: str
    """Name of the output."""
    metric: str
    """Name of the metric."""
    unit: str
    """``points``, ``nats``, or empty for the metric's own unit."""
    value: float | None
    """Of the stage's artifact."""
    drop: float | None
    """How much worse than the untouched model; negative is better."""
    judged: bool
    """Whether the gate had a verdict on it."""


class AcceptedStage(Spec):
    """One stage as it was accepted."""

    name: str
    """As in the report."""
    status: str
    """As in the report: ``passed``, ``warned``, ``rolled-back`` or ``not-run``."""
    metrics: tuple[Accepted, ...] = ()
    """Empty where the stage could not run."""


class Baseline(Spec):
    """What a run is compared with."""

    format: Literal["headwise.baseline/1"] = FORMAT
    """Version of this file."""
    gate: GateSpec
    """The limits. A change to the recipe does not change them; edit them here."""
    samples: str
    """Digest of the samples that were judged on."""
    stages: tuple[AcceptedStage, ...]
    """Every stage of the accepted run."""

    @classmethod
    def of(cls, report: Report, gate: GateSpec) -> Baseline:
        """What a report holds, to be accepted under these limits."""
        stages = tuple(
            AcceptedStage(name=stage["name"], status=stage["status"], metrics=tuple(_accepted(stage)))
            for stage in report["stages"]
        )
        return cls(gate=gate, samples=report["data"]["task"]["digest"], stages=stages)

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read what ``write`` wrote, with whatever limits were edited since.

        Raises:
            DataError: there is no such file, or it is no baseline.
        """
        try:
            values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(values)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise DataError(
                f"no baseline {path}" if missing else f"{path} cannot be read: {error.strerror}",
                expected="the file that an accepted run was written to",
                fix="accept this run with --update, look at the file, and commit it",
            ) from error
        except ValidationError as error:
            found: RecipeError = explain(error, cls, what="baseline")
            raise DataError(f"{path}: {found.found}", expected=found.expected, fix=found.fix) from error
        except ValueError as error:
            raise DataError(
                f"{path} is not JSON ({error})",
                expected=f'a baseline with the format "{FORMAT}"',
                fix="restore it, or delete it and accept a run with --update, under the limits of the recipe",
            ) from error

    def write(self, path: Path) -> None:
        """Write it for people to read and edit.

        Raises:
            StorageError: the file cannot be written.
        """
        write_atomic(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n")


def drop(metric: Mapping[str, Any]) -> float | None:
    """How much worse a metric of a report is than the untouched model's; None where either is missing."""
    if metric.get("value") is None or metric.get("reference") is None:
        return None
    difference = float(metric["reference"]) - float(metric["value"])
    return difference if metric["higher_is_better"] else -difference


def _accepted(stage: Stage) -> list[Accepted]:
    return [
        Accepted(
            output=metric["output"],
            metric=metric["metric"],
            unit=metric["unit"],
            value=metric["value"],
            drop=drop(metric),
            judged=metric["judged"],
        )
        for metric in stage.get("metrics") or []
    ]
