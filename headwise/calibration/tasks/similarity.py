"""Sentence similarity: the cosine of two sentence embeddings against human scores (STS benchmarks)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from headwise.calibration.data import Table
from headwise.calibration.tasks.base import OutputMetric, TaskOptions, check_metric, find_output, no_labels
from headwise.calibration.tasks.examples import Array, Batch, Examples
from headwise.calibration.tasks.inputs import encode_text, text_column
from headwise.calibration.tasks.labels import numbers
from headwise.calibration.tasks.tensors import as_tensor, normalised, pool
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint

Pooling = Literal["mean", "cls", "max"]

EMBEDDING = "embedding"


class SimilarityOptions(TaskOptions):
    """Cosine of sentence embeddings against scores; columns ``first``, ``second``, ``score``."""

    type: Literal["sentence-similarity"]
    """Always ``sentence-similarity``: it chooses these keys."""
    metric: str = "spearman"
    """``spearman``, ``pearson``, or ``module:function`` of (cosines, scores)."""
    higher_is_better: bool = True
    """Direction of a ``module:function`` metric."""
    pooling: Pooling | None = None
    """How token states become an embedding; by default what the checkpoint's 1_Pooling/config.json says, else mean."""
    output: str | None = None
    """The output to pool; by default ``last_hidden_state``, or the only output."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens per sentence; by default the checkpoint's own limit."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return check_metric(metric, ("spearman", "pearson"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityTask:
    """See ``SimilarityOptions``. The judged output is called ``embedding``."""

    spec: SimilarityOptions

    @property
    def outputs(self) -> tuple[str, ...]:
        """The pooled embedding."""
        return (EMBEDDING,)

    def roles(self, *, labels: bool = True) -> tuple[str, ...]:
        """Both sentences, and the score."""
        return ("first", "second", "score") if labels else ("first", "second")

    def encode(self, table: Table, checkpoint: Checkpoint, *, labels: bool = True) -> Examples:
        """Two rows per sample."""
        first, second = text_column(table, "first"), text_column(table, "second")
        texts = [text for pair in zip(first, second, strict=True) for text in pair]
        limit = self.spec.max_length or _saved_length(checkpoint)
        rows, padding = encode_text(checkpoint, texts, max_length=limit)
        return Examples.of(
            rows,
            source=table.source,
            padding=padding,
            per_sample=2,
            labels={EMBEDDING: numbers(table, "score")} if labels else {},
            facts={"pooling": self.spec.pooling or saved_pooling(checkpoint)},
        )

    def read(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """The embedding of every row."""
        name = self._output(outputs)
        return {EMBEDDING: self._embedding({name: as_tensor(outputs[name])}, batch).numpy()}

    def signal(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """The embedding, of length one."""
        return normalised(self._embedding(outputs, batch))

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, examples: Examples) -> torch.Tensor:
        """Squared error between the cosine and the score, scaled to 0..1 over the scores that occur."""
        if EMBEDDING not in examples.labels:
            raise no_labels(self.spec.type)
        scores = examples.labels[EMBEDDING]
        low, high = float(scores.min()), float(scores.max())
        target = (scores[batch.samples] - low) / max(high - low, 1e-12)
        vectors = normalised(self._embedding(outputs, batch))
        cosine = (vectors[0::2] * vectors[1::2]).sum(-1)
        return torch.square(cosine - torch.as_tensor(target, dtype=cosine.dtype, device=cosine.device))

    def metrics(self) -> tuple[OutputMetric, ...]:
        """One metric on the embedding."""
        spec = self.spec
        return (OutputMetric(output=EMBEDDING, metric=spec.metric, higher_is_better=spec.higher_is_better),)

    def metric_input(self, output: str, predictions: Mapping[str, Array], *, custom: bool) -> Array:
        """The cosine of each pair."""
        del custom
        pairs = find_output(predictions, output).astype(np.float64)
        lengths = np.linalg.norm(pairs, axis=-1).prod(axis=-1)
        cosine: Array = (pairs[:, 0] * pairs[:, 1]).sum(-1) / np.where(lengths == 0, np.nan, lengths)
        return cosine

    def _output(self, outputs: Mapping[str, Any]) -> str:
        name = self.spec.output
        if name is None:
            name = next(iter(outputs)) if len(outputs) == 1 else "last_hidden_state"
        find_output(outputs, name)
        return name

    def _embedding(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        name = self._output(outputs)
        states = outputs[name]
        if states.ndim == 2:
            return states
        if states.ndim != 3:
            raise DataError(
                f'output "{name}" has the shape {tuple(states.shape)}',
                expected="token states (rows, tokens, width) or embeddings (rows, width)",
                fix="set task.output to such an output",
            )
        return pool(states, batch, batch.facts["pooling"])


def saved_pooling(checkpoint: Checkpoint) -> Pooling:
    """The pooling that sentence-transformers saved beside the model, mean where there is none.

    Raises:
        DataError: it is a pooling that headwise does not have.
    """
    path = None if checkpoint.folder is None else checkpoint.folder / "1_Pooling" / "config.json"
    if path is None or not path.exists():
        return "mean"
    saved = json.loads(path.read_text())
    modes: dict[str, Pooling] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    modes |= {"max": "max", "max_tokens": "max"}
    flags = [name.removeprefix("pooling_mode_") for name, on in saved.items() if on is True]
    on = [saved["pooling_mode"]] if "pooling_mode" in saved else [name for name in flags if name != "include_prompt"]
    if len(on) != 1 or on[0] not in modes:
        raise DataError(
            f"{path.parent.name}/{path.name} asks for the pooling {' and '.join(on) or 'none'}",
            expected="mean, cls or max",
            fix="set task.pooling to the one that comes closest",
        )
    return modes[on[0]]


def _saved_length(checkpoint: Checkpoint) -> int | None:
    path = None if checkpoint.folder is None else checkpoint.folder / "sentence_bert_config.json"
    if path is None or not path.exists():
        return None
    return json.loads(path.read_text()).get("max_seq_length") or None
