"""Which rows of an activation are tokens that count."""

from __future__ import annotations

import torch


def valid_tokens(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, ...) -> (tokens, ...), without padding where the mask speaks about these tokens.

    Args:
        tensor: (B, T, ...), or (B * T, F) from blocks that flatten samples and tokens before their MLP.
        mask: (B, T), true for tokens that count.
    """
    if tensor.dim() == 2:
        return tensor if mask is None or mask.numel() != len(tensor) else tensor[mask.flatten()]
    return tensor[mask] if mask is not None and mask.shape == tensor.shape[:2] else tensor.flatten(0, 1)
