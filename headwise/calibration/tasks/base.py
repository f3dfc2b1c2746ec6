"""What every task shares: its section of the recipe, and the protocol that the rest of headwise talks to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headwise.calibration.data import DataSpec, Table
from headwise.calibration.tasks.examples import Array, Batch, Examples
from headwise.errors import DataError, PlanError, did_you_mean
from headwise.model.checkpoint import Checkpoint
from headwise.spec import Spec

NLL = ":nll"
"""Suffix in predictions: (summed negative log likelihood in nats, tokens) of a row."""
ARGMAX = ":argmax"
"""Suffix in predictions: the highest class of a row, or of each of its tokens, -1 where there is no token."""


class TaskOptions(Spec):
    """What all tasks have in a recipe."""

    data: DataSpec
    """The samples that every stage is judged on."""
    processor: str | None = None
    """Directory or hub id of the tokenizer or image processor; by default the checkpoint's own."""


class Task(Protocol):
    """What a model is for: how samples become inputs, and outputs become numbers that can be judged."""

    @property
    def spec(self) -> TaskOptions:
        """The task's section of the recipe."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the judged outputs; empty when the model decides (``fidelity``)."""

    def roles(self, *, labels: bool = True) -> tuple[str, ...]:
        """Columns that the data must have; those of labels can be left out."""

    def encode(self, table: Table, checkpoint: Checkpoint, *, labels: bool = True) -> Examples:
        """Model inputs for every row of ``table``, with labels unless told otherwise.

        Raises:
            DataError: a column does not fit the model, or a label is unusable.
        """

    def read(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """What a gate keeps of a batch, rows first and small: embeddings, class logits, values, ``NLL``, ``ARGMAX``.

        Raises:
            DataError: the model has no such output, or one of another shape.
        """

    def signal(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """(rows, K), differentiable, without labels: squared distances in it say how far the model has moved."""

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, examples: Examples) -> torch.Tensor:
        """(samples of the batch,) the task's own loss.

        Raises:
            PlanError: the examples have no labels.
        """

    def metrics(self) -> tuple[OutputMetric, ...]:
        """The task's own metric of each output."""

    def metric_input(self, output: str, predictions: Mapping[str, Array], *, custom: bool) -> Array:
        """What the metric of ``output`` reads, samples first; ``custom`` metrics get class logits, not class ids.

        Args:
            output: one of ``outputs``.
            predictions: what ``read`` gave, per sample: (samples, ...), or (samples, per_sample, ...) for several rows.
            custom: whether the metric is the user's own function.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMetric:
    """Which metric judges an output.

    Attributes:
        output: the output's name.
        metric: a metric of headwise, or ``module:function``.
        higher_is_better: direction of a ``module:function`` metric; headwise knows it of its own.
    """

    output: str
    metric: str
    higher_is_better: bool = True


def check_metric(metric: str, known: Sequence[str]) -> str:
    """The metric itself, for pydantic validators: one of ``known`` or ``module:function``."""
    if metric not in known and not all(metric.partition(":")):
        raise ValueError(
            f'no metric of this task is called "{metric}": {did_you_mean(metric, known)}, or module:function'
        )
    return metric


def find_output(outputs: Mapping[str, Any], name: str) -> Any:
    """``outputs[name]``.

    Raises:
        DataError: the model has no such output.
    """
    if name not in outputs:
        raise DataError(
            f'the model has no output called "{name}"',
            expected="one of its outputs: " + ", ".join(outputs),
            fix=did_you_mean(name, outputs),
        )
    return outputs[name]


def no_labels(task: str) -> PlanError:
    """The error of a loss without labels."""
    return PlanError(
        f"the samples of the {task} task have no labels, so there is no loss to take gradients of",
        expected="a score that needs no labels: contribution, gauss-newton, weight-norm or random",
        fix="choose one of these, or give calibration data with labels",
    )
