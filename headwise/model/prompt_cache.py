"""The cache of a layer that keeps a share of every prompt: of every kv head other tokens, and all that come behind.

Shape letters: B batch, T tokens of a call, P entries that are held, H head_dim, K kv heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from headwise.model.cache_rows import RowsLayer


class Held(NamedTuple):
    """Keys and values (B, K, P, H), and what is added to the scores of each entry, (B, P, 1): it hides padding."""

    key: torch.Tensor
    value: torch.Tensor
    shift: torch.Tensor


class PromptLayer(RowsLayer):
    """Keys and values of the tokens that are kept.

    ``update`` hands out the layer itself in the place of keys and of values. The attention function of headwise takes
    the new ones from it, decides what is kept of them, and gives the layer what it is to hold.

    Attributes:
        keys, values, shift: see ``Held``.
        new: keys and values of this call, between ``update`` and the attention function.
        total: tokens so far; not counted while a graph is traced, where it would be a constant.
    """

    is_croppable = False
    is_sliding = True  # masks are made by a layer that holds all tokens, where there is one

    def __init__(self, held: Held) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(held.key, held.value)
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.total = held.key.shape[2]
        self.hold(held)

    @property
    def held(self) -> Held:
        """What is held of earlier calls."""
        assert self.keys is not None, "given from the beginning"
        assert self.values is not None, "given from the beginning"
        return Held(self.keys, self.values, self.shift)

    def taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of this call."""
        assert self.new is not None, "a layer is updated before it attends"
        return self.new

    def hold(self, held: Held) -> None:
        """Put other tensors in the place of those that are held; the new ones are used."""
        self.keys, self.values, self.shift = held
        self.new = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the new tokens, (B, K, T, H)."""
        self.new = key_states, value_states
        if not torch.compiler.is_compiling():
            self.total += key_states.shape[2]
        return self, self

    def resize(self, entries: int) -> None:
        """Put so many zeros in the place of what is held: a shape to trace a graph with."""
        self.hold(Held(*(tensor.new_zeros(*_resized(tensor, entries)) for tensor in self.held)))

    def get_seq_length(self) -> int:
        """Tokens so far, those that were dropped included."""
        return self.total

    def _put(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.hold(Held(*map(change, self.held)))


def _resized(tensor: torch.Tensor, entries: int) -> list[int]:
    sizes = list(tensor.shape)
    sizes[-2] = entries
    return sizes
