"""The demo's model: a small vision transformer with two output heads, written the way a plain PyTorch project would."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoHeadViT(nn.Module):
    """Says which digit an 8x8 image shows, and whether that digit is even or odd.

    The encoder is a stock ``nn.TransformerEncoder`` (and so ``nn.MultiheadAttention``), pre-norm, batch first. The
    image is cut in 2x2 patches: 16 patch tokens and one class token, with learned positions (arXiv 2010.11929).

    Args:
        width: model width; a multiple of ``heads``.
        heads: attention heads in each layer.
        layers: encoder layers.
    """

    def __init__(self, *, width: int = 72, heads: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.digit = nn.Linear(width, 10)
        self.parity = nn.Linear(width, 2)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Classify a batch of images.

        Args:
            pixel_values: (batch, 1, 8, 8) float, 0 to 1.

        Returns:
            ``digit``: (batch, 10) and ``parity``: (batch, 2) logits; parity 1 is odd.
        """
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.positions
        summary = self.encoder(tokens)[:, 0]
        return {"digit": self.digit(summary), "parity": self.parity(summary)}


def two_head_vit() -> TwoHeadViT:
    """The untrained model, as checkpoints name it: ``headwise.demo.model:two_head_vit``."""
    return TwoHeadViT()
