"""Models that continue a text token by token: which ones they are, and their caches as named tensors.

Shape letters: B batch, S tokens of the past, T tokens of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from headwise.model.cache import PAST, PRESENT, SHIFT, CacheLayout, CacheTensor
from headwise.model.forward import input_names
from headwise.model.layout import Layout
from headwise.model.prompt_cache import Held, PromptLayer
from headwise.model.view import ModelView
from headwise.model.window_cache import StreamingLayer
from headwise.model.windows import find_keys


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
    if online:
        return f"layers {', '.join(online)} form their clusters from the first tokens, which later calls do not see"
    if all(layer.layout.streaming and 0 not in layer.layout.windows for layer in view.attention):
        return "no head sees all tokens, so that no cache says how many there were"
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
    """The cache of transformers that holds these tensors; layers that the checkpoint gave a window keep all tokens.

    Args:
        layout: what the layers cache: up to two tensors each, two for every block of heads of a streaming layer, or
            keys, values and a shift where a share of every prompt is kept.
        past: by the names of ``layout.past()``.
    """
    cache = DynamicCache()
    for index, tensors in enumerate(layout.layers):
        if prunes(tensors):
            cache.layers.append(PromptLayer(Held(*(past[f"{PAST}.{index}.{tensor.name}"] for tensor in tensors))))
            continue
        if streams(tensors):
            parts = [past[f"{PAST}.{index}.{tensor.name}"] for tensor in tensors]
            windowed = tensors[0].longest is not None
            blocks = list(zip(parts[::2], parts[1::2], strict=True))
            cache.layers.append(StreamingLayer(blocks, windowed=windowed))
            continue
        kind: Any = SingleTensorLayer if len(tensors) == 1 else DynamicLayer
        layer = kind()
        given = [past[f"{PAST}.{index}.{tensor.name}"] for tensor in tensors]
        if given:
            layer.lazy_initialization(given[0], given[-1])
            layer.keys, layer.values = given if len(given) == 2 else (given[0], None)
        cache.layers.append(layer)
    return cache


def streams(tensors: Sequence[CacheTensor]) -> bool:
    """Whether a layer that caches these tensors keeps some tokens only in some of them."""
    return any(tensor.longest is not None for tensor in tensors)


def prunes(tensors: Sequence[CacheTensor]) -> bool:
    """Whether a layer that caches these tensors keeps a share of every prompt."""
    return any(tensor.budget is not None for tensor in tensors)


def cache_slots(tensors: Sequence[CacheTensor]) -> list[str]:
    """Where the layer of ``make_cache`` keeps each tensor, as a path from the layer."""
    if not streams(tensors):
        return ["keys", "values", SHIFT][: len(tensors)]
    plain = [name for name, tensor in zip(("keys", "values"), tensors, strict=False) if tensor.longest is None]
    return plain + [f"windows.{index}" for index in range(len(tensors) - len(plain))]


def empty_past(layout: CacheLayout, rows: int) -> dict[str, torch.Tensor]:
    """What the first call of a batch is given."""
    return {name: torch.zeros([int(dim) for dim in t.dims(rows, 0)]) for name, t in layout.past().items()}


def read_cache(layout: CacheLayout, cache: DynamicCache) -> dict[str, torch.Tensor]:
    """The tensors of a cache, by the names of ``layout.present()``."""
    found: dict[str, torch.Tensor] = {}
    for index, tensors in enumerate(layout.layers):
        layer: Any = cache.layers[index]
        match layer:
            case StreamingLayer():
                values = layer.tensors()
            case PromptLayer():
                values = list(layer.held)
            case _:
                values = [layer.keys, layer.values]
        found |= {f"{PRESENT}.{index}.{tensor.name}": value for tensor, value in zip(tensors, values, strict=False)}
    return found


def held(layout: Layout, mask: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """What a cache holds of heads with a window: (B, tokens), true where that is a token, by names of ``present()``.

    Args:
        layout: of the model.
        mask: (B, S) 1 at tokens and 0 at padding, of everything read so far.
    """
    seen = torch.as_tensor(mask).bool()
    found: dict[str, NDArray[np.bool_]] = {}
    for index, layer in enumerate(layout.attention):
        for tensor in layer.cached:
            if tensor.longest is not None:
                count = min(tensor.longest, mask.shape[1])
                valid = find_keys(seen, layer.sink, count, count).valid
                found[f"{PRESENT}.{index}.{tensor.name}"] = np.asarray(valid.numpy())
    return found


def positions(mask: NDArray[np.integer], new: int) -> NDArray[np.int64]:
    """(B, T) positions of the last ``new`` tokens, counted from the first one that is no padding.

    Args:
        mask: (B, S + T), 1 at tokens and 0 at padding, on whichever side that is.
        new: T.
    """
    counted = np.cumsum(mask, axis=1, dtype=np.int64) - 1
    return np.maximum(counted, 0)[:, counted.shape[1] - new :]
