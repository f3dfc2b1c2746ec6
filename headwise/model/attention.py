"""Attention modules that run layers which the original classes cannot express."""

from __future__ import annotations

import torch
from torch import nn

from headwise.errors import UnsupportedModelError
from headwise.model.attend import attend, require_all_seen


class MultiHeadAttention(nn.Module):
    """``nn.MultiheadAttention`` with one matrix per projection, so that any number of heads of any width fits.

    Takes and returns what ``nn.MultiheadAttention`` does. Shapes below: B batch, T query tokens, S key tokens, D model
    width, N heads, H head_dim.

    Attributes:
        q_proj: (N * H, D); ``k_proj`` (K * H, kdim) and ``v_proj`` (K * H, vdim) with K kv heads, at first N.
        out_proj: (D, N * H).
    """

    # Read by nn.TransformerEncoder(Layer) to choose its packed fast path, which this module does not have.
    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        if original.bias_k is not None or original.add_zero_attn:
            raise UnsupportedModelError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn",
                expected="attention over the given keys only",
                fix="train without these options: their extra key belongs to no head's projection",
            )
        self.num_heads = original.num_heads
        self.num_key_value_groups = 1
        self.head_dim = original.head_dim
        self.dropout = original.dropout
        self.batch_first = original.batch_first
        if original.in_proj_weight is not None:
            weights = original.in_proj_weight.detach().chunk(3)
        else:
            weights = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
        biases = (None,) * 3 if original.in_proj_bias is None else original.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = linear(original.out_proj.weight, original.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        require_all_seen(self, attn_mask is None and not is_causal and key is query)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._heads(self.q_proj(query))
        k = self._heads(self.k_proj(key))
        v = self._heads(self.v_proj(value))
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, q, k, v, mask, dropout=dropout, is_causal=is_causal, need_weights=need_weights)
        output = self.out_proj(mixed.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, T, N * H) -> (B, N, T, H)."""
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, -1, self.head_dim).transpose(1, 2)

    def _mask(
        self, q: torch.Tensor, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The two masks as one that is added to the scores, broadcastable to (B, N, T, S)."""
        mask = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                raise UnsupportedModelError(
                    "an attn_mask with one entry per head",
                    expected="a mask of shape (T, S) that all heads share",
                    fix="give the mask without the head axis: a removed head has no entry any more",
                )
            mask = _additive(attn_mask, q)[None, None]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            mask = padding if mask is None else mask + padding
        return mask


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer with a copy of these weights, (out, in) and (out,)."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A boolean mask (True = not attended) as 0 / lowest finite number; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, torch.finfo(like.dtype).min / 2)


def unpack_attention(module: nn.Module) -> None:
    """Replace every ``nn.MultiheadAttention`` below ``module`` by the equal ``MultiHeadAttention``, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, MultiHeadAttention(child).train(child.training))
        if isinstance(parent, nn.TransformerEncoder):
            # The nested-tensor path reads the packed weights of its layers.
            parent.use_nested_tensor = False
