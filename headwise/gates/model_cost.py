"""What a PyTorch model costs: parameters, multiply-accumulates, and what a kv cache would hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headwise.model.cache import CacheLayout
from headwise.model.counting import count_macs
from headwise.model.view import AttentionView, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Costs of a model.

    Attributes:
        parameters: weights and biases, shared ones once.
        macs: multiply-accumulates of matrix products, convolutions and attention, for the given inputs.
        attention_macs: the part inside attention layers, projections included.
        kv_bytes_per_token: what a float16 kv cache of all layers holds for one token; 0 where tokens see later ones,
            because such a model has no use for a cache. Heads that stream do not count here.
        kv_bytes_per_prompt_token: the same for one token of a prompt, of which layers may keep a share.
        kv_bytes_windows: what the same cache holds at most of heads that stream, however long the text is.
    """

    parameters: int
    macs: int
    attention_macs: int
    kv_bytes_per_token: int
    kv_bytes_per_prompt_token: int
    kv_bytes_windows: int

    def to_json(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "attention_macs": self.attention_macs,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_per_prompt_token": self.kv_bytes_per_prompt_token,
            "kv_bytes_windows": self.kv_bytes_windows,
        }


def model_cost(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> ModelCost:
    """Count by running the model once on ``inputs``."""
    counts = count_macs(view.module, inputs)
    return ModelCost(
        parameters=sum(p.numel() for p in view.module.parameters()),
        macs=counts[""],
        attention_macs=sum(counts.get(layer.path, 0) for layer in view.attention),
        kv_bytes_per_token=kv_bytes_per_token(view),
        kv_bytes_per_prompt_token=kv_bytes_per_prompt_token(view),
        kv_bytes_windows=kv_bytes_windows(view),
    )


def kv_bytes_per_token(view: ModelView) -> int:
    """See ``ModelCost``."""
    return 2 * sum(layer.runs * CacheLayout(layers=(layer.layout.cached,)).numbers for layer in _caching(view))


def kv_bytes_per_prompt_token(view: ModelView) -> int:
    """See ``ModelCost``."""
    layers = [(layer.runs, CacheLayout(layers=(layer.layout.cached,))) for layer in _caching(view)]
    return round(2 * sum(runs * cache.prompt_numbers for runs, cache in layers))


def kv_bytes_windows(view: ModelView) -> int:
    """See ``ModelCost``."""
    return 2 * sum(layer.runs * CacheLayout(layers=(layer.layout.cached,)).bounded for layer in _caching(view))


def _caching(view: ModelView) -> list[AttentionView]:
    return [layer for layer in view.attention if layer.family.causal]
