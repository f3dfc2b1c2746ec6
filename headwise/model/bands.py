"""Attention of an encoder in which some heads see a band and the first tokens (Longformer, arXiv 2004.05150).

A query sees the keys fewer than ``window`` tokens away on either side, and the first ``sink`` tokens; these global
tokens see all tokens themselves. Queries are cut into chunks of ``window`` tokens. A chunk meets the keys of itself and
of its two neighbours, and those of the global tokens: work grows with the length of the input, not with its square.
First tokens are the first columns of a batch, because encoders are padded behind their tokens.

Shape letters: B batch, T tokens, H head_dim, N query heads, K kv heads; C = window queries and L = sink + 3 C keys of
each of n chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.model.masks import seen_keys

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values."""


class Band(NamedTuple):
    """What the heads of a block see: the first ``sink`` tokens, and those fewer than ``window`` away."""

    sink: int
    window: int


class Chunks(NamedTuple):
    """Where the queries and keys of chunks are in a batch, and what sees what.

    Attributes:
        queries: (n * C,) columns; places behind the last token hold the last token once more.
        keys: (n * L,) columns likewise, of every chunk first those of the global tokens.
        visible: (B, n, C, L), or (1, n, C, L) where nothing is padded.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    visible: torch.Tensor


def visible_in_band(seen: torch.Tensor | None, band: Band, total: int) -> torch.Tensor:
    """(B, 1, T, T), true where a query sees a key, without cutting; a token that is padding sees at least itself.

    Args:
        seen: (B, T), true at the tokens that are no padding; None where none is.
        band: what heads see.
        total: T.
    """
    column = torch.arange(total)
    distance = (column[:, None] - column).abs()
    first = column < band.sink
    near = (distance < band.window) | first | first[:, None]
    return ((near if seen is None else near & seen[:, None]) | (distance == 0)).reshape(-1, 1, total, total)


def cut(seen: torch.Tensor | None, band: Band, total: int) -> Chunks:
    """Cut a batch into chunks; the arguments are those of ``visible_in_band``."""
    sink, size = band
    start = torch.arange((total + size - 1) // size)[:, None] * size
    queries = start + torch.arange(size)
    place = torch.arange(sink + 3 * size)
    banded = place >= sink
    keys = torch.where(banded, start - size + place - sink, place)
    index = keys.clamp(0, total - 1)
    valid = ((keys >= 0) & (keys < total))[None]
    if seen is not None:
        valid = valid & seen.index_select(1, index.flatten()).unflatten(1, (-1, sink + 3 * size))
    distance = (queries[:, :, None] - keys[:, None]).abs()
    # A global token is a key once, even where it is near.
    near = ~banded | ((distance < size) & (keys >= sink)[:, None])
    # Rows without any key would be no numbers, in later layers of real tokens too.
    alone = (distance == 0) & banded & ~valid[:, :, None]
    return Chunks(queries.clamp(max=total - 1).flatten(), index.flatten(), (valid[:, :, None] & near) | alone)


_chunks: Any = WeakTensorKeyDictionary()
"""Mask of all heads -> its chunks by band, which are the same in every layer of a model."""


def attend_in_band(
    module: nn.Module,
    band: Band,
    heads: Heads,
    mask: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Attention of a block of heads with the same band.

    Args:
        module: the caller.
        band: what the heads see.
        heads: queries (B, N, T, H), keys and values (B, K, T, H).
        mask: (B, 1, T, T) of the heads that see all tokens; None where nothing is padded.
        **options: of the attention function.

    Returns:
        (B, T, N, H).
    """
    query, key, value = heads
    total, seen = query.shape[2], seen_keys(mask)
    if isinstance(total, int) and total <= band.sink + 3 * band.window:
        # Of a known length that is short, chunks would be more work than all scores.
        return _mixed(module, heads, visible_in_band(seen, band, total), options)
    known = {} if mask is None else _chunks.setdefault(mask, {})
    if band not in known:
        known[band] = cut(seen, band, total)
    chunks, size = known[band], band.sink + 3 * band.window
    parts = (
        _chunked(query, chunks.queries, band.window),
        _chunked(key, chunks.keys, size),
        _chunked(value, chunks.keys, size),
    )
    shown = chunks.visible.expand(query.shape[0], -1, -1, -1).flatten(0, 1)[:, None]
    mixed = _mixed(module, parts, shown, options).unflatten(0, (query.shape[0], -1)).flatten(1, 2)
    if not band.sink:
        cropped: torch.Tensor = mixed[:, :total]
        return cropped
    column, first = torch.arange(total), torch.arange(band.sink).clamp(max=total - 1)
    every = None if seen is None else seen[:, None, None] | (column == first[:, None])
    whole = _mixed(module, (query.index_select(2, first), key, value), every, options)
    place = torch.where(column < band.sink, column, column + band.sink)
    return torch.cat([whole, mixed], dim=1).index_select(1, place)


def _mixed(module: nn.Module, heads: Heads, mask: torch.Tensor | None, options: Mapping[str, Any]) -> torch.Tensor:
    """(B, T, N, H) by the attention function of transformers."""
    found: torch.Tensor = sdpa_attention_forward(module, *heads, mask, **options)[0]
    return found


def _chunked(heads: torch.Tensor, columns: torch.Tensor, size: int) -> torch.Tensor:
    """(B, heads, T, H) as (B * n, heads, size, H)."""
    chunks: torch.Tensor = heads.index_select(2, columns).unflatten(2, (-1, size))
    return chunks.transpose(1, 2).flatten(0, 1)
