"""Outputs that are compared with a label column: classification, regression, and several such outputs at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from headwise.calibration.data import Table
from headwise.calibration.tasks.base import OutputMetric, TaskOptions, check_metric, find_output, no_labels
from headwise.calibration.tasks.examples import Array, Batch, Examples
from headwise.calibration.tasks.inputs import encode_inputs
from headwise.calibration.tasks.labels import class_ids, numbers
from headwise.calibration.tasks.tensors import as_tensor, class_logits, fisher_rao, single_value
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint
from headwise.spec import Spec


class ClassHead(Spec):
    """An output with one score per class."""

    type: Literal["classification"]
    """Always ``classification``: it chooses these keys."""
    metric: str = "accuracy"
    """``accuracy``, ``f1`` (mean over classes), ``matthews``, or ``module:function`` of (logits, class ids)."""
    higher_is_better: bool = True
    """Direction of a ``module:function`` metric."""
    column: str | None = None
    """Role of the label column; by default the output's name."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of the logits; by default the model's label2id, else sorted names."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return check_metric(metric, ("accuracy", "f1", "matthews"))


class ValueHead(Spec):
    """An output with one number per sample."""

    type: Literal["regression"]
    """Always ``regression``: it chooses these keys."""
    metric: str = "mse"
    """``mse``, ``mae``, ``r2``, ``spearman``, ``pearson``, or ``module:function`` of (values, labels)."""
    higher_is_better: bool = True
    """Direction of a ``module:function`` metric."""
    column: str | None = None
    """Role of the label column; by default the output's name."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return check_metric(metric, ("mse", "mae", "r2", "spearman", "pearson"))


Head = Annotated[ClassHead | ValueHead, Field(discriminator="type")]


class _InputOptions(TaskOptions):
    max_length: int | None = Field(default=None, ge=1)
    """Tokens per text; by default what tokenizer and model allow."""


class ClassificationOptions(_InputOptions, ClassHead):
    """One class per sample; columns ``label`` and the inputs: ``text``, ``text_pair``, ``image`` or model inputs."""

    output: str = "logits"
    """The output with the class scores."""


class RegressionOptions(_InputOptions, ValueHead):
    """One number per sample; columns ``label`` and the inputs: ``text``, ``text_pair``, ``image`` or model inputs."""

    output: str = "logits"
    """The output with the value."""


class MultiOutputOptions(_InputOptions):
    """Several outputs, each with its own labels, metric and verdict."""

    type: Literal["multi-output"]
    """Always ``multi-output``: it chooses these keys."""
    outputs: dict[str, Head]
    """Output name -> what it is and which column it is compared with."""

    @model_validator(mode="after")
    def _some(self) -> MultiOutputOptions:
        if not self.outputs:
            raise ValueError("name at least one output")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsTask:
    """Outputs with label columns.

    Attributes:
        spec: the task's section of the recipe.
        heads: output name -> what it is.
        columns: output name -> role of its label column.
    """

    spec: ClassificationOptions | RegressionOptions | MultiOutputOptions
    heads: Mapping[str, ClassHead | ValueHead]
    columns: Mapping[str, str]

    @classmethod
    def of(cls, spec: ClassificationOptions | RegressionOptions | MultiOutputOptions) -> HeadsTask:
        """The task of a recipe's section."""
        if isinstance(spec, MultiOutputOptions):
            columns = {name: head.column or name for name, head in spec.outputs.items()}
            return cls(spec=spec, heads=spec.outputs, columns=columns)
        return cls(spec=spec, heads={spec.output: spec}, columns={spec.output: spec.column or "label"})

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that have labels."""
        return tuple(self.heads)

    def roles(self, *, labels: bool = True) -> tuple[str, ...]:
        """The label columns; which inputs there are is up to ``data.columns``."""
        return tuple(dict.fromkeys(self.columns.values())) if labels else ()

    def encode(self, table: Table, checkpoint: Checkpoint, *, labels: bool = True) -> Examples:
        """One row per sample."""
        rows, padding = encode_inputs(
            table, checkpoint, labels=set(self.columns.values()), max_length=self.spec.max_length
        )
        found: dict[str, Array] = {}
        facts: dict[str, float] = {}
        for output, head in self.heads.items() if labels else ():
            if isinstance(head, ClassHead):
                config = getattr(checkpoint.module, "config", None)
                id2label = getattr(config, "id2label", None) or {}
                label2id = getattr(config, "label2id", None) or {name: int(i) for i, name in id2label.items()}
                found[output], count = class_ids(table, self.columns[output], classes=head.classes, label2id=label2id)
                facts[f"{output}:highest"] = float(found[output].max())
                if count is not None:
                    facts[f"{output}:classes"] = count
            else:
                found[output] = numbers(table, self.columns[output])
                facts[f"{output}:spread"] = float(found[output].std()) or 1.0
        return Examples.of(rows, source=table.source, padding=padding, labels=found, facts=facts)

    def read(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Class logits and values of every row."""
        kept: dict[str, Array] = {}
        for output, head in self.heads.items():
            raw = as_tensor(find_output(outputs, output))
            if isinstance(head, ClassHead):
                logits = class_logits(raw, output)
                _check_classes(output, logits.shape[1], batch.facts)
                kept[output] = logits.numpy()
            else:
                kept[output] = single_value(raw, output).numpy()
        return kept

    def signal(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Fisher-Rao coordinates of the classes; values over the spread of their labels."""
        parts: list[torch.Tensor] = []
        for output, head in self.heads.items():
            raw = find_output(outputs, output)
            if isinstance(head, ClassHead):
                parts.append(fisher_rao(class_logits(raw, output)))
            else:
                parts.append(single_value(raw, output)[:, None] / batch.facts.get(f"{output}:spread", 1.0))
        return torch.cat(parts, dim=1)

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, examples: Examples) -> torch.Tensor:
        """Cross entropy, and squared error over the variance of the labels; summed over the outputs."""
        losses: list[torch.Tensor] = []
        for output, head in self.heads.items():
            if output not in examples.labels:
                raise no_labels(self.spec.type)
            raw = find_output(outputs, output)
            labels = torch.as_tensor(examples.labels[output][batch.samples], device=raw.device)
            if isinstance(head, ClassHead):
                logits = class_logits(raw, output)
                _check_classes(output, logits.shape[1], batch.facts)
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
            else:
                error = single_value(raw, output) - labels.to(raw.dtype)
                losses.append((error / batch.facts.get(f"{output}:spread", 1.0)).square())
        return torch.stack(losses).sum(0)

    def metrics(self) -> tuple[OutputMetric, ...]:
        """One metric per output."""
        return tuple(
            OutputMetric(output=output, metric=head.metric, higher_is_better=head.higher_is_better)
            for output, head in self.heads.items()
        )

    def metric_input(self, output: str, predictions: Mapping[str, Array], *, custom: bool) -> Array:
        """Class ids (logits for a custom metric), or values."""
        values: Array = find_output(predictions, output)
        if custom or isinstance(self.heads[output], ValueHead):
            return values
        # A NaN logit has no highest class; it must stay visible to the gate.
        return np.where(np.isnan(values).any(axis=-1), np.nan, values.argmax(axis=-1))


def _check_classes(output: str, logits: int, facts: Mapping[str, float]) -> None:
    names, highest = facts.get(f"{output}:classes"), facts.get(f"{output}:highest")
    if names is not None and names != logits:
        raise DataError(
            f'the labels of output "{output}" are {names:.0f} names, but the model has {logits} classes',
            expected="a name for every class, so that names and logits can be matched",
            fix="list all classes in the order of the logits in the recipe's classes",
        )
    if highest is not None and highest >= logits:
        raise DataError(
            f'output "{output}" has {logits} classes, but the labels go up to {highest:.0f}',
            expected=f"class ids from 0 to {logits - 1}",
            fix="check that the label column belongs to this output",
        )
