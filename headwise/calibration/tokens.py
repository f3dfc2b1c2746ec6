"""Which rows of an activation are tokens that count."""

from __future__ import annotations

import torch

from headwise.calibration.tasks import Batch
from headwise.model.families import Family


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


def add_moment(moments: dict[int, torch.Tensor], index: int, mask: torch.Tensor | None, inputs: torch.Tensor) -> None:
    """Add products of the tokens that count, (B, T, D) with a 1 behind each, to those of a layer."""
    tokens = valid_tokens(inputs.detach(), mask).double()
    tokens = torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1)
    moments[index] = moments.get(index, 0) + tokens.T @ tokens
