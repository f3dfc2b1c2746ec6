"""Prompts of which every head keeps its own share for the tokens behind them (after arXiv 2502.14504, 2404.14469).

A call of several tokens is a prompt. It sees all of itself, and what the cache holds of earlier calls; the cache then
gets the kept tokens only. A call of one token per row is added to the cache as it is.

A text that is read at once, without a cache, is judged: its first half is the prompt, so that the tokens of the second
half see the kept ones of the first, and each other.

Shape letters: B batch, T tokens of a call, S tokens of a text, P entries of the cache, M kept ones, N query heads, K kv
heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from headwise.errors import UnsupportedModelError
from headwise.model.masks import HIDDEN
from headwise.model.prompt_cache import Held, PromptLayer
from headwise.model.token_budget import TokenBudget
from headwise.model.token_select import Kept, Parts, Tokens, gather, keep_keys, scores_of
from headwise.model.token_tally import Tally

_single: ContextVar[bool] = ContextVar("single", default=False)


@contextmanager
def single_tokens() -> Iterator[None]:
    """While the block runs, no call is a prompt: a graph that is traced takes calls of one token per row."""
    token = _single.set(True)
    try:
        yield
    finally:
        _single.reset(token)


def takes_single() -> bool:
    """Whether ``single_tokens`` runs."""
    return _single.get()


def prompt_length(tokens: torch.Tensor) -> torch.Tensor:
    """How many of so many tokens are the prompt of a text that is judged."""
    return (tokens + 1) // 2


def of_call(
    budget: TokenBudget, parts: Parts, cache: PromptLayer, shift: torch.Tensor | None, tally: Tally | None
) -> Kept:
    """What a call attends to; the cache is given what it keeps of it.

    Args:
        budget: of the layer.
        parts: of the new tokens alone.
        cache: holds what is left of earlier calls.
        shift: broadcastable to (B, 1, T, T), hides padding and later tokens; None where nothing is hidden.
        tally: of ``accumulated``.
    """
    past, (rows, _, new, _) = cache.held, parts.query.shape
    entries = past.key.shape[2]
    shift = parts.query.new_zeros(1, 1, new, new) if shift is None else shift
    every = Kept(key=parts.key, value=parts.value, shift=shift[:, :, -1:])
    prompt = new > 1 and not takes_single()
    # Several prompts in one cache are weighed each for itself: what is left of earlier ones is kept.
    kept = keep_keys(budget, parts, shift, tally) if prompt else every
    assert kept.shift is not None, "a shift was given"
    cache.hold(
        Held(
            torch.cat([past.key, kept.key], dim=2),
            torch.cat([past.value, kept.value], dim=2),
            torch.cat([past.shift, kept.shift[:, 0].mT.expand(rows, -1, -1)], dim=1),
        )
    )
    before = past.shift.mT[:, None].expand(rows, 1, new, entries)
    return Kept(
        key=torch.cat([past.key, parts.key], dim=2),
        value=torch.cat([past.value, parts.value], dim=2),
        shift=torch.cat([before, shift.expand(rows, 1, new, new)], dim=3),
    )


def of_text(budget: TokenBudget, parts: Parts, shift: torch.Tensor | None, tally: Tally | None) -> Kept:
    """What the tokens of a text attend to that is read at once: kept ones of the prompt, and behind these all tokens.

    Args:
        budget: of the layer.
        parts: of the text.
        shift: broadcastable to (B, 1, S, S), hides padding and later tokens; None for a text of one token.
        tally: of ``accumulated``.

    Raises:
        UnsupportedModelError: there are more keys than queries, from a cache that keeps all tokens.
    """
    rows, _, length, _ = parts.query.shape
    if parts.key.shape[2] != length:
        raise UnsupportedModelError(
            "prune-tokens on a decoder with a cache that does not know what is kept of a prompt",
            expected="past_key_values from make_cache of headwise.model.decoder, or whole texts",
            fix="give make_cache(view.layout.cache, empty_past(view.layout.cache, rows)) as past_key_values",
        )
    shift = parts.query.new_zeros(1, 1, length, length) if shift is None else shift
    every = Tokens.of(parts.key, shift)
    tokens = _prompt(every)
    scores = scores_of(budget, parts, tokens, shift, tally)
    kept = gather(budget, parts, scores, tokens, budget.kept((length + 1) // 2))
    assert kept.shift is not None, "there is padding behind the prompt"
    inside = (every.place <= tokens.count)[:, None, :, None]
    shift = shift.masked_fill(~inside & (tokens.valid > 0)[:, None, None], HIDDEN)
    seen = kept.shift.masked_fill(inside, HIDDEN)
    heads = seen.shape[1]
    return Kept(
        key=torch.cat([kept.key, parts.key], dim=2),
        value=torch.cat([kept.value, parts.value], dim=2),
        shift=torch.cat([seen.expand(rows, -1, -1, -1), shift.expand(rows, heads, -1, -1)], dim=3),
    )


def _prompt(tokens: Tokens) -> Tokens:
    """The first half of a text: what is behind it counts as padding."""
    count = prompt_length(tokens.count)
    behind = tokens.place > count
    valid = tokens.valid.masked_fill(behind, 0)
    hide = torch.zeros_like(valid).masked_fill(valid == 0, HIDDEN)[:, None, None]
    return replace(tokens, valid=valid, count=count, hide=hide)
