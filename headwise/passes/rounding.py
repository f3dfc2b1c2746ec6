"""Codes of a weight matrix: nearest, clipped where that makes the product better, or with GPTQ's feedback."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.calibration.formats import decode, effective, encode, quantize_weight, restore, spread, weight_scale
from headwise.model.quantization import Codes, Format

Array = NDArray[Any]

SHRINKS = tuple(float(share) for share in np.linspace(1.0, 0.5, 11))
"""Shares of the largest weight that clipping tries as the largest code."""
_DAMPING = 0.01
"""Added to the second moment, in units of its mean diagonal."""
_COLUMNS = 128
"""Inputs whose errors are passed on together."""


def best_shrink(weight: Array, rows: Array, number: Format, *, block: int | None, dtype: np.dtype[Any]) -> Array:
    """(N,) or (K / block, N) share of the largest weight to keep, by the error of the product on calibration tokens.

    The clipping of AWQ (arXiv 2306.00978). Blocks are judged one by one, as if the others were exact.

    Args:
        weight: (K, N).
        rows: (R, K) tokens.
        number: the format.
        block: inputs per scale.
        dtype: of the scales in the graph.
    """
    inputs, outputs = weight.shape
    size = inputs if block is None else block
    blocks = rows.reshape(len(rows), inputs // size, size)
    moment = np.einsum("rbi,rbj->bij", blocks, blocks, optimize=True)
    errors = []
    for shrink in SHRINKS:
        codes = quantize_weight(weight, number, block=block, dtype=dtype, shrink=shrink)
        delta = (weight - restore(codes, block, dtype)).reshape(-1, size, outputs)
        errors.append(((moment @ delta) * delta).sum(axis=1))
    best = np.asarray(SHRINKS, np.float32)[np.argmin(errors, axis=0)]
    return np.asarray(best[0] if block is None else best)


def gptq(
    weight: Array,
    moment: Array,
    number: Format,
    *,
    block: int | None,
    dtype: np.dtype[Any],
    shrink: Array | float = 1.0,
) -> Codes:
    """Codes whose errors are made good by the inputs that are not rounded yet (arXiv 2210.17323).

    Scales are those of the weights before any feedback. With a moment that is a multiple of the identity this is
    rounding to the nearest.

    Args:
        weight: (K, N).
        moment: (K, K) second moment of the input.
        number: the format.
        block: inputs per scale.
        dtype: of the scales in the graph.
        shrink: see ``quantize_weight``.
    """
    scale, shared = weight_scale(weight, number, block=block, dtype=dtype, shrink=shrink)
    scales = np.broadcast_to(spread(effective(scale, shared, dtype), block), weight.shape)
    feedback = _feedback(moment)
    left = weight.astype(np.float64)
    codes = np.empty(weight.shape, encode(weight[:1], 1.0, number).dtype)
    for start in range(0, len(weight), _COLUMNS):
        stop = min(start + _COLUMNS, len(weight))
        errors = np.empty((stop - start, weight.shape[1]))
        for index in range(start, stop):
            codes[index] = encode(left[index], scales[index], number)
            error = (left[index] - decode(codes[index], scales[index])) / feedback[index, index]
            left[index + 1 : stop] -= np.outer(feedback[index, index + 1 : stop], error)
            errors[index - start] = error
        left[stop:] -= feedback[start:stop, stop:].T @ errors
    return Codes(values=codes, scale=scale, shared=shared)


def _feedback(moment: Array) -> Array:
    """(K, K) upper Cholesky factor of the inverse of the damped second moment."""
    damped = np.array(moment, np.float64)
    diagonal = np.diagonal(damped).copy()
    never = diagonal == 0  # nothing is known about an input that was always zero, and nothing depends on it
    damped[never, never] = 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * max(float(diagonal.mean()), 1e-30)
    inverse = np.linalg.inv(damped)
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)
