"""timm's ``Attention`` with one matrix per projection; timm itself is not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headwise.errors import UnsupportedModelError
from headwise.model.attend import attend, require_all_seen
from headwise.model.attention import linear
from headwise.tolerances import TWIN


class TimmAttention(nn.Module):
    """The self-attention of timm's ViT and DeiT blocks, for any number of query and kv heads.

    Called as timm's module is. Shapes: B batch, T tokens, D model width, N query heads, K kv heads, H head_dim.

    Attributes:
        q_proj: (N * H, D); ``k_proj`` and ``v_proj``: (K * H, D); ``proj``: (D, N * H).
        q_norm: over H, or the identity; ``k_norm`` likewise.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.head_dim = original.head_dim
        self.num_key_value_groups = 1
        biases = (None,) * 3 if original.qkv.bias is None else original.qkv.bias.detach().chunk(3)
        weights = original.qkv.weight.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (linear(*pair) for pair in zip(weights, biases, strict=True))
        self.q_norm, self.k_norm = original.q_norm, original.k_norm
        self.attn_drop, self.proj, self.proj_drop = original.attn_drop, original.proj, original.proj_drop

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        require_all_seen(self, attn_mask is None and not is_causal)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.attn_drop.p if self.training else 0.0
        query, key = self.q_norm(query), self.k_norm(key)
        mixed, _ = attend(self, query, key, value, attn_mask, dropout=dropout, is_causal=is_causal)
        output: torch.Tensor = self.proj_drop(self.proj(mixed.flatten(2)))
        return output


def unpack_timm(module: nn.Module) -> None:
    """Replace every ``Attention`` of timm below ``module`` by the equal ``TimmAttention``, in place.

    Raises:
        UnsupportedModelError: it has options that mix heads behind attention, or computes something else.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Attention" and type(child).__module__.partition(".")[0] == "timm":
                setattr(parent, name, _unpacked(child))


def _unpacked(original: Any) -> TimmAttention:
    if (
        not isinstance(getattr(original, "norm", None), nn.Identity | None)
        or getattr(original, "gate", None) is not None
    ):
        raise UnsupportedModelError(
            "timm's Attention with scale_norm or gated, which work on the outputs of all heads together",
            expected="head outputs that go straight to the output projection",
            fix="use a model without these options",
        )
    found, training = TimmAttention(original), original.training
    x = torch.randn(1, 5, found.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(found.q_proj.weight)
    with torch.no_grad():
        expected, actual = original.eval()(x), found.eval()(x)
    if not float((actual - expected).abs().max()) <= TWIN * max(float(expected.abs().max()), 1e-6):
        raise UnsupportedModelError(
            "timm's Attention does not compute what headwise knows of it",
            expected="softmax attention as in timm 1.0",
            fix="use timm 1.0, and please report it with the version that you have",
        )
    return found.train(training)
