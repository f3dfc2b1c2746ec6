"""Latent attention in the layout of DeepSeek-V3, whose stock class runs it without headwise.

That class puts a root mean square norm behind the latent. With a coordinate in the latent that is the same for every
token and much larger than all others together, the norm divides by a constant, which the projections behind it take
over; what is left of the difference is below the precision of float32. The constant also carries the biases of keys and
values, for which the class has no place.

Shape letters: D model width, N query heads, K kv heads, H head_dim, r rank of the latent, P and R as in
``latent_attention``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn

from headwise.errors import UnsupportedModelError
from headwise.model.access import find
from headwise.model.families.deepseek import deepseek_config
from headwise.model.latent_attention import LatentAttention
from headwise.model.view import AttentionView, ModelView

_FIXED = ("default", "linear", "llama3")
"""Kinds of rotary positions whose frequencies do not depend on the length of the text."""
_LARGER = 2.0**12
"""How many times larger than the rest of the latent the constant is: its square is beyond the precision of float32."""
_CONSTANT = 2.0**10
"""The constant itself; a power of two, so that scaling by it rounds nothing."""


def as_deepseek(view: ModelView) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and weights of ``DeepseekV3ForCausalLM`` that compute what a model with latent attention computes.

    Raises:
        UnsupportedModelError: that class cannot compute it.
    """
    original: Any = view.module.config
    _require_layout(view)
    kind = original.rope_parameters["rope_type"]
    if kind not in _FIXED:
        raise _cannot(f"its rotary positions are of the type {kind}", "load it with headwise.load")
    config = deepseek_config(original, view.layout.attention[0])
    _require_frequencies(view, config)
    tensors = dict(view.module.state_dict())
    for layer in view.attention:
        prefix = f"{layer.path}."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        norm: Any = find(layer.block, layer.family.latent_norm)
        tensors |= {prefix + name: tensor for name, tensor in _weights(layer, norm.weight).items()}
    return config, tensors


def _weights(layer: AttentionView, norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """One layer's attention under the names of the stock class; ``norm`` (D,) is the weight of the norm before it."""
    module, layout = layer.module, layer.layout
    assert isinstance(module, LatentAttention), "the layout says so"
    N, P, R, H = len(layout.query), layout.unrotated, layout.rotary, layout.head_dim
    like = module.out_proj.weight
    group, order = layout.group, module.frequencies[0].argsort()
    turned = torch.cat([order, order + R // 2])
    query = module.q_proj.weight.double().unflatten(0, (N, P + R)) * (module.scaling * math.sqrt(P + R))
    query = torch.cat([query[:, :P], query[:, P:][:, turned]], dim=1)
    identity = torch.eye(layout.latent, like.shape[0], dtype=torch.float64)
    down = module.kv_down.weight.double() if isinstance(module.kv_down, nn.Linear) else identity
    small = _scale(down, norm)
    assert module.rotary_key is not None, "refused otherwise"
    rotary = module.rotary_key.weight.double()[turned]
    inputs = torch.cat([down * small, torch.zeros(1, down.shape[1], dtype=torch.float64), rotary])
    bias = torch.zeros(len(inputs), dtype=torch.float64)
    bias[layout.latent] = _CONSTANT
    if module.rotary_key.bias is not None:
        bias[layout.latent + 1 :] = module.rotary_key.bias.double()[turned]
    # The norm divides by this; the constant becomes its inverse times itself.
    size = _CONSTANT / math.sqrt(layout.latent + 1)
    ups = [_heads(up, width, group) for up, width in ((module.k_up, P), (module.v_up, H)) if up is not None]
    up = torch.cat([torch.cat([w * (size / small), b[..., None] * (size / _CONSTANT)], dim=-1) for w, b in ups], dim=1)
    found = {
        "q_proj.weight": query.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": inputs,
        "kv_a_proj_with_mqa.bias": bias,
        "kv_a_layernorm.weight": torch.ones(layout.latent + 1),
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": like,
        "o_proj.bias": torch.zeros(len(like)) if module.out_proj.bias is None else module.out_proj.bias,
    }
    return {name: tensor.to(like).contiguous() for name, tensor in found.items()}


def _scale(down: torch.Tensor, norm: torch.Tensor) -> float:
    """The power of two that makes the latent of every input ``_LARGER`` times smaller than the constant.

    Inputs come from a root mean square norm: before its weights they have the length of the square root of D.
    """
    longest = float(torch.linalg.matrix_norm(down * norm.double(), ord=2)) * math.sqrt(down.shape[1])
    return 2.0 ** math.floor(math.log2(_CONSTANT / (_LARGER * max(longest, 1e-30))))


def _heads(up: nn.Module, width: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, width, r) and (N, width): the projection from the latent for every query head, and its bias."""
    assert isinstance(up, nn.Linear), "surgery builds them so"
    weight = up.weight.double().unflatten(0, (-1, width))
    bias = weight.new_zeros(weight.shape[:2]) if up.bias is None else up.bias.double().unflatten(0, (-1, width))
    return weight.repeat_interleave(group, dim=0), bias.repeat_interleave(group, dim=0)


def _require_layout(view: ModelView) -> None:
    """Raise UnsupportedModelError, with the reason, where the class has no place for something."""
    layouts = view.layout.attention
    shapes = {(len(x.query), x.head_dim, x.latent, x.rotary, x.unrotated) for x in layouts}
    if not all(layout.cached_latent for layout in layouts):
        raise _cannot("not every layer has latent attention", "apply latent-kv to all layers")
    if len(shapes) > 1:
        raise _cannot("layers differ in heads or widths of their latents", "give latent-kv one rank for all layers")
    if layouts[0].rotary_heads > 1 or not layouts[0].rotary:
        raise _cannot("not every head shares one rotary key", "use latent-kv with route: merge")
    for layer in view.attention:
        reason = _misfit(layer)
        if reason:
            raise _cannot(f"layer {layer.index} ({layer.family.name}) {reason}", "load it with headwise.load")


def _misfit(layer: AttentionView) -> str:
    """Why the blocks of the class cannot be like this one; empty where they can."""
    module: Any = layer.module
    if not layer.family.latent_norm:
        return "has another kind of block than DeepSeek-V3"
    if find(module, layer.family.window) if layer.family.window else None:
        return "sees a window of tokens only"
    if module.q_proj.bias is not None:
        return "has biases of queries"
    attention = f"{layer.family.attention}."
    if any(name.endswith("bias") for name, _ in layer.block.named_parameters() if not name.startswith(attention)):
        return "has biases in its MLP"
    return ""


def _require_frequencies(view: ModelView, config: Any) -> None:
    """Raise UnsupportedModelError unless the class would turn rotary keys by the angles that they are turned by."""
    own: Any = next(module.inv_freq for module in view.module.modules() if hasattr(module, "inv_freq"))
    rotary = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    for layer in view.attention:
        frequencies = layer.module.get_buffer("frequencies")[0].sort().values
        if len(frequencies) != len(rotary.inv_freq) or not torch.allclose(own[frequencies], rotary.inv_freq, rtol=1e-5):
            raise _cannot(
                f"rotary keys of layer {layer.index} are not turned by every frequency once",
                "use latent-kv with frequencies: every, and without rotary",
            )


def _cannot(found: str, fix: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"DeepseekV3ForCausalLM of transformers cannot be this model: {found}",
        expected="latent attention of equal layers with one rotary key, in a model with blocks like Llama's",
        fix=fix,
    )
