"""What the layers of a decoder keep of the tokens that they have seen. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from headwise.model.token_budget import TokenBudget, kept_of

PAST, PRESENT = "past_key_values", "present"
"""Prefixes of a graph's inputs and outputs: ``past_key_values.0.key`` and ``present.0.key``."""
SHIFT = "shift"
"""Tensor of a layer that keeps a share of every prompt: what is added to the scores of each entry, to hide padding."""

PAST_WINDOW, PAST_KEPT = "past_window_", "past_kept_"
SEQUENCE, PAST_SEQUENCE, TOTAL_SEQUENCE = "sequence", "past_sequence", "total_sequence"
"""Names of the axes of tokens: of this call, of earlier calls, and of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """One tensor that a layer caches.

    Attributes:
        name: ``key`` or ``value``; layers of another kind have names of their own.
        shape: of one token, the width last: (heads, width), or (width,) where the heads share it. All tokens of a batch
            are (batch, heads, tokens, width), or (batch, tokens, width).
        longest: most tokens that it holds; None where it holds all.
        budget: what it holds of a prompt, beside all tokens that come behind it; None where it holds all.
    """

    name: str
    shape: tuple[int, ...]
    longest: int | None = None
    budget: TokenBudget | None = None

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
    def prompt_numbers(self) -> float:
        """The same for one token of a prompt, of which some layers keep a share."""
        tensors = [tensor for tensors in self.layers for tensor in tensors if tensor.longest is None]
        return sum(t.numbers * (1.0 if t.budget is None else t.budget.keep) for t in tensors)

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


def past_axis(tensor: CacheTensor) -> str:
    """Name of the axis of tokens of a graph's input; tensors that hold some tokens only have one of their own."""
    if tensor.budget is not None:
        return f"{PAST_KEPT}{tensor.budget.steps}"
    return PAST_SEQUENCE if tensor.longest is None else f"{PAST_WINDOW}{tensor.longest}"


def held_of(axis: str, tokens: int) -> int:
    """How many of so many tokens of a prompt there are along an axis that ``past_axis`` named."""
    if axis.startswith(PAST_KEPT):
        return kept_of(tokens, int(axis.removeprefix(PAST_KEPT)))
    return min(tokens, int(axis.removeprefix(PAST_WINDOW))) if axis.startswith(PAST_WINDOW) else tokens


def prunes_prompts(inputs: Collection[str]) -> bool:
    """Whether a graph with these inputs keeps a share of every prompt that one call reads."""
    return any(is_past(name) and read_port(name)[1] == SHIFT for name in inputs)
