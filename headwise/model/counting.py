"""Multiply-accumulates of a module, counted while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from headwise.model.forward import run


def count_macs(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Dotted name of every module that multiplied -> multiply-accumulates, in one forward pass; ``""`` is all of it.

    Matrix products, convolutions and attention count; a module counts with what is inside it, as often as it runs.
    """
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={sdpa: _attention_flops})
    with counter, torch.inference_mode():
        run(module, dict(inputs))
    root = type(module).__name__
    counts = {
        name.removeprefix(f"{root}."): sum(found.values()) // 2 for name, found in counter.get_flop_counts().items()
    }
    return {**counts, "": counter.get_total_flops() // 2}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values of fused attention on the CPU, which torch's own counter leaves out.

    Shapes (B, N, T, H), (B, K, S, H) and (B, K, S, H): every query head multiplies with all keys and values.
    """
    batch, heads, tokens, width = query
    pairs: int = prod((batch, heads, tokens, key[2]))
    return 2 * pairs * int(width + value[3])
