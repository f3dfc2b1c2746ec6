"""What a PyTorch model costs: parameters, multiply-accumulates, and what a kv cache would hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise.model.forward import run
from headwise.model.view import ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Costs of a model.

    Attributes:
        parameters: weights and biases, shared ones once.
        macs: multiply-accumulates of matrix products, convolutions and attention, for the given inputs.
        attention_macs: the part inside attention layers, projections included.
        kv_bytes_per_token: what a float16 kv cache of all layers holds for one token; 0 where tokens see later ones,
            because such a model has no use for a cache.
    """

    parameters: int
    macs: int
    attention_macs: int
    kv_bytes_per_token: int

    def to_json(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "attention_macs": self.attention_macs,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }


def model_cost(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> ModelCost:
    """Count by running the model once on ``inputs``."""
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={sdpa: _attention_flops})
    with counter, torch.inference_mode():
        run(view.module, dict(inputs))
    counts = counter.get_flop_counts()
    root = type(view.module).__name__
    per_layer = [sum(counts.get(f"{root}.{layer.path}", {}).values()) for layer in view.attention]
    return ModelCost(
        parameters=sum(p.numel() for p in view.module.parameters()),
        macs=counter.get_total_flops() // 2,
        attention_macs=sum(per_layer) // 2,
        kv_bytes_per_token=kv_bytes_per_token(view),
    )


def kv_bytes_per_token(view: ModelView) -> int:
    """See ``ModelCost``."""
    return 2 * sum(layer.runs * layer.cached for layer in view.attention if layer.family.causal)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values of fused attention on the CPU, which torch's own counter leaves out.

    Shapes (B, N, T, H), (B, K, S, H) and (B, K, S, H): every query head multiplies with all keys and values.
    """
    batch, heads, tokens, width = query
    pairs: int = prod((batch, heads, tokens, key[2]))
    return 2 * pairs * int(width + value[3])
