"""Keys and values of a decoder's layer, read by later layers as its cache holds them: rotated, with the past.

Attention modules of transformers ask a cache for the keys and values of all tokens. The owner's cache is one that
remembers what it gave; that of a borrower gives the same, and keeps nothing itself. The classes stay as they are, and
with them whatever they do to queries, keys and scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headwise.model.access import assign, attribute
from headwise.model.latent import Slot


class Absent(nn.Module):
    """(B, T, D) -> (B, T, width) zeros, in the place of a projection whose result nobody looks at.

    Attributes:
        width: numbers per token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_zeros(1).expand(*inputs.shape[:-1], self.width)


class _Lending:
    """The owner's cache, or none, that leaves keys and values in a slot."""

    def __init__(self, cache: Any, slot: Slot) -> None:
        self._cache, self._slot = cache, slot

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *args, **kwargs)
        self._slot.put((keys, values))
        return keys, values


class _Borrowing:
    """Gives what lies in a slot."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def update(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        del args, kwargs
        keys, values = self._slot.take()
        return keys, values


class _Hook:
    """A forward pre-hook; an object, so that copies of the model copy the slot with it."""

    def __init__(self, slot: Slot, *, lends: bool) -> None:
        self.slot, self.lends = slot, lends

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        del module
        name = "layer_past" if "layer_past" in kwargs else "past_key_values"
        found = _Lending(kwargs.get(name), self.slot) if self.lends else _Borrowing(self.slot)
        return args, {**kwargs, name: found}


def lend_cache(owner: nn.Module, borrower: nn.Module, paths: tuple[str, str]) -> None:
    """Let a borrower read the keys and values of an owner, and lose the projections of its own.

    Args:
        owner: an attention module that takes a cache.
        borrower: another one, with projections that are modules of their own.
        paths: from there to the projection of keys, and of values.
    """
    hooks = [hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, _Hook) and hook.lends]
    if not hooks:
        hooks = [_Hook(Slot(), lends=True)]
        owner.register_forward_pre_hook(hooks[0], with_kwargs=True)
    slot = hooks[0].slot
    slot.readers += 1
    borrower.register_forward_pre_hook(_Hook(slot, lends=False), with_kwargs=True)
    for path in paths:
        width = len(attribute(borrower, path).weight)
        assign(borrower, path, Absent(width).train(borrower.training))
