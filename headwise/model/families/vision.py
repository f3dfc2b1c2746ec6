"""Vision encoders."""

from __future__ import annotations

from headwise.model.families.record import (
    Family,
    FeedForward,
    group_size,
    head_width,
    query_heads,
)

VIT = Family(
    name="vit",
    model_types=("vit",),
    blocks="layers.*",
    attention="attention",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="o_proj",
    head_dim="head_dim",
    mlp=FeedForward(up="mlp.fc1", down="mlp.fc2", residual="layernorm_after", size="intermediate_size"),
    bookkeeping={"num_attention_heads": query_heads, "num_key_value_groups": group_size},
    config={"num_attention_heads": query_heads, "head_dim": head_width},
)
