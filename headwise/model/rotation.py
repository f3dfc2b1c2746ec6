"""Rotary positions: heads turned by them, and the angles of tokens that earlier calls have read.

Shape letters: B batch, T tokens of a call, S all tokens, H head_dim, F frequencies.
"""

from __future__ import annotations

import torch

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (B or 1, tokens, 2 F) each, every frequency twice: as transformers hands them to its layers."""


def rotate(heads: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Turn the leading 2 F coordinates of (B, heads, tokens, H); coordinates i and i + F are a pair."""
    cos, sin = tables
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]
    return torch.cat([turned, rest], dim=-1)


def with_past(new: Tables, angles: torch.Tensor, tokens: int) -> Tables:
    """The tables of all S tokens, from those of the last T.

    Tokens of the past have the positions in front of the first new one. The model hands out no tables for them, but
    turning back by a distance is a product of two turns. Padding on the left is where nothing looks at it.

    Args:
        new: of the T tokens of this call.
        angles: (F,) by how much every frequency turns from one token to the next.
        tokens: S.
    """
    cos, sin = new
    past = tokens - cos.shape[1]
    distance = past - torch.arange(past, device=cos.device)
    turns = (distance[:, None] * angles.float()).repeat(1, 2)
    back_cos, back_sin = turns.cos().to(cos.dtype), turns.sin().to(sin.dtype)
    first_cos, first_sin = cos[:, :1], sin[:, :1]
    past_cos = first_cos * back_cos + first_sin * back_sin
    past_sin = first_sin * back_cos - first_cos * back_sin
    return torch.cat([past_cos, cos], dim=1), torch.cat([past_sin, sin], dim=1)
