"""What quantization does to a matrix product, on a sample of tokens. R tokens, K inputs, N outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.calibration.formats import decode, encode, input_scale
from headwise.model.quantization import Format

Array = NDArray[Any]


def quantized_input(rows: Array, number: Format, largest: float | None, dtype: np.dtype[Any]) -> Array:
    """(R, K) what a quantized product reads of its input; ``largest`` None is the input itself."""
    if largest is None:
        return rows
    scale = input_scale(largest, number, dtype)
    return decode(encode(rows, scale, number), scale)


def relative_error(expected: Array, found: Array) -> float:
    """Squared error as a part of the squared size of what was expected; 0 where nothing was."""
    size = float(np.square(expected, dtype=np.float64).sum())
    return float(np.square(expected - found, dtype=np.float64).sum()) / size if size else 0.0
