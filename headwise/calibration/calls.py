"""The inputs that an attention module was called with, kept so that it can be called again alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache


class Call(NamedTuple):
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def alone(self) -> Call:
        """Without its cache, which holds the keys and values of that call already."""
        return Call(tuple(map(_uncached, self.args)), {name: _uncached(value) for name, value in self.kwargs.items()})

    def copied(self) -> Call:
        """The same as tensors of their own, which gradients may flow behind; made outside of inference mode."""
        return Call(_copied(self.args), _copied(self.kwargs))

    def run(self, module: nn.Module) -> None:
        """Call a module; whoever wants to see something watches it."""
        module(*self.args, **self.kwargs)


def _uncached(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
