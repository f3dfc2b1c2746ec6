"""How far predictions have moved, without labels: for choosing between candidates on calibration samples."""

from __future__ import annotations

from headwise.calibration.tasks import Examples, Task
from headwise.errors import PlanError
from headwise.gates.measure import Predictions, measure

_WITHOUT_LABELS = ("fidelity", "nats", "agreement")
"""Metrics that need no labels, the finest one first."""


def drift(task: Task, examples: Examples, reference: Predictions, candidate: Predictions) -> tuple[float, str]:
    """How much worse the candidate is, and in what: the mean over outputs of the finest metric that needs no labels.

    Raises:
        PlanError: the task has no such metric.
    """
    found = [m for m in measure(task, examples, reference, candidate) if m.metric in _WITHOUT_LABELS]
    if not found:
        raise PlanError(
            "the outputs of this task cannot be compared without labels",
            expected="embeddings, class logits, or the logits of a language model",
            fix="leave quantize.budget out, and say with quantize.matrices what shall stay as it is",
        )
    metric = next(name for name in _WITHOUT_LABELS if any(m.metric == name for m in found))
    drops = []
    for measurement in found:
        if measurement.metric == metric:
            before, after = measurement.values()
            drops.append(before - after if measurement.higher_is_better else after - before)
    return sum(drops) / len(drops), metric
