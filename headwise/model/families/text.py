"""Text encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    bidirectional=True,
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
    bidirectional=True,
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
    refuses={"prune-tokens": "its tokens see earlier ones only, and tokens are chosen for all queries of a sample"},
)
"""Every token sees earlier ones only, but no text is generated: there is no cache, so that it is not ``causal``."""


def _albert_runs(config: Any, index: tuple[int, ...]) -> int:
    """ALBERT's layers pass through its groups of blocks in turn, each as often as its share of the layers."""
    group, _ = index
    per_group = config.num_hidden_layers / config.num_hidden_groups
    return sum(int(layer / per_group) == group for layer in range(config.num_hidden_layers))


ALBERT = Family(
    name="albert",
    model_types=("albert",),
    blocks="encoder.albert_layer_groups.*.albert_layers.*",
    attention="attention",
    query="query",
    key="key",
    value="value",
    output="dense",
    head_dim="attention_head_size",
    runs=_albert_runs,
    mlp=FeedForward(up="ffn", down="ffn_output", residual="ffn", size="intermediate_size"),
    bookkeeping={
        "num_attention_heads": query_heads,
        "all_head_size": query_width,
        "num_key_value_groups": group_size,
    },
)

DEBERTA_V2 = Family(
    name="deberta-v2",
    model_types=("deberta-v2",),
    blocks="encoder.layer.*",
    attention="attention",
    query="self.query_proj",
    key="self.key_proj",
    value="self.value_proj",
    output="output.dense",
    head_dim="self.attention_head_size",
    caller="self",
    # Queries and keys of positions, where they do not share the projections of queries and keys of tokens.
    per_head={
        f"self.{projection}.{parameter}": 0
        for projection in ("pos_query_proj", "pos_key_proj")
        for parameter in ("weight", "bias")
    },
    mlp=FeedForward(
        up="intermediate.dense", down="output.dense", residual="intermediate.dense", size="intermediate_size"
    ),
    bookkeeping={"self.num_attention_heads": query_heads, "self.all_head_size": query_width},
    refuses={
        "share-kv": "its scores have terms between keys and the positions of the very same head, and its class gives "
        "keys as many heads as queries",
        "cluster-heads": "its class computes scores itself, with terms of positions for every head",
        "latent-kv": "its keys are also projected from positions, of which the latent knows nothing",
        "prune-tokens": "its class computes scores itself, with terms of positions for all tokens",
        "share-layers": "its keys are also projected from positions, which belong to no other layer's keys",
    },
)
