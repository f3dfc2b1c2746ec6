"""A tiny ViT of timm; where timm is not installed, one that is built and typed as timm's are."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """The interface and the arithmetic of ``timm.layers.Attention``."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.gate: nn.Module | None = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(qkv[0]), self.k_norm(qkv[1])
        mixed = F.scaled_dot_product_attention(query, key, qkv[2], attn_mask, is_causal=is_causal)
        output: torch.Tensor = self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).flatten(2))))
        return output


Attention.__module__ = "timm.layers.attention"


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """The names of ``timm.layers.Mlp``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.norm: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(self.norm(self.act(self.fc1(x))))
        return output


class Block(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, hidden)
        self.ls1, self.ls2 = LayerScale(dim, 0.5), LayerScale(dim, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        output: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return output


class VisionTransformer(nn.Module):
    """Patches, blocks and a classifier."""

    def __init__(self, dim: int, depth: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, hidden) for _ in range(depth)))
        self.head = nn.Linear(dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2))
        output: torch.Tensor = self.head(tokens.mean(dim=1))
        return output


def timm_attention(dim: int, num_heads: int, *, qk_norm: bool = False) -> nn.Module:
    """timm's own attention module with biases, or the one above."""
    if importlib.util.find_spec("timm") is None:
        return Attention(dim, num_heads, qk_norm=qk_norm)
    from timm.layers.attention import Attention as Original  # type: ignore[import-not-found]

    found: nn.Module = Original(dim, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    return found


def timm_vit(dim: int = 32, depth: int = 3, num_heads: int = 4, hidden: int = 48) -> nn.Module:
    """Factory for checkpoints of a tiny ViT for images of 8 x 8 pixels, with layer scale."""
    if importlib.util.find_spec("timm") is None:
        return VisionTransformer(dim, depth, num_heads, hidden)
    import timm  # type: ignore[import-not-found]

    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": dim, "depth": depth, "num_heads": num_heads}
    model: nn.Module = timm.models.VisionTransformer(**sizes, mlp_ratio=hidden / dim, init_values=0.5, num_classes=3)
    return model
