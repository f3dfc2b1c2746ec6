"""Which head attends for which, decided from the first tokens of every sample (CHAI, arXiv 2403.08058).

Everything is made of tensor operations without a choice that depends on values, so that it can be a part of a graph.

Shape letters: B batch, T query tokens, S key tokens, N query heads, H head_dim, C clusters.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

FIRST = 5
"""Tokens whose attention weights decide, as in the paper."""


def membership(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, count: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average-linkage clusters of the causal attention maps on the first tokens, each with its medoid.

    Args:
        query: (B, N, T, H).
        key: (B, N, S, H), the keys that each head reads; S is T.
        seen: (B or 1, S), true at the tokens that are no padding.
        count: C, from 1 to N.
        scale: factor on the products of queries and keys.

    Returns:
        (B, C) positions of the representatives, rising, and (B, N) index of every head's representative among them.
    """
    similarity = _similarity(query, key, seen, scale)
    # Exactly symmetric: the members of a pair are equally central, and rounding must not decide between them.
    own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    distance = (1 - (similarity + similarity.mT) / 2).masked_fill(own, 0.0)
    together = _clusters(distance, count)
    # The medoid of its cluster: the member with the smallest sum of distances to the others.
    spread = (distance * together).sum(-1)[:, None].masked_fill(~together, float("inf"))
    medoid = spread.argmin(-1)
    heads = torch.arange(distance.shape[-1], device=distance.device)
    representatives = (medoid == heads).to(distance.dtype).topk(count, dim=-1).indices.sort(-1).values
    index = (representatives[:, None] == medoid[..., None]).to(distance.dtype).argmax(-1)
    return representatives, index


def _similarity(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, N, N) cosine between the heads' attention maps on the first valid tokens."""
    start = seen.to(query.dtype).argmax(-1)
    steps = torch.arange(FIRST, device=query.device)
    places = (start[:, None] + steps).clamp_max(seen.shape[-1] - 1)[:, None, :, None]
    rows, heads, _, width = query.shape
    queries, keys = (found.gather(2, places.expand(rows, heads, FIRST, width)) for found in (query, key))
    hidden = torch.ones(FIRST, FIRST, dtype=torch.bool, device=query.device).triu(1)
    scores = (queries @ keys.mT * scale).masked_fill(hidden, float("-inf"))
    maps = F.normalize(torch.softmax(scores, dim=-1).flatten(2), dim=-1)
    return maps @ maps.mT


def _clusters(distance: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N, N), true where two heads are in one cluster: the nearest two are joined until ``count`` are left."""
    heads = distance.shape[-1]
    together = torch.eye(heads, dtype=torch.bool, device=distance.device).expand_as(distance)
    # A cluster is known by its first head; the others' rows and columns are infinitely far away.
    gaps = distance.masked_fill(together, float("inf"))
    sizes = torch.ones_like(distance[..., 0])
    positions = torch.arange(heads, device=distance.device)
    for _ in range(heads - count):
        nearest = gaps.flatten(1).argmin(-1)
        left, right = nearest // heads, nearest % heads
        first = positions == torch.minimum(left, right)[:, None]
        second = positions == torch.maximum(left, right)[:, None]
        one, two = ((sizes * chosen).sum(-1, keepdim=True) for chosen in (first, second))
        joined = (one * _row(gaps, first) + two * _row(gaps, second)) / (one + two)
        gaps = torch.where(first[..., None], joined[:, None], torch.where(first[:, None], joined[..., None], gaps))
        gaps = gaps.masked_fill(second[..., None] | second[:, None] | (first[..., None] & first[:, None]), float("inf"))
        members = (together & first[..., None]).any(1) | (together & second[..., None]).any(1)
        together = together | (members[..., None] & members[:, None])
        sizes = torch.where(first, one + two, sizes)
    return together


def _row(gaps: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(B, N), the chosen row of every sample; infinite entries stay so."""
    return gaps.masked_fill(~chosen[..., None], float("inf")).amin(1)
