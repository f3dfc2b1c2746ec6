"""The shape of a family record, and the head counts that records write into modules and configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headwise.model.layout import AttentionLayout

Count = Callable[[AttentionLayout], int | list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """How one architecture stores the MLP of a block. All paths start at the block.

    Attributes:
        up: the projection into the neurons.
        down: the projection out of them; its input is what the neurons give.
        gate: a second projection into the neurons, behind whose activation their values are multiplied (SwiGLU and its
            like); empty where there is none.
        fused: gate and up are the halves of one matrix, named by ``up``; the gate is the first half.
        residual: the module whose input is the residual stream that the MLP's output is added to: the norm in front of
            the MLP, or ``up`` itself where norms come behind the addition. Empty where something changes the output
            before it is added, and where attention and MLP read and add to the same stream side by side.
        size: the entry of a stock config that holds the number of neurons; empty where there is none.
    """

    up: str
    down: str
    gate: str = ""
    fused: bool = False
    residual: str = ""
    size: str = ""


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
        mlp: where the blocks keep their MLP; None where they have none that can be pruned.
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
    mlp: FeedForward | None = None
    bookkeeping: Mapping[str, Count] = field(default_factory=dict)
    config: Mapping[str, Count] = field(default_factory=dict)

    def longest_sequence(self, config: Any) -> int | None:
        """How many tokens a model with this config can take, or None where it sets no limit."""
        longest = getattr(config, "max_position_embeddings", None)
        if not isinstance(longest, int):
            return None
        return longest - config.pad_token_id - 1 if self.padding_positions else longest


def query_heads(layout: AttentionLayout) -> int:
    """How many query heads there are."""
    return len(layout.query)


def kv_heads(layout: AttentionLayout) -> int:
    """How many kv heads there are."""
    return len(layout.kv)


def group_size(layout: AttentionLayout) -> int:
    """Query heads per kv head."""
    return layout.group


def head_width(layout: AttentionLayout) -> int:
    """Width of one head."""
    return layout.head_dim


def fused_widths(layout: AttentionLayout) -> list[int]:
    """Rows of query, key and value in one fused matrix."""
    kv_width = len(layout.kv) * layout.head_dim
    return [query_width(layout), kv_width, kv_width]


def query_width(layout: AttentionLayout) -> int:
    """Width of all query heads side by side."""
    return len(layout.query) * layout.head_dim
