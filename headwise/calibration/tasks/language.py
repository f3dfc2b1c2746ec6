"""Language modeling: how well a causal model predicts text, in nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from headwise.calibration.data import Table
from headwise.calibration.tasks.base import ARGMAX, NLL, OutputMetric, TaskOptions, check_metric, find_output
from headwise.calibration.tasks.examples import Array, Batch, Examples, Row
from headwise.calibration.tasks.inputs import text_column, token_limit
from headwise.calibration.tasks.tensors import as_tensor, token_fisher_rao
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint

_DEFAULT_WINDOW = 512


class LanguageOptions(TaskOptions):
    """Next-token prediction; column ``text``."""

    type: Literal["language-modeling"]
    """Always ``language-modeling``: it chooses these keys."""
    metric: str = "nats"
    """``nats`` per token, ``perplexity``, or ``module:function`` of ((nats, tokens) per window, None)."""
    higher_is_better: bool = False
    """Direction of a ``module:function`` metric."""
    output: str = "logits"
    """The output with one score per token of the vocabulary."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens in a window; by default what tokenizer and model allow, but at most 512."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return check_metric(metric, ("nats", "perplexity"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageTask:
    """See ``LanguageOptions``. A sample is a window: a document, or a piece of one that is longer."""

    spec: LanguageOptions

    @property
    def outputs(self) -> tuple[str, ...]:
        """The next-token logits."""
        return (self.spec.output,)

    def roles(self, *, labels: bool = True) -> tuple[str, ...]:
        """The text, which is its own label."""
        del labels
        return ("text",)

    def encode(self, table: Table, checkpoint: Checkpoint, *, labels: bool = True) -> Examples:
        """Every document with the tokens that the tokenizer puts around it; long ones in windows.

        Consecutive windows share one token, so that every token but a document's first is predicted exactly once.
        """
        del labels
        tokenizer = checkpoint.tokenizer()
        limit = token_limit(checkpoint, tokenizer, self.spec.max_length)
        length = limit if limit is not None and self.spec.max_length else min(limit or _DEFAULT_WINDOW, _DEFAULT_WINDOW)
        documents = tokenizer(text_column(table, "text"), truncation=False, verbose=False)["input_ids"]
        windows = [ids[at : at + length] for ids in documents for at in range(0, max(len(ids) - 1, 0), length - 1)]
        rows: list[Row] = [self._row(window) for window in windows if len(window) > 1]
        padding = {"input_ids": float(tokenizer.pad_token_id or 0), "attention_mask": 0.0}
        return Examples.of(rows, source=table.source, padding=padding)

    @staticmethod
    def _row(window: list[int]) -> Row:
        ids = np.asarray(window, dtype=np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def read(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Summed nats and predicted tokens of each window, and the likeliest token at each position."""
        name = self.spec.output
        logits = self._logits(as_tensor(find_output(outputs, name)))
        nats, counts = self._nats(logits, batch)
        best = logits.argmax(-1).numpy().astype(np.int32)
        broken = logits.isnan().any(-1).numpy()
        best[broken | ~self._valid(batch)] = -1
        return {name + NLL: np.stack([nats.double().numpy(), counts.numpy()], axis=1), name + ARGMAX: best}

    def signal(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Fisher-Rao coordinates of the next-token distributions, averaged over the tokens of a window."""
        return token_fisher_rao(self._logits(find_output(outputs, self.spec.output)), batch)

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, examples: Examples) -> torch.Tensor:
        """Mean nats per token of each window."""
        del examples
        nats, counts = self._nats(self._logits(find_output(outputs, self.spec.output)), batch)
        return nats / counts

    def metrics(self) -> tuple[OutputMetric, ...]:
        """One metric on the logits."""
        spec = self.spec
        return (OutputMetric(output=spec.output, metric=spec.metric, higher_is_better=spec.higher_is_better),)

    def metric_input(self, output: str, predictions: Mapping[str, Array], *, custom: bool) -> Array:
        """(windows, 2): summed nats and tokens."""
        del custom
        windows: Array = find_output(predictions, output + NLL)
        return windows

    def _logits(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.ndim != 3:
            raise DataError(
                f'output "{self.spec.output}" has the shape {tuple(logits.shape)}',
                expected="scores over the vocabulary at every token: (rows, tokens, vocabulary)",
                fix="use a causal language model, or set task.output",
            )
        return logits

    def _nats(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows,) summed negative log likelihood of the next tokens, and how many there are."""
        targets = torch.as_tensor(batch.inputs["input_ids"], device=logits.device)[:, 1:]
        predicted = torch.as_tensor(self._valid(batch), device=logits.device)[:, 1:]
        flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
        nats = flat.reshape(targets.shape).masked_fill(~predicted, 0.0)
        return nats.sum(1), predicted.sum(1)

    @staticmethod
    def _valid(batch: Batch) -> Array:
        valid = batch.valid()
        return np.ones(batch.inputs["input_ids"].shape, dtype=bool) if valid is None else valid
