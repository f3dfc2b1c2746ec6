"""Tokens that leave the stream between two blocks, so that later layers and their MLPs have fewer to work on.

Behind some blocks tokens are dropped or become one with others (arXiv 2202.07800, 2210.09461, 2304.10716). Behind the
last one every token gets a state again: its own, that of the token that it is part of, or the one it had when it left.

Shape letters: B batch, S tokens in front of a step, M tokens behind it, D model width, H head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from headwise.model.masks import HIDDEN
from headwise.model.token_budget import STEPS, TokenBudget
from headwise.model.token_select import Parts, Tokens, scores_of
from headwise.model.token_tally import Sum

_FLOW = "_headwise_flow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The tokens that are left.

    Attributes:
        size: (B, S) how many tokens each stands for; 0 at padding.
        protected: (B, S) true at those that always go on.
    """

    size: torch.Tensor
    protected: torch.Tensor

    @property
    def shift(self) -> torch.Tensor:
        """(B, 1, 1, S) added to scores: a token is seen as often as there are tokens in it."""
        seen = torch.where(self.size > 0, self.size.clamp_min(1).log(), torch.full_like(self.size, HIDDEN))
        return seen[:, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What became of the tokens behind one block.

    Attributes:
        slot: (B, S) the position of each among those that go on, or of the one that it became part of.
        kept: (B, S) true where it goes on itself.
        before: (B, S, D) states of all; None where those that do not go on have a slot.
    """

    slot: torch.Tensor
    kept: torch.Tensor
    before: torch.Tensor | None

    def undo(self, after: torch.Tensor) -> torch.Tensor:
        """(B, M, D) -> (B, S, D)."""
        states = rows(after, self.slot)
        return states if self.before is None else torch.where(self.kept[..., None], states, self.before)


class Flow:
    """The tokens of one forward pass; all layers of a model share it.

    Args:
        budgets: layer -> what goes on behind its block.
        last: the layer behind whose block every token gets a state again.
    """

    def __init__(self, budgets: Mapping[int, TokenBudget], last: int) -> None:
        self.budgets, self.last = dict(budgets), last
        self.begin()

    def begin(self) -> None:
        """Forget the pass before."""
        self.steps: list[Step] = []
        self.stream: Stream | None = None
        self.worth: torch.Tensor | None = None
        self.metric: torch.Tensor | None = None
        self.tokens: Tokens | None = None
        self.sum = Sum()
        self.length = 0

    def shift(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """What a layer adds to its scores: what the model gives it, until the first tokens have left."""
        return self.stream.shift if self.steps and self.stream is not None else given

    def look(self, budget: TokenBudget, parts: Parts, shift: torch.Tensor | None) -> None:
        """Keep what the attention of a layer says tokens are worth; ``shift`` is what is added to its scores."""
        tokens = Tokens.of(parts.key, shift)
        self.worth = scores_of(budget, parts, tokens, tokens.hide, self.sum).sum(1)
        self.metric = F.normalize(parts.key.mean(1), dim=-1)
        if self.stream is None:
            protected = (tokens.place <= budget.first) | (tokens.place > tokens.count - budget.last)
            size = tokens.valid.expand(self.worth.shape[0], -1)
            self.stream = Stream(size=size, protected=(protected & (tokens.valid > 0)).expand_as(size))
            self.tokens, self.length = tokens, size.shape[1]

    def leave(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What goes on behind the block of a layer, whose output is (B, S, D)."""
        if layer in self.budgets:
            hidden = self.reduce(self.budgets[layer], hidden)
        if layer != self.last:
            return hidden
        hidden = self.restore(hidden)
        self.begin()
        return hidden

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """A state for every token that there was at first."""
        for step in reversed(self.steps):
            hidden = step.undo(hidden)
        return hidden

    def reduce(self, budget: TokenBudget, hidden: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, M, D): the tokens that are worth most, and what became of the rest."""
        stream, index, own = self._chosen(budget)
        kept = torch.zeros_like(stream.protected).scatter(1, index, own)
        ranks = torch.arange(index.shape[1], device=index.device).expand_as(index)
        slot = torch.zeros_like(kept, dtype=index.dtype).scatter(1, index, ranks)
        size, protected = stream.size.gather(1, index) * own, stream.protected.gather(1, index)
        states = rows(hidden, index)
        before = hidden if budget.rest == "drop" else None
        told = None if self.sum.told is None else self.sum.told[:, 0]
        heard = None if told is None else told.gather(1, index)
        if budget.rest == "fuse":
            left = stream.size * ~kept
            count = left.sum(1, keepdim=True)
            fused = (left[:, None] @ hidden) / count.clamp_min(1)[..., None]
            slot = torch.where(kept, slot, torch.full_like(slot, index.shape[1]))
            states, size = torch.cat([states, fused], dim=1), torch.cat([size, count], dim=1)
            protected = torch.cat([protected, torch.zeros_like(protected[:, :1])], dim=1)
            if told is not None and heard is not None:
                heard = torch.cat([heard, (told * ~kept).sum(1, keepdim=True)], dim=1)
        elif budget.rest == "merge":
            slot = torch.where(kept, slot, self._nearest(index, own))
            part = slot[:, None] == ranks[:, :, None]
            member = part * stream.size[:, None]
            size = member.sum(-1)
            states = member @ hidden / size.clamp_min(1)[..., None]
            if told is not None:
                heard = (part * told[:, None]).sum(-1)
        self.steps.append(Step(slot=slot, kept=kept, before=before))
        self.stream = Stream(size=size, protected=protected)
        self.sum.told = None if heard is None else heard[:, None]
        return states

    def _chosen(self, budget: TokenBudget) -> tuple[Stream, torch.Tensor, torch.Tensor]:
        """The tokens so far, (B, M) positions of those with the highest scores, and which of these a sample keeps."""
        assert self.stream is not None, "its layer has run"
        assert self.worth is not None, "its layer has run"
        assert self.tokens is not None, "its layer has run"
        scores = self.worth.masked_fill(self.stream.protected, -HIDDEN).masked_fill(self.stream.size == 0, -1.0)
        index = scores.topk(budget.kept(self.length), dim=-1).indices
        own = torch.arange(index.shape[1], device=index.device) * STEPS < self.tokens.count * budget.steps
        return self.stream, index, own.expand_as(index)

    def _nearest(self, index: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """(B, S) for every token the one with the most similar key among those that go on."""
        assert self.metric is not None, "its layer has run"
        alike = self.metric @ rows(self.metric, index).mT
        return alike.masked_fill(~own[:, None], HIDDEN).argmax(-1)


class MaskedFlow(Flow):
    """The exact twin: every token stays where it is; those that left are hidden, those that became one are copies."""

    def begin(self) -> None:
        """Forget the pass before."""
        super().begin()
        self.slot: torch.Tensor | None = None
        self.alive: torch.Tensor | None = None
        self.saved: torch.Tensor | None = None

    def shift(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """Copies are seen one by one, and a token that left is not."""
        if self.alive is None:
            return given
        return torch.zeros(self.alive.shape).masked_fill(~self.alive, HIDDEN)[:, None, None]

    def look(self, budget: TokenBudget, parts: Parts, shift: torch.Tensor | None) -> None:
        """The scores of one of all copies."""
        if self.slot is not None and self.stream is not None:
            places, shift = self._one_each(), self.stream.shift
            q, k, v = (_of_tokens(part, places) for part in (parts.query, parts.key, parts.value))
            parts = Parts(query=q, key=k, value=v, scale=parts.scale)
        super().look(budget, parts, shift)

    def reduce(self, budget: TokenBudget, hidden: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        if self.slot is None:
            assert self.stream is not None, "its layer has run"
            self.slot = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
            self.alive, self.saved = self.stream.size > 0, hidden
        assert self.alive is not None, "set with the slots"
        assert self.saved is not None, "set with the slots"
        after = super().reduce(budget, rows(hidden, self._one_each()))
        step = self.steps[-1]
        stays = step.kept.gather(1, self.slot) & self.alive
        self.slot = step.slot.gather(1, self.slot)
        if budget.rest != "drop":
            return rows(after, self.slot)
        self.saved = torch.where((self.alive & ~stays)[..., None], hidden, self.saved)
        self.alive = stays
        return hidden

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states that tokens had when they left."""
        if self.alive is None or self.saved is None:
            return hidden
        return torch.where(self.alive[..., None], hidden, self.saved)

    def _one_each(self) -> torch.Tensor:
        """(B, S) for every token of the stream a place where it is."""
        assert self.slot is not None, "there was a step"
        assert self.alive is not None, "there was a step"
        assert self.stream is not None, "there was a step"
        slots = torch.arange(self.stream.size.shape[1])[:, None]
        return ((self.slot[:, None] == slots) & self.alive[:, None]).to(torch.uint8).argmax(-1)


def rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, D) -> (B, M, D), by positions (B, M)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _of_tokens(heads: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, N, S, H) -> (B, N, M, H)."""
    return heads.gather(2, index[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[-1]))


def flow_of(caller: nn.Module) -> Flow | None:
    """What the layers of a model share, where tokens leave between them."""
    found: Flow | None = getattr(caller, _FLOW, None)
    return found


def join(flow: Flow | None, layer: int, caller: nn.Module, block: nn.Module) -> None:
    """Let the tokens of a layer be those of ``flow``; None takes the layer out again."""
    for module, value in ((caller, flow), (block, None if flow is None else (layer, flow))):
        if value is None:
            module.__dict__.pop(_FLOW, None)
        else:
            module.__dict__[_FLOW] = value
    if flow is not None and not any(hook is _left for hook in block._forward_hooks.values()):
        block.register_forward_pre_hook(_entered)
        block.register_forward_hook(_left)


def _entered(block: nn.Module, _: tuple[Any, ...]) -> None:
    layer, flow = block.__dict__.get(_FLOW, (None, None))
    if flow is not None and layer == 0:
        flow.begin()


def _left(block: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    layer, flow = block.__dict__.get(_FLOW, (None, None))
    if flow is None:
        return output
    if isinstance(output, tuple):
        return (flow.leave(layer, output[0]), *output[1:])
    return flow.leave(layer, output)
