"""What the layers of a decoder keep of the tokens that they have seen. Pure data: no tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

PAST, PRESENT = "past_key_values", "present"
"""Prefixes of a graph's inputs and outputs: ``past_key_values.0.key`` and ``present.0.key``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """One tensor that a layer caches.

    Attributes:
        name: ``key`` or ``value``; layers of another kind have names of their own.
        shape: of one token, the width last: (heads, width), or (width,) where the heads share it. All tokens of a batch
            are (batch, heads, tokens, width), or (batch, tokens, width).
        longest: most tokens that it holds; None where it holds all.
    """

    name: str
    shape: tuple[int, ...]
    longest: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers for one token."""
        return prod(self.shape)

    def dims(self, batch: int | str, tokens: int | str) -> tuple[int | str, ...]:
        """Sizes of the tensor for a batch, or the names of the sizes that vary."""
        return (batch, *self.shape[:-1], tokens, self.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """What all layers cache, and what that is called in a graph.

    Attributes:
        layers: one entry per attention layer: its tensors, in the order in which the layer hands them to the cache. A
            layer that reads the cache of another one has none.
    """

    layers: tuple[tuple[CacheTensor, ...], ...]

    @property
    def numbers(self) -> int:
        """Numbers that all layers hold for one token, in the tensors that hold all tokens."""
        return sum(tensor.numbers for tensors in self.layers for tensor in tensors if tensor.longest is None)

    @property
    def bounded(self) -> int:
        """Numbers that all layers hold at most in the tensors that hold some tokens only, however long the text is."""
        return sum(t.numbers * t.longest for tensors in self.layers for t in tensors if t.longest is not None)

    def past(self) -> dict[str, CacheTensor]:
        """Graph input -> tensor, in the order of the layers."""
        return self._named(PAST)

    def present(self) -> dict[str, CacheTensor]:
        """Graph output -> tensor, in the same order."""
        return self._named(PRESENT)

    def _named(self, prefix: str) -> dict[str, CacheTensor]:
        return {
            f"{prefix}.{layer}.{tensor.name}": tensor for layer, tensors in enumerate(self.layers) for tensor in tensors
        }


def is_past(name: str) -> bool:
    """Whether a graph input holds what earlier calls cached."""
    return name.startswith(f"{PAST}.")


def is_present(name: str) -> bool:
    """Whether a graph output is to be given to the next call."""
    return name.startswith(f"{PRESENT}.")


def next_past(present: str) -> str:
    """The input that takes what an output gave."""
    return PAST + present.removeprefix(PRESENT)


def read_port(name: str) -> tuple[int, str]:
    """Number of the layer and name of the tensor of an input or output: ``present.0.key`` is (0, ``key``)."""
    _, layer, tensor = name.split(".")
    return int(layer), tensor
