"""Small functions on model outputs that several tasks share; shapes: R rows, T tokens, D width, C classes."""

from __future__ import annotations

import numpy as np
import torch

from headwise.calibration.tasks.examples import Array, Batch
from headwise.errors import DataError


def pool(states: torch.Tensor, batch: Batch, how: str = "mean", *, decoder: bool = True) -> torch.Tensor:
    """(R, T, D) token states -> (R, D) over the real tokens: their mean, their maximum, or the first one (``cls``).

    ``decoder`` says whose tokens they are where a model has an encoder and a decoder.
    """
    valid = _token_mask(states, batch, decoder=decoder)
    if how == "cls":
        return states[torch.arange(len(states), device=states.device), valid.int().argmax(1)]
    if how == "max":
        return states.masked_fill(~valid[..., None], -torch.inf).amax(1)
    weights = valid[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def normalised(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length one along the last axis."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def fisher_rao(logits: torch.Tensor) -> torch.Tensor:
    """``2 sqrt(softmax(logits))``: squared distances in it are Fisher information, J^T J of it the Fisher matrix.

    The square root is taken in the log domain, which keeps the gradient finite where a probability underflows.
    """
    return 2 * torch.exp(0.5 * torch.log_softmax(logits, dim=-1))


def token_fisher_rao(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(R, T, C) logits -> (R, T * C): Fisher-Rao coordinates of real tokens, averaged over them; zero at padding."""
    valid = _token_mask(logits, batch).to(logits.dtype)
    scale = (valid / valid.sum(1, keepdim=True).clamp(min=1)).sqrt()
    return (fisher_rao(logits) * scale[..., None]).flatten(1)


def class_logits(logits: torch.Tensor, output: str) -> torch.Tensor:
    """(R, C) logits. A single logit z, (R,) or (R, 1), becomes the pair (0, z), whose softmax is its sigmoid.

    Raises:
        DataError: the output has another shape.
    """
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2:
        raise DataError(
            f'output "{output}" has the shape {tuple(logits.shape)}',
            expected="one vector of class scores per row",
            fix="choose an output with one prediction per sample",
        )
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def single_value(values: torch.Tensor, output: str) -> torch.Tensor:
    """(R,) values of an output with one number per row.

    Raises:
        DataError: the output has more.
    """
    if values[0].numel() != 1:
        raise DataError(
            f'output "{output}" has the shape {tuple(values.shape)}',
            expected="one number per row, as a regression has",
            fix="choose another output, or the type classification",
        )
    return values.reshape(-1)


def as_tensor(array: Array) -> torch.Tensor:
    """A float32 tensor of an array that a runner returned."""
    return torch.as_tensor(np.asarray(array), dtype=torch.float32)


def _token_mask(states: torch.Tensor, batch: Batch, *, decoder: bool = True) -> torch.Tensor:
    """(R, T) bool; all True where the batch has no mask over these tokens."""
    valid = batch.valid(decoder=decoder)
    if valid is None or valid.shape != tuple(states.shape[:2]):
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return torch.as_tensor(valid, device=states.device)
