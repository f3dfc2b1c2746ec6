"""Models that continue a text token by token: which ones they are, and their caches as named tensors.

Shape letters: B batch, S tokens of the past, T tokens of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from headwise.model.cache import PAST, PRESENT, CacheLayout
from headwise.model.forward import input_names
from headwise.model.view import ModelView


def why_no_cache(view: ModelView) -> str:
    """Why a model cannot keep keys and values between calls, as a clause behind "because"; empty where it can."""
    module = view.module
    if not isinstance(module, PreTrainedModel) or not isinstance(module, GenerationMixin) or not module.can_generate():
        return f"{type(module).__name__} does not generate text"
    if not all(layer.family.causal and not layer.family.decoder for layer in view.attention):
        return "not every layer is one of a decoder without an encoder"
    if not {"input_ids", "attention_mask", "position_ids", PAST} <= set(input_names(module)):
        return f"{type(module).__name__} does not take a cache and positions"
    numbers = [getattr(layer.module, "layer_idx", None) for layer in view.attention]
    if numbers != list(range(len(numbers))):
        return "not every layer has a place of its own in the cache"
    online = [str(layer.index) for layer in view.attention if layer.layout.online]
    alone = [str(layer.index) for layer in view.attention if len(layer.layout.cached) == 1]
    if alone:
        return f"layers {', '.join(alone)} cache one tensor, and the caches of transformers hold two"
    if online:
        return f"layers {', '.join(online)} form their clusters from the first tokens, which later calls do not see"
    return ""


class SingleTensorLayer(DynamicLayer):
    """The cache of a layer that keeps one tensor, and gives an empty one for the second."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The past and the new tokens, and as many tokens of width 0."""
        past: Any = self.keys
        self.keys = torch.cat([past, key_states], dim=-2)
        return self.keys, self.keys[..., :0]


def make_cache(layout: CacheLayout, past: Mapping[str, torch.Tensor]) -> DynamicCache:
    """The cache of transformers that holds these tensors; all layers keep all tokens, those with a window too.

    Args:
        layout: what the layers cache: up to two tensors each.
        past: by the names of ``layout.past()``.
    """
    cache = DynamicCache()
    for index, tensors in enumerate(layout.layers):
        kind: Any = SingleTensorLayer if len(tensors) == 1 else DynamicLayer
        layer = kind()
        given = [past[f"{PAST}.{index}.{tensor.name}"] for tensor in tensors]
        if given:
            layer.lazy_initialization(given[0], given[-1])
            layer.keys, layer.values = given if len(given) == 2 else (given[0], None)
        cache.layers.append(layer)
    return cache


def empty_past(layout: CacheLayout, rows: int) -> dict[str, torch.Tensor]:
    """What the first call of a batch is given."""
    return {name: torch.zeros([int(dim) for dim in t.dims(rows, 0)]) for name, t in layout.past().items()}


def read_cache(layout: CacheLayout, cache: DynamicCache) -> dict[str, torch.Tensor]:
    """The tensors of a cache, by the names of ``layout.present()``."""
    found: dict[str, torch.Tensor] = {}
    for index, tensors in enumerate(layout.layers):
        layer: Any = cache.layers[index]
        found |= {
            f"{PRESENT}.{index}.{tensor.name}": value
            for tensor, value in zip(tensors, (layer.keys, layer.values), strict=False)
        }
    return found


def positions(mask: NDArray[np.integer], new: int) -> NDArray[np.int64]:
    """(B, T) positions of the last ``new`` tokens, counted from the first one that is no padding.

    Args:
        mask: (B, S + T), 1 at tokens and 0 at padding, on whichever side that is.
        new: T.
    """
    counted = np.cumsum(mask, axis=1, dtype=np.int64) - 1
    return np.maximum(counted, 0)[:, counted.shape[1] - new :]
