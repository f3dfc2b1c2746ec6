"""Fidelity: how closely the outputs follow those of the untouched model. Needs no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from headwise.calibration.data import Table
from headwise.calibration.tasks.base import ARGMAX, OutputMetric, TaskOptions, find_output, no_labels
from headwise.calibration.tasks.examples import Array, Batch, Examples
from headwise.calibration.tasks.inputs import encode_inputs, encode_text, text_column
from headwise.calibration.tasks.similarity import saved_pooling
from headwise.calibration.tasks.tensors import as_tensor, class_logits, fisher_rao, normalised, pool, token_fisher_rao
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint
from headwise.model.forward import of_decoder

_NOT_INPUTS = frozenset({"label", "score"})
"""Label columns of other tasks, so that their data sections work here unchanged."""

_BETWEEN_ROWS = frozenset({"logits_per_image", "logits_per_text"})
"""Scores of every text of a batch with every image of it, which are no property of a sample."""


class FidelityOptions(TaskOptions):
    """Agreement with the untouched model; columns ``text``, ``first`` and ``second``, ``image`` or model inputs."""

    type: Literal["fidelity"] = "fidelity"
    """Always ``fidelity``: it chooses these keys."""
    outputs: tuple[str, ...] | None = None
    """The outputs to compare; by default every output with floating point numbers of one sample."""
    classes: tuple[str, ...] | None = None
    """Outputs that are class scores, whose winning class is compared as well; by default those named like logits."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens per text; by default what tokenizer and model allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityTask:
    """See ``FidelityOptions``. Token states are pooled before they are compared."""

    spec: FidelityOptions

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that the recipe names; empty where it leaves them to the model."""
        return self.spec.outputs or ()

    def roles(self, *, labels: bool = True) -> tuple[str, ...]:
        """None: any column that the model can read will do."""
        del labels
        return ()

    def encode(self, table: Table, checkpoint: Checkpoint, *, labels: bool = True) -> Examples:
        """Two rows per sample for ``first`` and ``second``, else one."""
        del labels
        facts = {"pooling": saved_pooling(checkpoint)}
        if {"first", "second"} <= set(table.columns):
            first, second = text_column(table, "first"), text_column(table, "second")
            texts = [text for pair in zip(first, second, strict=True) for text in pair]
            rows, padding = encode_text(checkpoint, texts, max_length=self.spec.max_length)
            return Examples.of(rows, source=table.source, padding=padding, per_sample=2, facts=facts)
        rows, padding = encode_inputs(table, checkpoint, labels=_NOT_INPUTS, max_length=self.spec.max_length)
        return Examples.of(rows, source=table.source, padding=padding, facts=facts)

    def read(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """A vector per output and row; of class scores also the winning class, of scores per token only that."""
        kept: dict[str, Array] = {}
        for name in self._names(outputs):
            tensor = as_tensor(outputs[name])
            if self._is_classes(name):
                kept[name + ARGMAX] = _winners(tensor, batch)
            if not (self._is_classes(name) and tensor.ndim == 3):
                kept[name] = _vectors(name, tensor, batch).numpy()
        return kept

    def signal(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Vectors of length one; Fisher-Rao coordinates of class scores. All outputs side by side."""
        parts: list[torch.Tensor] = []
        for name in self._names(outputs):
            tensor = outputs[name]
            if not self._is_classes(name):
                parts.append(normalised(_vectors(name, tensor, batch)))
            elif tensor.ndim == 3:
                parts.append(token_fisher_rao(tensor, batch))
            else:
                parts.append(fisher_rao(class_logits(tensor, name)))
        return torch.cat(parts, dim=1)

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, examples: Examples) -> torch.Tensor:
        """There are no labels to compare with."""
        del outputs, batch, examples
        raise no_labels(self.spec.type)

    def metrics(self) -> tuple[OutputMetric, ...]:
        """None of its own: its measurements are the fidelity of every output."""
        return ()

    def metric_input(self, output: str, predictions: Mapping[str, Array], *, custom: bool) -> Array:
        """The vectors themselves."""
        del custom
        vectors: Array = find_output(predictions, output)
        return vectors

    def _names(self, outputs: Mapping[str, Any]) -> list[str]:
        for name in (*(self.spec.outputs or ()), *(self.spec.classes or ())):
            find_output(outputs, name)
        floats = [name for name, values in outputs.items() if _is_float(values) and name not in _BETWEEN_ROWS]
        names = floats if self.spec.outputs is None else list(self.spec.outputs)
        if not names:
            raise DataError(
                "no output of the model holds floating point numbers: " + ", ".join(outputs),
                expected="at least one output to compare",
                fix="let the model return its scores or states",
            )
        return names

    def _is_classes(self, name: str) -> bool:
        return "logits" in name if self.spec.classes is None else name in self.spec.classes


def _is_float(values: Any) -> bool:
    return bool(
        values.is_floating_point() if isinstance(values, torch.Tensor) else np.issubdtype(values.dtype, np.floating)
    )


def _vectors(name: str, tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    if tensor.ndim != 3:
        return tensor.flatten(1)
    return pool(tensor, batch, batch.facts["pooling"], decoder=of_decoder(name))


def _winners(tensor: torch.Tensor, batch: Batch) -> Array:
    """(rows, 1) classes of class scores, (rows, tokens) with -1 at padding of scores per token."""
    scores = tensor if tensor.ndim == 3 else class_logits(tensor, "class scores")[:, None]
    best: Array = scores.argmax(-1).numpy().astype(np.int32)
    valid = batch.valid()
    if tensor.ndim == 3 and valid is not None and valid.shape == best.shape:
        best[~valid] = -1
    best[scores.isnan().any(-1).numpy()] = -1
    return best
