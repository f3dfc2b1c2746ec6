"""What quantization does to a matrix product, on a sample of tokens. R tokens, K inputs, N outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.calibration.formats import decode, encode, input_scale, round_blocks
from headwise.model.quantization import MatrixPlan

Array = NDArray[Any]
ReadInput = Callable[[Array, MatrixPlan, np.dtype[Any]], Array]
"""What a product of some runtime reads of its input: (tokens, plan, dtype of the graph) -> tokens."""


def quantized_input(rows: Array, plan: MatrixPlan, dtype: np.dtype[Any]) -> Array:
    """(R, K) what a quantized product reads of its input, through constant scales of ``dtype``."""
    if plan.format is None or plan.input_largest is None:
        return rows
    scale = input_scale(plan.input_largest, plan.format, dtype)
    if plan.format == "nvfp4":
        return round_blocks(rows, scale, dtype)
    return decode(encode(rows, scale, plan.format), scale)


def dynamic_input(rows: Array, plan: MatrixPlan, dtype: np.dtype[Any]) -> Array:
    """(R, K) the same for 8-bit codes between the lowest and the highest value of these rows (and zero)."""
    del dtype
    if plan.input_largest is None:
        return rows
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.rint(-low / step)
    return np.asarray((np.clip(np.rint(rows / step) + zero, 0, 255) - zero) * np.float32(step))


def relative_error(expected: Array, found: Array) -> float:
    """Squared error as a part of the squared size of what was expected; 0 where nothing was."""
    size = float(np.square(expected, dtype=np.float64).sum())
    return float(np.square(expected - found, dtype=np.float64).sum()) / size if size else 0.0
