"""Attention in which some heads see the first and the last tokens only (DuoAttention, arXiv 2410.10819).

Heads with the same window are neighbours and are computed together, as a block. A block with a window needs a bounded
number of keys, which is what ``StreamingLayer`` keeps of it: slots for the first tokens of every text, and the last
tokens behind them. First tokens are counted from the first one that is no padding, text by text.

Shape letters: B batch, T query tokens, S tokens so far, H head_dim, N query heads; of a block with a window L keys at
hand, those of this call included, and M keys that are kept for the next call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.model.bands import Band, attend_in_band, visible_in_band
from headwise.model.layout import AttentionLayout
from headwise.model.masks import seen_keys
from headwise.model.window_cache import StreamingLayer


class Keys(NamedTuple):
    """Which tokens the keys at hand belong to, by their columns among the S tokens so far.

    Attributes:
        column: (B, L), or (1, L) where no text is padded.
        first: (B, 1) column of the first token that is no padding.
        valid: (B, L), false for padding, and for slots whose token is behind the slots too or did not come yet.
        behind: () column of the first key behind the slots.
        total: S.
    """

    column: torch.Tensor
    first: torch.Tensor
    valid: torch.Tensor
    behind: torch.Tensor
    total: int


def find_keys(seen: torch.Tensor | None, sink: int, length: int, past: int) -> Keys:
    """Tell which tokens the keys of a block belong to.

    Args:
        seen: (B, S), true at the tokens that are no padding; None where none is.
        sink: slots for first tokens.
        length: L.
        past: how many of the keys a ``StreamingLayer`` kept; 0 where keys are those of the last L tokens.
    """
    # Without padding it is enough to count from the first key at hand.
    total = length if seen is None else seen.shape[1]
    place = torch.arange(length)[None]
    slot = (place < sink) & (place < past)
    first = torch.zeros(1, 1, dtype=torch.int64) if seen is None else _first(seen)
    column = torch.where(slot, first + place, place + (total - length))
    behind = slot.sum() + (total - length)
    valid = ~slot | (column < behind)
    if seen is not None:
        real = seen.gather(1, column.clamp(0, total - 1).expand(seen.shape[0], -1))
        valid = valid & real
    return Keys(column, first, valid, behind, total)


def _first(seen: torch.Tensor) -> torch.Tensor:
    # Whole numbers, which half precision leaves as they are.
    return seen.to(torch.int32).argmax(-1, keepdim=True)


def visible(keys: Keys, sink: int, window: int, new: int) -> torch.Tensor:
    """(B, 1, T, L), true where a query sees a key: one of the first ``sink``, or of the last ``window`` tokens."""
    query = torch.arange(new)[:, None] + (keys.total - new)
    distance = query - keys.column[:, None]
    near = (distance < window) | (keys.column - keys.first < sink)[:, None]
    return (keys.valid[:, None] & (distance >= 0) & near)[:, None]


def kept(keys: Keys, sink: int, window: int) -> torch.Tensor:
    """(B, M) which of the keys at hand the next calls may need, in their order; M is at most sink + window."""
    length = keys.column.shape[1]
    count = torch.sym_min(length, sink + window)
    place = torch.arange(count)[None]
    wanted = keys.first + place
    # A first token is in its slot, or still behind the slots.
    found = torch.where(wanted >= keys.behind, wanted - (keys.total - length), place)
    return torch.where(place < sink, found.clamp(max=length - 1), place + (length - count))


class Sight(NamedTuple):
    """What the queries of a block with a window see of the L keys at hand, and which keys are kept; see above."""

    length: int
    visible: torch.Tensor
    kept: torch.Tensor


_sights: Any = WeakTensorKeyDictionary()
"""Mask of all heads -> what follows from it, which is the same in every layer of a model."""


def _sight(mask: torch.Tensor | None, block: tuple[int, int], new: int, length: int, past: int) -> Sight:
    """``block`` is (sink, window); the others as in ``find_keys`` and ``visible``."""
    known = {} if mask is None else _sights.setdefault(mask, {})
    name = (*block, bool(past))
    if name not in known or known[name].length != length:
        keys = find_keys(seen_keys(mask), block[0], length, past)
        known[name] = Sight(length, visible(keys, *block, new), kept(keys, *block))
    found: Sight = known[name]
    return found


def attend_in_blocks(
    module: nn.Module,
    layout: AttentionLayout,
    heads: tuple[torch.Tensor, Any, Any],
    mask: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Attention of a streaming layer, block by block.

    Args:
        module: the caller.
        layout: with blocks.
        heads: queries (B, N, T, H), and keys and values (B, K, S, H), or the ``StreamingLayer`` that holds both.
        mask: (B, 1, T, S) of the heads that see all tokens; None where these see all earlier ones.
        **options: of the attention function.

    Returns:
        (B, T, N, H).
    """
    query, key, value = heads
    cache = key if isinstance(key, StreamingLayer) else None
    new, at = query.shape[2], 0
    mixed = []
    for index, (window, count) in enumerate(layout.blocks):
        queries = query[:, at * layout.group : (at + count) * layout.group]
        keys, values = (key[:, at : at + count], value[:, at : at + count]) if cache is None else cache.block(index)
        at += count
        if window and layout.bidirectional:
            mixed.append(attend_in_band(module, Band(layout.sink, window), (queries, keys, values), mask, **options))
            continue
        block_mask = mask
        if window:
            length = keys.shape[2]
            sight = _sight(mask, (layout.sink, window), new, length, 0 if cache is None else length - new)
            block_mask = sight.visible
            if cache is not None:
                cache.keep(index, sight.kept)
        mixed.append(sdpa_attention_forward(module, queries, keys, values, block_mask, **options)[0])
    return torch.cat(mixed, dim=2)


def visible_whole(seen: torch.Tensor | None, band: Band, new: int, total: int, bidirectional: bool) -> torch.Tensor:
    """(B, 1, T, S), true where a query of heads with a window sees a key, of all S tokens."""
    if bidirectional:
        return visible_in_band(seen, band, total)
    return visible(find_keys(seen, band.sink, total, 0), *band, new)


def visible_to_heads(layout: AttentionLayout, seen: torch.Tensor | None, new: int, total: int) -> torch.Tensor:
    """(B, N, T, S), true where a head sees a key: all heads side by side, in whatever order they are."""
    bands = [(Band(layout.sink, window or total), count * layout.group) for window, count in layout.blocks]
    found = [(visible_whole(seen, band, new, total, layout.bidirectional), heads) for band, heads in bands]
    return torch.cat([shown.expand(-1, heads, -1, -1) for shown, heads in found], dim=1)
