"""Modules of plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from headwise.model.families.record import (
    Family,
    FeedForward,
    group_size,
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
    cross=True,
    mlp=FeedForward(up="linear1", down="linear2"),
    bookkeeping={"num_heads": query_heads, "num_key_value_groups": group_size},
)
"""Modules built on ``nn.MultiheadAttention``; its layers are found by type, whatever the modules around them."""


def plain_family(block: nn.Module) -> Family:
    """The record of a block of a plain module, which knows what the block adds its MLP to.

    That is known for the layers of torch; a block that somebody wrote may normalise wherever it likes.
    """
    if not isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return PLAIN
    last_norm = "norm3" if isinstance(block, nn.TransformerDecoderLayer) else "norm2"
    assert PLAIN.mlp is not None
    return replace(PLAIN, mlp=replace(PLAIN.mlp, residual=last_norm if block.norm_first else "linear1"))
