"""The one row that costs are counted and latencies measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from headwise.calibration.tasks import Examples
from headwise.model.finding import longest_sequence

SEQUENCE = 128
"""Tokens of that row where neither the recipe nor the model says how long inputs are."""


def cost_row(module: nn.Module, examples: Examples, sequence: int | None) -> dict[str, Any]:
    """One sample, as long as engines are optimised for (``sequence``); else 128 tokens, or what the model can take."""
    longest = longest_sequence(module)
    length = sequence or min(SEQUENCE, longest or SEQUENCE)
    return one_row(examples.example_batch(), examples.dynamic_axes(), length)


def one_row(batch: Mapping[str, np.ndarray], dynamic: Mapping[str, tuple[int, ...]], length: int) -> dict[str, Any]:
    """A single row without padding, as long as ``length`` along every axis that varies.

    Args:
        batch: real samples, batch axis first.
        dynamic: input -> axes that vary, the batch axis included.
        length: size of the other varying axes; content is repeated to fill it.
    """
    row = {}
    for name, array in batch.items():
        axes = [axis for axis in dynamic.get(name, ()) if axis > 0]
        filled = array[:1] if 0 in dynamic.get(name, ()) else array
        for axis in axes:
            size = filled.shape[axis]
            positions = np.arange(length) % size
            positions[-1] = size - 1  # what ends a sequence, which some models look for
            filled = np.take(filled, positions, axis=axis)
        if name.endswith("attention_mask"):
            filled = np.ones_like(filled)
        elif name.endswith("padding_mask"):
            filled = np.zeros_like(filled)
        row[name] = np.ascontiguousarray(filled)
    return row
