"""Causal language models."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.families.record import (
    Family,
    FeedForward,
    fused_widths,
    group_size,
    head_width,
    kv_heads,
    query_heads,
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="h.*",
    attention="attn",
    query="c_attn",
    key="c_attn",
    value="c_attn",
    output="c_proj",
    head_dim="head_dim",
    fused=True,
    transposed=True,
    causal=True,
    mlp=FeedForward(up="mlp.c_fc", down="mlp.c_proj", residual="ln_2", size="n_inner"),
    bookkeeping={"num_heads": query_heads, "split_size": fused_widths, "num_key_value_groups": group_size},
)

LLAMA = Family(
    name="llama",
    model_types=("llama", "qwen2", "mistral"),
    blocks="layers.*",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="o_proj",
    head_dim="head_dim",
    causal=True,
    rotary=True,
    mlp=FeedForward(
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        residual="post_attention_layernorm",
        size="intermediate_size",
    ),
    bookkeeping={"num_key_value_groups": group_size},
    config={"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "head_dim": head_width},
)

QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",), qk_norm=True)
