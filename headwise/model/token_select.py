"""Keys and values of the tokens that a head keeps, gathered so that attention works on them only.

Everything is made of tensor operations without a choice that depends on values, so that it can be a part of a graph.
How many tokens a sample keeps follows from its own length: one that is padded in a batch keeps what it keeps alone.

Shape letters: B batch, T query tokens, S key tokens, M kept ones, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headwise.model.masks import HIDDEN
from headwise.model.token_budget import STEPS, TokenBudget
from headwise.model.token_tally import Tally

_PRIME = 10007
_NEVER = 64
"""Above every rank of a token that is protected."""
_STEP = 128.0
"""Scores of protected tokens differ by this much, which half precision can tell at their size."""
_masking: ContextVar[bool] = ContextVar("masking", default=False)


@contextmanager
def masked_tokens() -> Iterator[None]:
    """While the block runs, keys that are not kept are hidden where they are instead of left out: the exact twin."""
    token = _masking.set(True)
    try:
        yield
    finally:
        _masking.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an attention layer works on: query (B, N, T, H), key and value (B, K, S, H), and the factor on scores."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is left of a layer's keys.

    Attributes:
        key, value: (B, K, M, H); one more entry where the rest is fused.
        shift: added to the scores, broadcastable to (B, K, T, M), or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    shift: torch.Tensor | None


def keep_keys(budget: TokenBudget, parts: Parts, shift: torch.Tensor | None, tally: Tally | None = None) -> Kept:
    """The keys and values that every head keeps.

    Args:
        budget: how many, and by which score.
        parts: of queries and keys of the same tokens.
        shift: broadcastable to (B, 1, T, S), hides padding, and later tokens in a decoder; None where it hides nothing.
        tally: of ``accumulated``.
    """
    tokens = Tokens.of(parts.key, shift)
    seen = shift if budget.prompt else tokens.hide
    scores = scores_of(budget, parts, tokens, seen, tally)
    return gather(budget, parts, scores, tokens, budget.kept(parts.key.shape[2]))


def gather(budget: TokenBudget, parts: Parts, scores: torch.Tensor, tokens: Tokens, width: int) -> Kept:
    """The keys and values with the highest scores, (B, K, S), of at most ``width`` tokens."""
    key, value = parts.key, parts.value
    index = _chosen(budget, scores, tokens, width)
    # The index is as wide as a sample without padding needs; a shorter one keeps the first of it.
    # A whole number is below a ratio rounded up when it is below the ratio.
    own = torch.arange(index.shape[-1], device=key.device) * STEPS < tokens.count * budget.steps
    rest = _fused(key, value, index, own, tokens) if budget.rest == "fuse" else None
    hidden = torch.zeros_like(own, dtype=key.dtype).masked_fill(~own, HIDDEN)[:, None, None]
    if _masking.get():
        shown = torch.zeros_like(key[..., 0]).scatter(2, index, own[:, None].to(key.dtype).expand_as(index))
        hidden = ((1 - shown) * HIDDEN)[:, :, None]
    else:
        key, value = _taken(key, index), _taken(value, index)
    if rest is None:
        # Without padding every kept key is seen.
        return Kept(key=key, value=value, shift=None if tokens.hide is None and not _masking.get() else hidden)
    rows, heads = torch.broadcast_shapes(hidden.shape[:2], rest.seen.shape[:2])
    return Kept(
        key=torch.cat([key, rest.key], dim=2),
        value=torch.cat([value, rest.value], dim=2),
        shift=torch.cat([part.expand(rows, heads, -1, -1) for part in (hidden, rest.seen)], dim=-1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Which tokens are there.

    Attributes:
        valid: (B or 1, S), 1 at tokens that are no padding, in the type of keys.
        place: (B or 1, S), 1 at the first of them, 2 at the second; whole numbers, and so is
        count: (B or 1, 1), how many there are.
        hide: (B, 1, 1, S), added to the scores; None where there is no padding.
    """

    valid: torch.Tensor
    place: torch.Tensor
    count: torch.Tensor
    hide: torch.Tensor | None

    @classmethod
    def of(cls, key: torch.Tensor, shift: torch.Tensor | None) -> Tokens:
        """From keys, (B, K, S, H), and what is added to the scores of all queries alike, or None."""
        # Without padding all samples are alike, and a graph of one length can hold these numbers as constants.
        present = torch.ones_like(key[:1, 0, :, 0], dtype=torch.long)
        hide = None
        if shift is not None:
            hide = shift[:, :, -1:].expand(key.shape[0], -1, -1, -1)
            present = present.masked_fill(hide[:, 0, 0] < HIDDEN / 2, 0)
        return cls(valid=present.to(key.dtype), place=present.cumsum(1), count=present.sum(1, keepdim=True), hide=hide)


class _Rest(NamedTuple):
    """All tokens that a head does not keep: a key and a value, (B, K, 1, H), and what is added to its score."""

    key: torch.Tensor
    value: torch.Tensor
    seen: torch.Tensor


def scores_of(
    budget: TokenBudget, parts: Parts, tokens: Tokens, seen: torch.Tensor | None, tally: Tally | None = None
) -> torch.Tensor:
    """(B, K, S) what each token is worth to each kv head, never negative; ``seen`` is added to the scores."""
    key, value = parts.key, parts.value
    if budget.score == "random":
        scores = _by_chance(key, tokens)
    else:
        queries, votes, seen = _asked(budget, parts.query, tokens, seen)
        # All query heads of a group ask its one kv head.
        products = (queries.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].mT * parts.scale).flatten(1, 2)
        weights = torch.softmax(products if seen is None else products + seen, dim=-1)
        received = (weights * votes).sum(2)
        scores = received.unflatten(1, (key.shape[1], -1)).sum(2)
        if budget.score == "accumulated" and tally is not None:
            scores = tally.add(scores)
        if budget.weighted:
            scores = scores * value.norm(dim=-1)
    return scores.sum(1, keepdim=True).expand(-1, key.shape[1], -1) if budget.shared else scores


def _asked(
    budget: TokenBudget, query: torch.Tensor, tokens: Tokens, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries (B, N, Q, H) that say what a token is worth, how many each is, (B, 1, Q, 1), and what they see."""
    if budget.score == "window":
        return _last(budget.queries, query, tokens, seen)
    if budget.score in ("received", "accumulated"):
        return query, tokens.valid[:, None, :, None], seen
    start = torch.arange(budget.queries, device=query.device)[:, None] * tokens.count[:, None]
    reached = (tokens.place[:, None] - 1) * budget.queries
    member = (reached >= start) & (reached < start + tokens.count[:, None])
    pooling = member.to(query.dtype) * tokens.valid[:, None]
    size = pooling.sum(-1, keepdim=True)
    return (pooling / size.clamp_min(1))[:, None] @ query, size[:, None], seen


def _last(
    count: int, query: torch.Tensor, tokens: Tokens, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The queries of the last ``count`` tokens, as ``_asked`` gives them; where there are fewer, some have no vote."""
    rows, heads, length, width = query.shape
    place = tokens.count - count + torch.arange(count, device=query.device)
    # Whole numbers, which half precision leaves as they are; tokens of a sample are neighbours.
    first = (tokens.valid > 0).to(torch.int32).argmax(-1, keepdim=True)
    column = (first + place).clamp(0, length - 1)[:, None, :, None]
    asked = query.gather(2, column.expand(rows, heads, -1, width))
    votes = (place >= 0).to(query.dtype)[:, None, :, None]
    if seen is None or seen.shape[2] == 1:
        return asked, votes, seen
    return asked, votes, seen.expand(rows, -1, -1, -1).gather(2, column.expand(rows, 1, -1, seen.shape[3]))


def _by_chance(key: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(B, K, S) numbers from 0 to 1 that depend on the head and on the place among the tokens alone."""
    heads = torch.arange(1, key.shape[1] + 1, device=key.device)[None, :, None]
    # Whole numbers, so that every runtime draws the same; a cube is another one for every residue of this prime.
    seeds = (tokens.place[:, None] * 7919 + heads * 104729) % _PRIME
    return (seeds * seeds % _PRIME * seeds % _PRIME).to(key.dtype).expand(key.shape[0], -1, -1) / _PRIME


def _chosen(budget: TokenBudget, scores: torch.Tensor, tokens: Tokens, width: int) -> torch.Tensor:
    """(B, K, M) positions of the tokens with the highest scores, protected ones first, padding last."""
    before, behind = tokens.place - 1, tokens.count - tokens.place
    # Where not even the protected ones fit, all runtimes have to take the same: the nearest to an end.
    ranks = torch.minimum(
        (2 * before).masked_fill(before >= budget.first, _NEVER),
        (2 * behind + 1).masked_fill(behind >= budget.last, _NEVER),
    )
    protected = ranks < _NEVER
    sure = -HIDDEN - _STEP * ranks.clamp_max(_NEVER - 1).to(scores.dtype)
    scores = torch.where(protected[:, None], sure[:, None], scores)
    if tokens.hide is not None:
        scores = scores.masked_fill(tokens.valid[:, None] == 0, -1.0)
    return scores.topk(width, dim=-1).indices


def _taken(heads: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, K, S, H) -> (B, K, M, H)."""
    return heads.gather(2, index[..., None].expand(-1, -1, -1, heads.shape[-1]))


def _fused(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, own: torch.Tensor, tokens: Tokens) -> _Rest:
    """One key and one value per head for all tokens that are not kept: their means, seen as often as there are any."""
    counted, kept = tokens.valid[:, None, :, None], own[:, None, :, None].to(key.dtype)
    left = (tokens.count - own.sum(1, keepdim=True))[:, :, None, None].to(key.dtype)
    means = [
        ((heads * counted).sum(2, keepdim=True) - (_taken(heads, index) * kept).sum(2, keepdim=True))
        / left.clamp_min(1)
        for heads in (key, value)
    ]
    seen = torch.where(left > 0, left.clamp_min(1).log(), torch.full_like(left, HIDDEN))
    return _Rest(key=means[0], value=means[1], seen=seen)
