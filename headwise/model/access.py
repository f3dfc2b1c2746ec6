"""Reach into modules of other people: attributes by path, weights in one orientation, hooks that go away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import nn

See = Callable[[torch.Tensor], None]
"""Called with a tensor of every forward pass."""


def attribute(root: Any, path: str) -> Any:
    """``attribute(m, "self.query")`` is ``m.self.query``."""
    return reduce(getattr, path.split("."), root) if path else root


def find(root: Any, path: str) -> Any:
    """What ``attribute`` gives, or None where a step of the path is missing."""
    return reduce(lambda parent, name: getattr(parent, name, None), path.split("."), root)


def assign(root: Any, path: str, value: Any) -> None:
    """Set what ``attribute`` reads."""
    parent, _, name = path.rpartition(".")
    setattr(attribute(root, parent), name, value)


def matrix(module: nn.Module, *, transposed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight as (out, in), and bias; ``transposed`` says that the module stores it as (in, out)."""
    bias = module.bias
    weight = module.get_parameter("weight").detach()
    return weight.T if transposed else weight, bias.detach() if isinstance(bias, nn.Parameter) else None


@contextmanager
def hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """A hook for the length of a block."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched_input(module: nn.Module, see: See) -> Iterator[None]:
    """Call ``see`` with the first argument of every call of ``module``."""

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else next(iter(kwargs.values())))

    with hooked(module.register_forward_pre_hook(seen, with_kwargs=True)):
        yield


@contextmanager
def watched_output(module: nn.Module, see: See) -> Iterator[None]:
    """Call ``see`` with what ``module`` returns."""

    def seen(_: nn.Module, __: tuple[Any, ...], result: torch.Tensor) -> None:
        see(result)

    with hooked(module.register_forward_hook(seen)):
        yield
