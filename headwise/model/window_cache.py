"""The cache of a layer in which some heads see the first and the last tokens only.

Shape letters: B batch, S tokens so far, T tokens of a call, H head_dim, K kv heads of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from headwise.model.cache_rows import RowsLayer


class StreamingLayer(RowsLayer):
    """Keys and values of all tokens for the heads that see all, and of a bounded number for every other block of heads.

    ``update`` hands out the layer itself in the place of keys and of values. The attention function of headwise reads
    the blocks from it, and tells it what to keep of those with a window once it has used them.

    Args:
        blocks: keys and values (B, K, tokens, H) of every block, in the order of the heads.
        windowed: whether the first block has a window too, so that no head sees all tokens.

    Attributes:
        keys: of the block without a window, or None; ``values`` likewise.
        windows: keys and values, in turn, of the blocks with a window.
        total: tokens so far; not counted while a graph is traced, where it would be a constant.
    """

    is_croppable = False

    def __init__(self, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]], *, windowed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(*blocks[0])
        self.keys, self.values = (None, None) if windowed else blocks[0]
        self.windows = [tensor for block in (blocks if windowed else blocks[1:]) for tensor in block]
        self.total = blocks[0][0].shape[2]

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """Masks are made by a layer that knows how many tokens there were; this one may not."""
        return self.keys is None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Put the new tokens, (B, all kv heads, T, H), behind those of every block."""
        heads = [block.shape[1] for block in self.tensors()[::2]]
        parts = zip(key_states.split(heads, dim=1), value_states.split(heads, dim=1), strict=True)
        new = [tensor for pair in parts for tensor in pair]
        joined = iter([torch.cat(pair, dim=-2) for pair in zip(self.tensors(), new, strict=True)])
        self._put(lambda _: next(joined))
        if not torch.compiler.is_compiling():
            self.total += key_states.shape[2]
        return self, self

    def block(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block, the new tokens behind."""
        tensors = self.tensors()
        return tensors[2 * index], tensors[2 * index + 1]

    def keep(self, index: int, places: torch.Tensor) -> None:
        """Keep only the tokens at ``places``, (B, kept) or (1, kept), of a block with a window."""
        at = 2 * index - (0 if self.keys is None else 2)
        self.windows[at : at + 2] = [_take(tensor, places) for tensor in self.windows[at : at + 2]]

    def resize(self, tokens: Sequence[int]) -> None:
        """Put so many zeros per block with a window in the place of what is kept: a shape to trace a graph with."""
        sizes = [count for count in tokens for _ in ("key", "value")]
        self.windows = [
            tensor.new_zeros(*tensor.shape[:2], count, tensor.shape[3])
            for tensor, count in zip(self.windows, sizes, strict=True)
        ]

    def get_seq_length(self) -> int:
        """Tokens so far, those that were dropped included."""
        tokens: int = self.total if self.keys is None else self.keys.shape[2]
        return tokens

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values, in turn, of every block."""
        full = [] if self.keys is None or self.values is None else [self.keys, self.values]
        return [*full, *self.windows]

    def _put(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put what ``change`` gives in the place of every tensor."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)
        self.windows = [change(tensor) for tensor in self.windows]


def _take(heads: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, K, kept, H) of (B, K, L, H): whole tokens, copied as they lie in memory."""
    rows, count, length, _ = heads.shape
    starts = torch.arange(rows * count).unflatten(0, (rows, count))[..., None] * length
    chosen = (starts + places[:, None]).flatten()
    taken: torch.Tensor = heads.flatten(0, 2).index_select(0, chosen).unflatten(0, (rows, count, places.shape[1]))
    return taken
