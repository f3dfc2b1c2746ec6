"""The two kinds of attention masks: boolean, true where a key is seen, and added to the scores."""

from __future__ import annotations

import torch

HIDDEN = -3e4
"""Score of a key that must not be seen: no weight is left after softmax, and it is a number in float16."""


def boolean(mask: torch.Tensor) -> torch.Tensor:
    """A mask of either kind as a boolean one."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN / 2


def seen_keys(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(B, S), true at keys that the last query of a causal mask (B, 1, T, S) sees; None where there is no mask."""
    return None if mask is None else boolean(mask[:, 0, -1])
