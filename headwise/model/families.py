"""One record per model family: where its attention layers are and how they store their heads.

This is the only file that knows attribute names of other people's models. A pass or an exporter that needs to know
more about a family is a reason to add a field here, never to branch on a model type elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from headwise.errors import UnsupportedModelError, did_you_mean
from headwise.model.layout import AttentionLayout

Count = Callable[[AttentionLayout], int | list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture stores multi-head attention.

    Attributes:
        name: the family's name in reports.
        model_types: ``config.model_type`` values of transformers that this record describes.
        blocks: dotted path from the base model to the transformer blocks; ``*`` stands for the index.
        attention: path from a block to its attention module.
        query: path from the attention module to the query projection; likewise ``key``, ``value``, ``output``.
        head_dim: path from the attention module to the width of one head.
        fused: query, key and value are the thirds of one matrix, named by ``query``.
        transposed: weights are stored as (in, out), as in the Conv1D of GPT-2.
        causal: every token sees only itself and earlier tokens.
        rotary: queries and keys are rotated by their position, in pairs of coordinates half a head apart.
        qk_norm: queries and keys are normalised between projection and score.
        bookkeeping: attributes of the attention module that depend on the head counts.
        padding_positions: position embeddings start counting behind the padding id, as in RoBERTa.
        config: entries of a stock config that express a layout whose layers are all equal; empty where the stock
            class derives the head width from the head count, so that it cannot express fewer heads.
    """

    name: str
    model_types: tuple[str, ...] = ()
    blocks: str = ""
    attention: str
    query: str
    key: str
    value: str
    output: str
    head_dim: str
    fused: bool = False
    transposed: bool = False
    causal: bool = False
    rotary: bool = False
    qk_norm: bool = False
    padding_positions: bool = False
    bookkeeping: Mapping[str, Count] = field(default_factory=dict)
    config: Mapping[str, Count] = field(default_factory=dict)

    def longest_sequence(self, config: Any) -> int | None:
        """How many tokens a model with this config can take, or None where it sets no limit."""
        longest = getattr(config, "max_position_embeddings", None)
        if not isinstance(longest, int):
            return None
        return longest - config.pad_token_id - 1 if self.padding_positions else longest


def _queries(layout: AttentionLayout) -> int:
    return len(layout.query)


def _kvs(layout: AttentionLayout) -> int:
    return len(layout.kv)


def _group(layout: AttentionLayout) -> int:
    return layout.group


def _head_dim(layout: AttentionLayout) -> int:
    return layout.head_dim


def _fused_widths(layout: AttentionLayout) -> list[int]:
    kv_width = len(layout.kv) * layout.head_dim
    return [_query_width(layout), kv_width, kv_width]


def _query_width(layout: AttentionLayout) -> int:
    return len(layout.query) * layout.head_dim


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
    bookkeeping={
        "self.num_attention_heads": _queries,
        "self.all_head_size": _query_width,
        "self.num_key_value_groups": _group,
    },
)

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
    bookkeeping={"n_heads": _queries, "num_key_value_groups": _group},
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
    bookkeeping={"num_attention_heads": _queries, "num_key_value_groups": _group},
    config={"num_attention_heads": _queries, "head_dim": _head_dim},
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
    bookkeeping={"num_heads": _queries, "split_size": _fused_widths, "num_key_value_groups": _group},
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
    bookkeeping={"num_key_value_groups": _group},
    config={"num_attention_heads": _queries, "num_key_value_heads": _kvs, "head_dim": _head_dim},
)

QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",), qk_norm=True)

PLAIN = Family(
    name="torch",
    attention="",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="out_proj",
    head_dim="head_dim",
    bookkeeping={"num_heads": _queries},
)
"""Modules built on ``nn.MultiheadAttention``; its layers are found by type, whatever the modules around them."""

FAMILIES: Mapping[str, Family] = {
    model_type: family
    for family in (BERT, ROBERTA, DISTILBERT, VIT, GPT2, LLAMA, QWEN3)
    for model_type in family.model_types
}


def family_of(model_type: str) -> Family:
    """The record of a transformers ``model_type``.

    Raises:
        UnsupportedModelError: there is none; the message lists those that exist.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f'model type "{model_type}" has no family record',
            expected="one of: " + ", ".join(sorted(FAMILIES)),
            fix=did_you_mean(model_type, FAMILIES) + "  A new family is one record: see CONTRIBUTING.md",
        )
    return FAMILIES[model_type]
