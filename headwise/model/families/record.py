"""The shape of a family record, and the head counts that records write into modules and configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from headwise.model.layout import AttentionLayout

Count = Callable[[AttentionLayout], int | list[int]]
Runs = Callable[[Any, tuple[int, ...]], int]
"""Config and index of a block -> how often one forward passes through the block."""


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
class HandedOn:
    """What the first layer of a stack computes for all of them, one entry per query head, as T5 its position bias.

    Layers that differ in their heads each compute their own: see ``headwise.model.handed``.

    Attributes:
        argument: of the attention module's forward, by which later layers get it; with None they compute their own.
        table: path from the attention module to the module that it is computed from; empty where the class makes it up.
        flag: path to what says that the attention module has the table; empty where there is no table.
    """

    argument: str
    table: str = ""
    flag: str = ""


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
        caller: path from the attention module to the module that calls the attention function of transformers.
        fused: query, key and value are parts of one matrix, named by ``query``: first all query heads, then all key
            heads, then all value heads.
        interleaved: the matrix is fused head by head: query, key and value of the first head, then of the second.
        transposed: weights are stored as (in, out), as in the Conv1D of GPT-2.
        causal: every token sees only itself and earlier tokens, whose keys and values a cache keeps.
        bidirectional: every token sees all tokens, by the attention function of transformers, which gets no more than a
            mask of padding; heads can be given bands.
        rotary: queries and keys are rotated by their position, in pairs of coordinates half a head apart.
        partial_rotary: only a leading part of every head is rotated; the config's rope parameters say how large it is.
        qk_norm: queries and keys are normalised between projection and score.
        soft_cap: path from the attention module to the bound that a tanh keeps scores in; empty, or None there, where
            scores are used as they are.
        window: path from the attention module to how many tokens back a token sees; empty, or None there, for all.
        between: path from a block to the module that its attention output passes before it is added to the residual
            stream; empty, or an ``nn.Identity`` there, where it is added as it is.
        patches: tokens are patches of an image, of which no attention mask says anything.
        bookkeeping: attributes of the attention module that depend on the head counts. Entries of its config are
            written to a config of the layer's own.
        ungrouped: the class only runs with as many keys and values as queries; other layers get a module of headwise
            in its place, which ``regrouped`` describes.
        refuses: passes that cannot be right on this class -> the reason, as a clause behind "because".
        positions: the entry of the config that says how many tokens the model can take.
        padding_positions: position embeddings start counting behind the padding id, as in RoBERTa.
        also: further kinds of attention layers in the same models, in the order in which they run in a block: each a
            record of its own, as with the attention of a decoder to its encoder.
        decoder: the layer belongs to a decoder that runs behind an encoder.
        cross: keys and values are, or may be, projected from another sequence than queries.
        residual: path from a block to the module whose input is the residual stream that this layer's output is added
            to; empty where that is the block itself, or where no module's input is.
        runs: how often a block runs where layers share one; None where every block runs once.
        per_head: paths from the attention module to further parameters with an equal part for every query head -> the
            axis along which the heads lie; a module may lack them.
        handed_on: what the first layer of a stack computes for the others; None where each layer computes all itself.
        by_block: blocks need nothing but hidden states and the mask, and what their config says, so that a model of one
            block runs on stored hidden states.
        latent_norm: path from a block to the norm in front of its attention, where blocks are those of DeepSeek-V3
            except for their attention; empty for all others.
        mlp: where the blocks keep their MLP; None where they have none that can be pruned.
        other_mlp: what blocks have instead of ``mlp`` under other options of the config.
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
    caller: str = ""
    fused: bool = False
    interleaved: bool = False
    transposed: bool = False
    causal: bool = False
    bidirectional: bool = False
    rotary: bool = False
    partial_rotary: bool = False
    qk_norm: bool = False
    soft_cap: str = ""
    window: str = ""
    between: str = ""
    patches: bool = False
    ungrouped: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    positions: str = "max_position_embeddings"
    padding_positions: bool = False
    also: tuple[Family, ...] = ()
    decoder: bool = False
    cross: bool = False
    residual: str = ""
    runs: Runs | None = None
    per_head: Mapping[str, int] = field(default_factory=dict)
    handed_on: HandedOn | None = None
    by_block: bool = False
    latent_norm: str = ""
    mlp: FeedForward | None = None
    other_mlp: tuple[FeedForward, ...] = ()
    bookkeeping: Mapping[str, Count] = field(default_factory=dict)
    config: Mapping[str, Count] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Family, ...]:
        """The record itself and those of further kinds of layers in the same models."""
        return (self, *self.also)

    def longest_sequence(self, config: Any) -> int | None:
        """How many tokens a model with this config can take, or None where it sets no limit."""
        longest = getattr(config, self.positions, None)
        if not isinstance(longest, int):
            return None
        return longest - config.pad_token_id - 1 if self.padding_positions else longest

    def rotated(self, config: Any, head_dim: int) -> int:
        """How many leading coordinates of every head are rotated by their position."""
        if not self.rotary or not self.partial_rotary:
            return head_dim if self.rotary else 0
        pairs = math.ceil(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) / 2)
        return 2 * pairs

    def regrouped(self) -> Family:
        """The record of ``GroupedAttention`` in the place of this family's attention modules."""
        return replace(
            self,
            query="q_proj",
            key="k_proj",
            value="v_proj",
            output="out_proj",
            head_dim="head_dim",
            fused=False,
            interleaved=False,
            transposed=False,
            ungrouped=False,
            bookkeeping={"num_key_value_groups": group_size},
        )

    def with_latent(self) -> Family:
        """The record of ``LatentAttention`` in the place of this family's attention modules."""
        plain = self.regrouped()
        return replace(plain, key="kv_down", value="v_up", caller="", per_head={}, bookkeeping={})


def query_heads(layout: AttentionLayout) -> int:
    """How many query heads there are."""
    return len(layout.query)


def kv_heads(layout: AttentionLayout) -> int:
    """How many kv heads there are."""
    return len(layout.kv)


def scoring_heads(layout: AttentionLayout) -> int:
    """How many query heads have queries of their own."""
    return len(layout.scoring)


def keyed_heads(layout: AttentionLayout) -> int:
    """How many kv heads have keys."""
    return len(layout.keyed)


def group_size(layout: AttentionLayout) -> int:
    """Query heads per kv head."""
    return layout.group


def head_width(layout: AttentionLayout) -> int:
    """Width of one head."""
    return layout.head_dim


def fused_widths(layout: AttentionLayout) -> list[int]:
    """Rows of query, key and value in one fused matrix."""
    return [len(heads) * layout.head_dim for heads in (layout.scoring, layout.keyed, layout.kv)]


def query_width(layout: AttentionLayout) -> int:
    """Width of all query heads side by side."""
    return len(layout.query) * layout.head_dim
