"""Which rows of an activation are tokens that count."""

from __future__ import annotations

import torch

from headwise.calibration.tasks import Batch
from headwise.errors import DataError
from headwise.model.families import Family
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView


def valid_mask(batch: Batch, family: Family) -> torch.Tensor | None:
    """(B, T), true for tokens that count in the layers of a family; None where all of them do."""
    valid = None if family.patches else batch.valid(decoder=family.decoder)
    return None if valid is None else torch.as_tensor(valid)


def valid_key_mask(batch: Batch, family: Family) -> torch.Tensor | None:
    """The same for the tokens that keys and values are made of: those of the encoder where a decoder attends to it."""
    valid = None if family.patches else batch.valid(decoder=family.decoder and not family.cross)
    return None if valid is None else torch.as_tensor(valid)


def valid_tokens(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, ...) -> (tokens, ...), without padding where the mask speaks about these tokens.

    Args:
        tensor: (B, T, ...), or (B * T, F) from blocks that flatten samples and tokens before their MLP.
        mask: (B, T), true for tokens that count.
    """
    if tensor.dim() == 2:
        return tensor if mask is None or mask.numel() != len(tensor) else tensor[mask.flatten()]
    return tensor[mask] if mask is not None and mask.shape == tensor.shape[:2] else tensor.flatten(0, 1)


def did_not_run(layer: AttentionView | MlpView) -> DataError:
    """The error for a layer that no sample reached."""
    return DataError(
        f"layer {layer.index} ({layer.path}) did not run",
        expected="a layer that every sample passes through",
        fix="exclude the layer, or feed the inputs that reach it",
    )
