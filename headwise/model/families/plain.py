"""Modules of plain PyTorch."""

from __future__ import annotations

from headwise.model.families.record import (
    Family,
    FeedForward,
    query_heads,
)

PLAIN = Family(
    name="torch",
    attention="",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="out_proj",
    head_dim="head_dim",
    mlp=FeedForward(up="linear1", down="linear2"),
    bookkeeping={"num_heads": query_heads},
)
"""Modules built on ``nn.MultiheadAttention``; its layers are found by type, whatever the modules around them."""
