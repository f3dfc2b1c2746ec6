"""Named arrays, and the dtypes that graphs and engines have; numpy has no bfloat16, so it is converted here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Dims = tuple[int | str, ...]

BF16, FP8 = "bfloat16", "float8_e4m3fn"
ANY = "any"
"""The size of an axis that varies, where it has no name."""


class Port(NamedTuple):
    """An input or output.

    Attributes:
        dtype: as numpy names it, or ``bfloat16`` or ``float8_e4m3fn``.
        dims: sizes; an axis that varies has a name.
    """

    dtype: str
    dims: Dims


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """What numpy holds an array of this dtype in: the bits of a bfloat16 as uint16, and of an fp8 number as uint8."""
    return np.dtype({BF16: "uint16", FP8: "uint8"}.get(dtype, dtype))


def store(array: Array, dtype: str) -> Array:
    """A contiguous array with the bits that ``dtype`` has; bfloat16 is rounded to the nearest, ties to even.

    fp8 is what caches hold, which go back as they came: such an array is empty, or has these bits already.
    """
    if dtype != BF16:
        return np.ascontiguousarray(array, dtype=stored_dtype(dtype))
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded).astype(np.uint16)


def restore(array: Array, dtype: str) -> Array:
    """The other way round: half precision comes back as float32, everything else as it is."""
    if dtype == BF16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return as_float32(array)


def as_float32(array: Array) -> Array:
    """fp16 as float32; everything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array
