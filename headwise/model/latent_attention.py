"""Multi-head latent attention of decoders: the cache holds one latent and one rotary key per token, nothing else.

Shape letters: B batch, T query tokens, S key tokens, D model width, N query heads, K kv heads, H head_dim, r rank of
the latent, P width of the part of a query that meets keys from the latent, R width of the part that meets rotary keys,
M rotary keys per token: one that all heads share, or one per kv head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.model.attention import linear
from headwise.model.grouped import attention_dropout, eager_attention
from headwise.model.latent import LatentProjections, Slot
from headwise.model.latent_form import chosen_form
from headwise.model.layout import AttentionLayout
from headwise.model.rotation import Tables, rotate, with_past


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionWeights:
    """The weights of ``LatentAttention`` except the output projection.

    Attributes:
        query: (N, P + R, D), of every head first the part that meets the latent; ``query_bias`` (N, P + R) or None.
        latent: from the latent to keys (K, P, r) and values (K, H, r), with their biases or without.
        rotary: (M, R, D) rotary keys, coordinates i and i + R / 2 a pair; ``rotary_bias`` (M, R) or None.
        frequencies: (M, R / 2) which of the model's frequencies turns a pair.
        angles: (F,) where positions turn the leading 2 F coordinates of keys from the latent; None where they do not.
    """

    query: torch.Tensor
    query_bias: torch.Tensor | None
    latent: LatentProjections
    rotary: torch.Tensor
    rotary_bias: torch.Tensor | None
    frequencies: torch.Tensor
    angles: torch.Tensor | None = None


class State(NamedTuple):
    """What the layers that share a latent compute with: of all S tokens of the cache and of this call.

    Attributes:
        latent: (B, 1, S, r); ``rotary``: (B, M, S, R), turned.
        tables: by which keys from the latent are turned; None where they are not.
    """

    latent: torch.Tensor
    rotary: torch.Tensor
    tables: Tables | None


PROJECTIONS = ("q_proj", "kv_down", "rotary_key", "k_up", "v_up", "out_proj")
"""The linear maps of ``LatentAttention``; a layer may lack some."""


class LatentAttention(nn.Module):
    """Causal self-attention of transformers by way of a latent.

    Takes the place of attention modules and is called as they are. A cache is given two tensors per layer, as if they
    were keys and values: the latents (B, 1, S, r) and the rotated rotary keys (B, M, S, R). A layer may read what an
    earlier one, its owner, gave its cache.

    Attributes:
        q_proj: D -> N * (P + R); ``kv_down`` D -> r, or the identity, or None where the owner has it; ``rotary_key``
            D -> M * R, or None; ``k_up`` r -> K * P; ``v_up`` r -> K * H; ``out_proj`` N * H -> D.
        frequencies: (M, R / 2).
        angles: (F,) or None, see ``LatentAttentionWeights``; keys that are turned cannot be absorbed.
        slot: where an owner leaves its state.
        num_key_value_groups: N / K; read by the attention functions.
    """

    frequencies: torch.Tensor
    angles: torch.Tensor | None

    def __init__(
        self, original: nn.Module, output: tuple[torch.Tensor, torch.Tensor | None], weights: LatentAttentionWeights
    ) -> None:
        super().__init__()
        source: Any = original
        self.config, self.layer_idx = source.config, source.layer_idx
        self.is_causal, self.scaling = source.is_causal, source.scaling
        self.attention_dropout = attention_dropout(source.config)
        self.resid_dropout = getattr(original, "resid_dropout", None) or nn.Identity()
        self.head_dim = weights.latent.value.shape[1]
        self.kv_heads = len(weights.latent.value)
        self.num_key_value_groups = len(weights.query) // self.kv_heads
        self.unrotated = weights.latent.key.shape[1]
        down = weights.latent.down
        self.q_proj = linear(*_flat(weights.query, weights.query_bias))
        kv_down = nn.Identity() if down is None else linear(down, None)
        self.kv_down = kv_down if weights.latent.owns else None
        self.rotary_key = linear(*_flat(weights.rotary, weights.rotary_bias)) if weights.rotary.shape[1] else None
        self.k_up = linear(*_flat(weights.latent.key, weights.latent.key_bias)) if self.unrotated else None
        self.v_up = linear(*_flat(weights.latent.value, weights.latent.value_bias))
        self.out_proj = linear(*output)
        self.register_buffer("frequencies", weights.frequencies.long())
        self.register_buffer("angles", None if weights.angles is None else weights.angles.float())
        self.slot = Slot()
        self.train(original.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Tables | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.unrotated + 2 * self.frequencies.shape[1]))
        plain, turned = query.transpose(1, 2).split([self.unrotated, 2 * self.frequencies.shape[1]], dim=-1)
        cache = layer_past if past_key_values is None else past_key_values
        state = self._state(hidden_states, position_embeddings, cache)
        if position_embeddings is not None:
            turned = self._turned(turned, position_embeddings, query.shape[2] // len(self.frequencies))
            plain = plain if self.angles is None else rotate(plain, position_embeddings)
        form = chosen_form(single=cache is not None and hidden_states.shape[1] == 1)
        attend = self._absorbed if form == "absorbed" and self.absorbs else self._unabsorbed
        mixed, weights = attend(plain, turned, state, attention_mask, kwargs)
        output: torch.Tensor = self.resid_dropout(self.out_proj(mixed.flatten(2)))
        return output, weights

    def _state(self, hidden: torch.Tensor, positions: Tables | None, cache: Any) -> State:
        """The owner's, or that of this layer, whose new tokens go into the cache."""
        if self.kv_down is None:
            found: State = self.slot.take()
            return found
        latent, rotary = self.kv_down(hidden)[:, None], self._rotary_keys(hidden)
        if positions is not None:
            rotary = self._turned(rotary, positions, 1)
        if cache is not None:
            latent, rotary = cache.update(latent, rotary, self.layer_idx)
        tables = None
        if self.angles is not None and positions is not None:
            tables = with_past(positions, self.angles, latent.shape[2])
        state = State(latent, rotary, tables)
        if self.slot.readers:
            self.slot.put(state)
        return state

    @property
    def absorbs(self) -> bool:
        """Whether there is an absorbed form."""
        return self.angles is None

    def lend_to(self, reader: LatentAttention) -> None:
        """Let a later layer read this one's state."""
        reader.slot = self.slot
        self.slot.readers += 1

    def _rotary_keys(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, M, T, R), not turned yet."""
        count, pairs = self.frequencies.shape
        if self.rotary_key is None:
            return hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 0)
        keys: torch.Tensor = self.rotary_key(hidden).unflatten(-1, (count, 2 * pairs)).transpose(1, 2)
        return keys

    def _turned(self, heads: torch.Tensor, positions: Tables, group: int) -> torch.Tensor:
        """Rotate (B, M * group, T, R) by angles whose cosines and sines are (B, T, F), twice over."""
        cos, sin = (table[..., self.frequencies].transpose(1, 2) for table in positions)
        cos, sin = (
            table.repeat_interleave(group, dim=1) if len(self.frequencies) > 1 else table for table in (cos, sin)
        )
        left, right = heads.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _unabsorbed(
        self,
        plain: torch.Tensor,
        turned: torch.Tensor,
        state: State,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, T, P) and (B, N, T, R) queries -> (B, T, N, H)."""
        latent, rotary, tables = state
        value = self.v_up(latent[:, 0]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        parts = [rotary.expand(-1, self.kv_heads, -1, -1)]
        if self.k_up is not None:
            keys = self.k_up(latent[:, 0]).unflatten(-1, (-1, self.unrotated)).transpose(1, 2)
            parts.insert(0, keys if tables is None else rotate(keys, tables))
        key, query = torch.cat(parts, dim=-1), torch.cat([plain, turned], dim=-1)
        # Fused kernels want queries, keys and values of one width.
        width = max(key.shape[-1], self.head_dim)
        query, key, value = (F.pad(heads, (0, width - heads.shape[-1])) for heads in (query, key, value))
        mixed, weights = self._attend(query, key, value, mask, options)
        return mixed[..., : self.head_dim], weights

    def _absorbed(
        self,
        plain: torch.Tensor,
        turned: torch.Tensor,
        state: State,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same; all query heads read one head, which is the latent with the rotary keys behind it."""
        latent, rotary, _ = state
        rank, count = latent.shape[-1], len(self.frequencies)
        parts = [latent, rotary.transpose(1, 2).flatten(2)[:, None]]
        queries = [plain.new_zeros(*plain.shape[:3], rank)]
        if self.k_up is not None:
            up = self.k_up.weight.unflatten(0, (self.kv_heads, self.unrotated))
            grouped = plain.unflatten(1, (self.kv_heads, -1))
            queries = [torch.einsum("bkgtp,kpr->bkgtr", grouped, up).flatten(1, 2)]
        if count > 1:
            # A query meets the rotary key of its own kv head only.
            own = torch.eye(count, dtype=turned.dtype, device=turned.device)
            turned = torch.einsum("bkgtr,km->bkgtmr", turned.unflatten(1, (count, -1)), own).flatten(4).flatten(1, 2)
        key = torch.cat(parts, dim=-1)
        mixed, weights = self._attend(torch.cat([*queries, turned], dim=-1), key, key, mask, options, shared=True)
        up = self.v_up.weight.unflatten(0, (self.kv_heads, self.head_dim))
        grouped = mixed[..., :rank].unflatten(2, (self.kv_heads, -1))
        values = torch.einsum("btkgr,khr->btkgh", grouped, up)
        if self.v_up.bias is not None:
            values = values + self.v_up.bias.unflatten(0, (self.kv_heads, 1, self.head_dim))
        return values.flatten(2, 3), weights

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
        *,
        shared: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        caller: Any = _Caller(self, query.shape[1]) if shared else self
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        found: tuple[torch.Tensor, torch.Tensor | None] = attend(
            caller, query, key, value, mask, dropout=dropout, scaling=self.scaling, **options
        )
        return found


class _Caller:
    """What attention functions ask their caller, where all query heads read one head."""

    def __init__(self, module: LatentAttention, group: int) -> None:
        self.num_key_value_groups = group
        self.training, self.is_causal, self.config = module.training, module.is_causal, module.config


def _flat(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(heads, width, D) and (heads, width) as one matrix and one bias."""
    return weight.flatten(0, 1), None if bias is None else bias.flatten()


def fits(module: LatentAttention, layout: AttentionLayout) -> bool:
    """Whether the weights have the shapes that the layout says."""
    down = module.kv_down
    rank = down.out_features if isinstance(down, nn.Linear) else module.v_up.in_features
    rotary = 0 if module.rotary_key is None else module.rotary_key.out_features
    queries = len(layout.query) * (layout.unrotated + layout.rotary // layout.rotary_heads)
    have = rank, rotary, module.q_proj.out_features, module.v_up.out_features
    return bool(have == (layout.latent, layout.rotary, queries, len(layout.kv) * layout.head_dim))
