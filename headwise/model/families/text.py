"""Text encoders."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.families.record import (
    Family,
    FeedForward,
    group_size,
    query_heads,
    query_width,
)

BERT = Family(
    name="bert",
    model_types=("bert",),
    blocks="encoder.layer.*",
    attention="attention",
    query="self.query",
    key="self.key",
    value="self.value",
    output="output.dense",
    head_dim="self.attention_head_size",
    caller="self",
    mlp=FeedForward(
        up="intermediate.dense", down="output.dense", residual="intermediate.dense", size="intermediate_size"
    ),
    bookkeeping={
        "self.num_attention_heads": query_heads,
        "self.all_head_size": query_width,
        "self.num_key_value_groups": group_size,
    },
)

ELECTRA = replace(BERT, name="electra", model_types=("electra",))

ROBERTA = replace(BERT, name="roberta", model_types=("roberta",), padding_positions=True)

DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    blocks="transformer.layer.*",
    attention="attention",
    query="q_lin",
    key="k_lin",
    value="v_lin",
    output="out_lin",
    head_dim="attention_head_size",
    mlp=FeedForward(up="ffn.lin1", down="ffn.lin2", residual="ffn.lin1", size="hidden_dim"),
    bookkeeping={"n_heads": query_heads, "num_key_value_groups": group_size},
)

CLIP_TEXT = Family(
    name="clip-text",
    model_types=("clip_text_model",),
    blocks="encoder.layers.*",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="out_proj",
    head_dim="head_dim",
    mlp=FeedForward(up="mlp.fc1", down="mlp.fc2", residual="layer_norm2", size="intermediate_size"),
    bookkeeping={"num_heads": query_heads, "num_key_value_groups": group_size},
)
"""Every token sees earlier ones only, but no text is generated: there is no cache, so that it is not ``causal``."""
