"""What a recipe becomes for ``--tiny``: every stage, with few samples, on a model of few layers."""

from __future__ import annotations

import re

from headwise.calibration.data import DataSpec
from headwise.gates.judge import GateSpec, Outcome, Verdict, unusable
from headwise.gates.measure import Measurement
from headwise.passes.base import Pass
from headwise.passes.quantize import Quantize
from headwise.pipeline.recipe import Recipe

FOLDER, CHECKPOINT = "tiny", "checkpoint"
"""Names in the folder of a run: of a tiny run, and in it of its model."""
NOT_JUDGED = "not judged: the weights of a tiny model are random"
SAMPLES = 64
"""Enough that some batches are full and the last one is not."""
_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")


def shrink(recipe: Recipe, layers: int) -> Recipe:
    """The recipe for a model with so many attention layers.

    Options with an entry per layer keep their first entries, groups of layers those that are left with two layers, and
    patterns of matrices that name a later layer go. Task and calibration have 64 samples at most.
    """
    task = recipe.task.model_copy(update={"data": _limited(recipe.task.data, SAMPLES)})
    calibration = recipe.calibration
    if calibration is not None:
        changes = {"data": _limited(calibration.data, 4 * SAMPLES), "samples": min(calibration.samples, SAMPLES)}
        calibration = calibration.model_copy(update=changes)
    passes = tuple(_cut(pass_, layers) for pass_ in recipe.passes)
    return recipe.model_copy(update={"task": task, "calibration": calibration, "passes": passes})


def judge_structure(measurement: Measurement, gate: GateSpec, stage: str) -> Verdict:
    """FAIL where there are no usable numbers; otherwise not judged, for the numbers of random weights mean nothing."""
    broken = unusable(measurement, 1)
    return Verdict(
        stage=stage,
        output=measurement.output,
        metric=measurement.metric,
        outcome=Outcome.FAIL if broken else Outcome.NOT_RUN,
        limit=gate.limit_for(measurement.output, measurement.metric),
        samples=len(measurement.candidate),
        reason=broken or NOT_JUDGED,
    )


def _limited(data: DataSpec, rows: int) -> DataSpec:
    return data.model_copy(update={"limit": min(data.limit or rows, rows)})


def _cut(pass_: Pass | Quantize, layers: int) -> Pass | Quantize:
    if isinstance(pass_, Quantize):
        known = {p: f for p, f in pass_.matrices.items() if all(int(n) < layers for n in _NUMBER.findall(p))}
        return pass_.model_copy(update={"matrices": known})
    return pass_.for_layers(layers)
