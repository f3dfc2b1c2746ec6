"""How many of the keys a layer's queries meet, and which ones. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Score = Literal["pooled", "window", "received", "accumulated", "random"]
Rest = Literal["drop", "fuse", "merge"]

STEPS = 1000
"""Ratios are kept in steps of this fraction, so that a graph and a layout round them alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """The keys that one attention layer keeps of every sample (after arXiv 2502.14504).

    Every kv head keeps its own tokens, equally many in each, so that the kept ones are one dense tensor. A sample keeps
    a share of its own tokens: padding is never counted and never kept.

    Attributes:
        keep: share of the tokens whose keys and values are kept, rounded up to a whole token.
        score: what a token is worth: the attention that it receives from all queries (``received``), from the last
            ones (``window``) or from the means of a few stretches of them (``pooled``), that from all queries of this
            layer and of the earlier ones that have a budget (``accumulated``), or a number by chance (``random``).
        shared: all heads of the layer keep the same tokens, those with the largest sum of scores.
        weighted: the attention that a token receives counts as often as the norm of its value says.
        queries: into how many stretches of equal length ``pooled`` cuts a sample, or how many queries ``window`` asks.
        first: so many tokens at the beginning are always kept; ``last``: at the end.
        rest: the others are dropped, or become one key and value together (``fuse``). Where tokens leave the stream,
            each may become one with the token that goes on and has the most similar key (``merge``).
        stream: not keys are chosen but tokens: all others leave the stream behind the block of this layer; ``keep`` is
            a share of the tokens that there were at first.
        prompt: of a decoder: a prompt is read in full, and what is behind it sees the kept ones of its tokens only.
    """

    keep: float
    score: Score = "pooled"
    shared: bool = False
    weighted: bool = True
    queries: int = 8
    first: int = 1
    last: int = 0
    rest: Rest = "fuse"
    stream: bool = False
    prompt: bool = False

    @property
    def steps(self) -> int:
        """The ratio in units of ``1 / STEPS``."""
        return round(self.keep * STEPS)

    def kept(self, tokens: int) -> int:
        """How many of so many tokens are kept."""
        return kept_of(tokens, self.steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenBudget:
        return cls(**data)


def kept_of(tokens: int, steps: int) -> int:
    """How many of so many tokens a share of ``steps / STEPS`` is, rounded up."""
    return (tokens * steps + STEPS - 1) // STEPS
