"""One scale per channel of keys and values, in a form that leaves one scale per tensor to the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LARGEST_EXPONENT = 8
"""Keeps the scaled projections far from the ends of fp16."""
_SMALLEST = 1e-5


def channel_exponents(largest: Array, *, width: int, pairs: Sequence[tuple[int, int]] = ()) -> Array:
    """(N * H,) exponents, not whole: divided by two to these, all channels have about the same largest magnitude.

    Args:
        largest: (N * H,) largest magnitude of every channel of N heads.
        width: H.
        pairs: channels of a head that rotary positions mix; they get one scale.
    """
    heads = np.maximum(largest.astype(np.float64), _SMALLEST).reshape(-1, width)
    for first, second in pairs:
        heads[:, first] = heads[:, second] = np.maximum(heads[:, first], heads[:, second])
    logs = np.log2(heads).reshape(-1)
    return np.asarray((logs - logs.mean()).clip(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))
