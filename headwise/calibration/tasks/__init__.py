"""Tasks: what a model is for. A task turns a table into model inputs, and outputs into numbers that can be judged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from headwise.calibration.tasks.base import ARGMAX, NLL, OutputMetric, Task, TaskOptions
from headwise.calibration.tasks.examples import Batch, Examples
from headwise.calibration.tasks.fidelity import FidelityOptions, FidelityTask
from headwise.calibration.tasks.heads import (
    ClassificationOptions,
    HeadsTask,
    MultiOutputOptions,
    RegressionOptions,
)
from headwise.calibration.tasks.language import LanguageOptions, LanguageTask
from headwise.calibration.tasks.similarity import SimilarityOptions, SimilarityTask

TaskSpec = Annotated[
    SimilarityOptions
    | ClassificationOptions
    | RegressionOptions
    | MultiOutputOptions
    | LanguageOptions
    | FidelityOptions,
    Field(discriminator="type"),
]

__all__ = [
    "ARGMAX",
    "NLL",
    "Batch",
    "ClassificationOptions",
    "Examples",
    "FidelityOptions",
    "LanguageOptions",
    "MultiOutputOptions",
    "OutputMetric",
    "RegressionOptions",
    "SimilarityOptions",
    "Task",
    "TaskOptions",
    "TaskSpec",
    "make_task",
]


def make_task(spec: TaskOptions) -> Task:
    """The task that a recipe's ``task`` section describes."""
    match spec:
        case SimilarityOptions():
            return SimilarityTask(spec=spec)
        case ClassificationOptions() | RegressionOptions() | MultiOutputOptions():
            return HeadsTask.of(spec)
        case LanguageOptions():
            return LanguageTask(spec=spec)
        case FidelityOptions():
            return FidelityTask(spec=spec)
    raise TypeError(f"{type(spec).__name__} is not a task")
