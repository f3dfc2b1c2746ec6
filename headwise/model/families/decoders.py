"""Causal language models."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.families.record import (
    Family,
    FeedForward,
    fused_widths,
    group_size,
    head_width,
    keyed_heads,
    kv_heads,
    query_heads,
    scoring_heads,
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

OPT = Family(
    name="opt",
    model_types=("opt",),
    blocks="decoder.layers.*",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="out_proj",
    head_dim="head_dim",
    causal=True,
    mlp=FeedForward(up="fc1", down="fc2", size="ffn_dim"),
    bookkeeping={"num_heads": query_heads},
    ungrouped=True,
)

GPT_NEOX = Family(
    name="gpt-neox",
    model_types=("gpt_neox",),
    blocks="layers.*",
    attention="attention",
    query="query_key_value",
    key="query_key_value",
    value="query_key_value",
    output="dense",
    head_dim="head_size",
    fused=True,
    interleaved=True,
    causal=True,
    rotary=True,
    partial_rotary=True,
    mlp=FeedForward(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", size="intermediate_size"),
    ungrouped=True,
)

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    blocks="layers.*",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="o_proj",
    head_dim="head_dim",
    causal=True,
    rotary=True,
    by_block=True,
    latent_norm="input_layernorm",
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

MISTRAL = replace(LLAMA, name="mistral", model_types=("mistral",), window="config.sliding_window")

QWEN2 = replace(LLAMA, name="qwen2", model_types=("qwen2",), window="sliding_window")

QWEN3 = replace(QWEN2, name="qwen3", model_types=("qwen3",), qk_norm=True)

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    query="qkv_proj",
    key="qkv_proj",
    value="qkv_proj",
    fused=True,
    partial_rotary=True,
    window="config.sliding_window",
    latent_norm="",
    mlp=FeedForward(
        up="mlp.gate_up_proj",
        down="mlp.down_proj",
        fused=True,
        residual="post_attention_layernorm",
        size="intermediate_size",
    ),
    bookkeeping={
        "config.num_attention_heads": scoring_heads,
        "num_key_value_heads": keyed_heads,
        "num_key_value_groups": group_size,
    },
)

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    model_types=("gemma2",),
    soft_cap="attn_logit_softcapping",
    window="sliding_window",
    between="post_attention_layernorm",
    by_block=False,
    latent_norm="",
    mlp=FeedForward(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", size="intermediate_size"),
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    soft_cap="",
    qk_norm=True,
)
