"""Channel scales that move the difficulty of a quantized product from one operand to the other.

SmoothQuant (arXiv 2211.10438) divides the channels of an activation by ``max|x| ** a / max|w| ** (1 - a)`` and
multiplies the weights by it; AWQ (arXiv 2306.00978) uses ``mean|x| ** a`` to protect the weights that large channels
meet. Here the scales are rounded to powers of two, which costs little and makes them exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headwise.calibration.formats import quantize_weight, restore
from headwise.calibration.products import ReadInput, relative_error
from headwise.calibration.ranges import Observed
from headwise.model.quantization import Matrix, MatrixPlan

Exponents = tuple[int, ...]

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Strengths that ``auto`` tries."""
_WORTH = 0.95
"""A scale has to lower the error to this share: it may cost a multiplication in the graph."""
_ROWS = 512
"""Tokens that ``auto`` compares products on."""
_LARGEST_EXPONENT = 8
"""Keeps the scaled numbers far from the ends of fp16."""
_SMALLEST = 1e-5
_DTYPE = np.dtype(np.float32)


def exponents(members: Sequence[Matrix], seen: Observed, strength: float, *, weights_only: bool) -> Exponents:
    """One exponent per channel of a tensor that these matrices multiply.

    Args:
        members: the matrices.
        seen: the tensor.
        strength: 0 leaves the activation as it is, 1 gives all of its channels the same size.
        weights_only: scale by the mean magnitude of the activation alone.
    """
    if weights_only:
        scale = np.maximum(seen.magnitude, _SMALLEST) ** strength
    else:
        weight = np.max([np.abs(matrix.weight).max(axis=1) for matrix in members], axis=0)
        scale = np.maximum(seen.largest, _SMALLEST) ** strength / np.maximum(weight, _SMALLEST) ** (1 - strength)
    logs = np.log2(scale)
    rounded = np.rint(logs - logs.mean()).clip(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return tuple(int(exponent) for exponent in rounded)


def best_exponents(
    members: Sequence[Matrix], plans: Sequence[MatrixPlan], seen: Observed, read: ReadInput
) -> Exponents | None:
    """The strength whose products come closest to the exact ones on calibration tokens; None where none is worth it.

    Args:
        members: the matrices that multiply the tensor.
        plans: their formats; the range of the input is that of the scaled sample, without clipping.
        seen: the tensor.
        read: what a product of the runtime reads of its input.
    """
    weights_only = all(plan.input_largest is None for plan in plans)
    rows = seen.rows[:_ROWS]
    exact = [rows @ matrix.weight for matrix in members]

    def error(shift: Exponents) -> float:
        """Sum of the relative squared errors of the products."""
        scaled = np.ldexp(rows, -np.asarray(shift))
        total = 0.0
        for matrix, plan, product in zip(members, plans, exact, strict=True):
            assert plan.format is not None, "only quantized matrices are smoothed"
            entry = plan if plan.input_largest is None else replace(plan, input_largest=float(np.abs(scaled).max()))
            weight = np.ldexp(matrix.weight, np.asarray(shift)[:, None])
            codes = quantize_weight(weight, plan.format, block=plan.block, dtype=_DTYPE)
            found = read(scaled, entry, _DTYPE) @ restore(codes, plan.block, _DTYPE)
            total += relative_error(product, found)
        return total

    limit = _WORTH * error((0,) * rows.shape[1])
    chosen: Exponents | None = None
    for strength in STRENGTHS:
        candidate = exponents(members, seen, strength, weights_only=weights_only)
        if (size := error(candidate)) < limit:
            chosen, limit = candidate, size
    return chosen if chosen is not None and any(chosen) else None
