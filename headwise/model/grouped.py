"""What lets layers have head counts of their own: a config per layer, and attention with fewer kv than query heads.

Shape letters: B batch, T query tokens, S key tokens, N query heads, K kv heads, H head_dim, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.model.access import assign
from headwise.model.rotation import rotate


class LayerConfig:
    """The config of one layer: what a layer has of its own, and otherwise the config that all layers share."""

    def __init__(self, shared: Any, own: Mapping[str, Any]) -> None:
        self.__dict__.update(_shared=shared, _own=dict(own))

    def __getattr__(self, name: str) -> Any:
        # Copying asks for special methods before there is anything to look into.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            self._own[name] = value
        else:
            setattr(self._shared, name, value)


def own_config(module: nn.Module, name: str, value: Any) -> None:
    """Give an attention module a config entry of its own; the shared config stays as it is."""
    config: Any = module.config
    shared, own = (config._shared, config._own) if isinstance(config, LayerConfig) else (config, {})
    assign(module, "config", LayerConfig(shared, {**own, name: value}))


class GroupedAttention(nn.Module):
    """Self-attention of transformers with any number of queries, keys and values, with rotary positions or without.

    Takes the place of attention modules whose class has as many keys and values as queries, or has all projections in
    one matrix where some of them must go. It is called as they are, and calls the attention function that the config
    names.

    Attributes:
        q_proj: (N * H, D); ``k_proj`` and ``v_proj``: (K * H, D), with fewer queries and keys in a clustered layer;
            ``out_proj``: (D, N * H).
        num_key_value_groups: query heads per kv head; read by the attention functions.
    """

    config: Any
    layer_idx: Any
    is_causal: Any
    scaling: Any

    def __init__(self, original: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.config = original.config
        self.layer_idx = original.layer_idx
        self.head_dim = head_dim
        self.num_key_value_groups = 1
        self.is_causal = original.is_causal
        self.scaling = original.scaling
        self.attention_dropout = attention_dropout(self.config)
        self.resid_dropout = getattr(original, "resid_dropout", None) or nn.Identity()
        # Surgery puts the weights in.
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_empty(next(original.parameters())) for _ in range(4))
        self.train(original.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            query, key = (rotate(heads, position_embeddings) for heads in (query, key))
        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output: torch.Tensor = self.resid_dropout(self.out_proj(mixed.flatten(2)))
        return output, weights


def attention_dropout(config: Any) -> float:
    """The share of attention weights that training drops, by its name in the configs of transformers."""
    found = getattr(config, "attention_dropout", None)
    return float(getattr(config, "attn_pdrop", 0.0) if found is None else found)


def _empty(like: torch.Tensor) -> nn.Linear:
    return nn.Linear(1, 1, bias=False, device=like.device, dtype=like.dtype).requires_grad_(like.requires_grad)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in single steps, which can return its weights; called as attention functions of transformers are."""
    group = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
