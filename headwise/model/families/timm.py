"""Vision models of timm, which are plain modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from headwise.model.families.record import Family, FeedForward, group_size

_MLP = FeedForward(up="mlp.fc1", down="mlp.fc2")

TIMM = Family(
    name="timm",
    attention="attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="proj",
    head_dim="head_dim",
    patches=True,
    mlp=_MLP,
    bookkeeping={"num_key_value_groups": group_size},
)
"""The attention of ViT and DeiT blocks; its layers are found by type, whatever the modules around them."""


def timm_family(attention: Any, block: nn.Module) -> Family:
    """The record of one block of timm: blocks differ in what they have around attention."""
    behind = {"ResPostBlock": "norm1"}.get(type(block).__name__, "")
    between = next((name for name in ("ls1", "ls") if hasattr(block, name)), behind)
    residual = "norm2" if isinstance(getattr(block, "ls2", None), nn.Identity) else ""
    # A norm over the neurons ties them together.
    tied = not isinstance(getattr(getattr(block, "mlp", None), "norm", None), nn.Identity | None)
    return replace(
        TIMM,
        between=between,
        qk_norm=not isinstance(attention.q_norm, nn.Identity),
        mlp=None if tied else replace(_MLP, residual=residual),
    )
