"""What ``generate`` of transformers does with the rows of a cache, for layers that hold more than keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer


class RowsLayer(DynamicLayer):
    """A layer whose tensors have one row per text, (B, ...), whatever they are."""

    @abstractmethod
    def _put(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put what ``change`` gives in the place of every tensor."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put other rows in the place of rows, as beam search does."""
        self._put(lambda tensor: tensor.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._put(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._put(lambda tensor: tensor[indices])
