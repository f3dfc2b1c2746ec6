"""Attention that tokens receive, added up over the layers of one forward pass (after SpAtten, arXiv 2012.09852).

Shape letters: B batch, K kv heads, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_TURN = "_headwise_turn"


class Sum:
    """What the mean head of every layer so far has said of the tokens of this pass, (B, 1, S)."""

    def __init__(self) -> None:
        self.told: torch.Tensor | None = None

    def add(self, received: torch.Tensor) -> torch.Tensor:
        """(B, K, S) what every token received in this layer, and from the mean head of each earlier one."""
        mean = received.mean(1, keepdim=True)
        if self.told is None:
            self.told = mean
            return received
        total, self.told = received + self.told, self.told + mean
        return total


@dataclass(frozen=True, slots=True)
class Turn:
    """The place of one layer among those that add to a sum."""

    sum: Sum
    first: bool
    last: bool

    def add(self, received: torch.Tensor) -> torch.Tensor:
        """See ``Sum``; the first layer of a pass begins it, and the last one leaves nothing behind."""
        if self.first:
            self.sum.told = None
        total = self.sum.add(received)
        if self.last:
            self.sum.told = None
        return total


Tally = Sum | Turn


def turn_of(caller: nn.Module) -> Turn | None:
    """The turn of an attention layer; None where it adds to no sum."""
    found: Turn | None = caller.__dict__.get(_TURN)
    return found


def take_turns(callers: Sequence[nn.Module], wanted: Sequence[bool]) -> None:
    """Give the callers that want one a turn, in the order in which they run, and take it from the others."""
    total = Sum()
    for index, (caller, wants) in enumerate(zip(callers, wanted, strict=True)):
        caller.__dict__.pop(_TURN, None)
        if wants:
            first, last = not any(wanted[:index]), not any(wanted[index + 1 :])
            caller.__dict__[_TURN] = Turn(total, first, last)
