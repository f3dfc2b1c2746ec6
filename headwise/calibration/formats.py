"""Number formats as arithmetic on arrays: codes from values, and values from codes.

All formats are symmetric: zero is a code, and no format has a zero point. Shape letters: K inputs, N outputs of a
weight matrix, and blocks of inputs that share a row of scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from headwise.model.quantization import Codes, Format

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The codes of a format.

    Attributes:
        dtype: of the codes.
        largest: code that the largest magnitude is mapped to.
        lowest: smallest code, for integers.
        block: inputs per scale that the format prescribes; None leaves the choice.
        bits: of a code in the graph.
    """

    dtype: np.dtype[Any]
    largest: float
    lowest: int | None = None
    block: int | None = None
    bits: int = 8


GRIDS: Mapping[Format, Grid] = {
    "int8": Grid(dtype=np.dtype(np.int8), largest=127, lowest=-128),
    "fp8": Grid(dtype=np.dtype(ml_dtypes.float8_e4m3fn), largest=448),
    "int4": Grid(dtype=np.dtype(ml_dtypes.int4), largest=7, lowest=-8, bits=4),
    "nvfp4": Grid(dtype=np.dtype(ml_dtypes.float4_e2m1fn), largest=6, block=16, bits=4),
    "mxfp8": Grid(dtype=np.dtype(ml_dtypes.float8_e4m3fn), largest=448, block=32),
}
_SCALE_GRID = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST_SCALE = 448.0


def encode(values: Array, scale: Array | float, number: Format) -> Array:
    """The nearest code of ``values / scale``, ties to even, clipped to the format's range."""
    grid = GRIDS[number]
    steps = np.asarray(values, np.float32) / np.asarray(scale, np.float32)
    if grid.lowest is not None:
        steps = np.rint(steps)
    # np.clip keeps NaN, which must not turn into a number here
    low = -grid.largest if grid.lowest is None else grid.lowest
    return np.clip(steps, low, grid.largest).astype(grid.dtype)


def decode(codes: Array, scale: Array | float) -> Array:
    """float32 values of codes."""
    return np.asarray(codes.astype(np.float32) * np.asarray(scale, np.float32))


def representable(scale: Array | float, dtype: np.dtype[Any]) -> Array:
    """The nearest scales that ``dtype`` can hold, as float32; what would vanish becomes its smallest number."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    inside = np.clip(np.asarray(scale, np.float32), float(info.smallest_subnormal), float(info.max))
    return np.asarray(inside.astype(dtype).astype(np.float32))


def input_scale(largest: float, number: Format, dtype: np.dtype[Any]) -> float:
    """The scale of an activation tensor whose magnitude ``largest`` becomes the largest code.

    In nvfp4 it is the factor that the scales of all blocks share; the largest of them is the largest fp8 number.
    """
    return float(representable(largest / GRIDS[number].largest / (_LARGEST_SCALE if number == "nvfp4" else 1), dtype))


def round_blocks(values: Array, shared: float, dtype: np.dtype[Any]) -> Array:
    """(R, K) the numbers that nvfp4 codes of activations stand for; a block whose scale vanishes becomes zeros.

    Args:
        values: (R, K), K a multiple of 16.
        shared: factor of the scales of all blocks.
        dtype: of the graph.
    """
    grid = GRIDS["nvfp4"]
    blocks = np.asarray(values, np.float32).reshape(-1, grid.block or 1)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    wanted = np.minimum(largest / np.float32(grid.largest * shared), _LARGEST_SCALE)
    scale = wanted.astype(_SCALE_GRID).astype(np.float32) * np.float32(shared)
    codes = encode(blocks, np.where(scale == 0, 1.0, scale), "nvfp4")
    return decode(codes, scale.astype(dtype)).reshape(values.shape)


def quantize_weight(
    weight: Array, number: Format, *, block: int | None, dtype: np.dtype[Any], shrink: Array | float = 1.0
) -> Codes:
    """Codes of a matrix by rounding to the nearest.

    Args:
        weight: (K, N) float32.
        number: the format.
        block: inputs per scale; it divides K. None is one scale per output.
        dtype: of the scales in the graph.
        shrink: share of the largest magnitude that the largest code stands for; a number, or one per scale.
    """
    scale, shared = weight_scale(weight, number, block=block, dtype=dtype, shrink=shrink)
    codes = encode(weight, spread(effective(scale, shared, dtype), block), number)
    return Codes(values=codes, scale=scale, shared=shared)


def weight_scale(
    weight: Array, number: Format, *, block: int | None, dtype: np.dtype[Any], shrink: Array | float = 1.0
) -> tuple[Array, float]:
    """(N,) or (K / block, N) scales and the factor that they share, see ``Codes``."""
    grid = GRIDS[number]
    blocks = weight[None] if block is None else weight.reshape(-1, block, weight.shape[1])
    largest = np.abs(blocks).max(axis=1) * shrink
    largest = np.where(largest == 0, 1.0, largest) / grid.largest  # a column of zeros has any scale
    if number == "mxfp8":
        return np.exp2(np.ceil(np.log2(largest))).astype(np.float32), 1.0
    if number == "nvfp4":
        shared = float(representable(largest.max() / _LARGEST_SCALE, dtype))
        return representable(np.minimum(largest / shared, _LARGEST_SCALE), _SCALE_GRID), shared
    scale = representable(largest, dtype)
    return (scale[0] if block is None else scale), 1.0


def effective(scale: Array, shared: float, dtype: np.dtype[Any]) -> Array:
    """The scales as the graph computes them: a shared factor is multiplied in the dtype of the graph."""
    return scale if shared == 1.0 else representable(scale * np.float32(shared), dtype)


def spread(scale: Array, block: int | None) -> Array:
    """Scales for every weight: (K, N) from (K / block, N), or (1, N) from (N,)."""
    return scale[None] if block is None else np.repeat(scale, block, axis=0)


def restore(codes: Codes, block: int | None, dtype: np.dtype[Any]) -> Array:
    """(K, N) float32 weights of a quantized matrix."""
    return decode(codes.values, spread(effective(codes.scale, codes.shared, dtype), block))
