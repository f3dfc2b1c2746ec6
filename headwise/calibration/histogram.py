"""A streamed histogram of magnitudes, and the range of a quantizer from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwise.calibration.formats import GRIDS, decode, encode
from headwise.model.quantization import Format

Array = NDArray[Any]
RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]

BINS = 4096
_CANDIDATES = 128
"""Ranges that ``mse`` and ``entropy`` try, from the full one down to a share of ``_SMALLEST``."""
_SMALLEST = 0.1
_LEVELS = 128
"""Magnitudes that an 8-bit code tells apart, for ``entropy``."""


@dataclass(slots=True)
class Histogram:
    """Counts of ``|x|`` in equal bins from 0 to ``2 ** exponent``.

    The limit is a power of two above every value and only grows; it doubles by adding bins up in pairs, which puts
    every value where it would have been from the start. So counts do not depend on the order or the size of batches.

    Attributes:
        exponent: of the limit; meaningless while there are no counts.
        counts: (BINS,).
        largest: exactly, because a bin is wider than a number.
    """

    exponent: int = 0
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    largest: float = 0.0

    def add(self, values: Array) -> None:
        """Count values of any shape and sign."""
        if not values.size:
            return
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max())
        self._reach(int(np.frexp(largest)[1]))
        index = np.ldexp(magnitudes, BINS.bit_length() - 1 - self.exponent).astype(np.int64)
        self.counts += np.bincount(index, minlength=BINS)
        self.largest = max(self.largest, largest)

    def merge(self, other: Histogram) -> None:
        """Count everything that another histogram has counted."""
        if not other.counts.any():
            return
        added = Histogram(other.exponent, other.counts.copy(), other.largest)
        self._reach(other.exponent)
        added._reach(self.exponent)
        self.counts += added.counts
        self.largest = max(self.largest, other.largest)

    def _reach(self, exponent: int) -> None:
        """Double the limit until it is ``2 ** exponent`` or more."""
        if not self.counts.any():
            self.exponent = exponent
        while self.exponent < exponent:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.exponent += 1

    def centers(self) -> Array:
        """(BINS,) the middle of every bin."""
        return np.asarray(np.ldexp(np.arange(BINS) + 0.5, self.exponent - BINS.bit_length() + 1))


def range_of(histogram: Histogram, method: RangeMethod, number: Format, *, percentile: float) -> float:
    """The magnitude that the largest code stands for; larger values are clipped to it.

    Args:
        histogram: of the tensor.
        method: ``minmax`` clips nothing; ``percentile`` keeps that share of the values; ``mse`` has the smallest mean
            squared error; ``entropy`` the smallest divergence of the distribution of codes from that of the values.
        number: format of the codes.
        percentile: in percent.
    """
    if method == "minmax" or histogram.largest == 0:
        return histogram.largest or 1.0
    if method == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        width = np.ldexp(1.0, histogram.exponent) / BINS
        found = float((np.searchsorted(share, percentile / 100) + 1) * width)
        return min(found, histogram.largest)
    cost = _COSTS[method]
    candidates = histogram.largest * np.linspace(1.0, _SMALLEST, _CANDIDATES)
    return float(min(candidates, key=lambda candidate: cost(histogram, float(candidate), number)))


def _squared_error(histogram: Histogram, candidate: float, number: Format) -> float:
    values = histogram.centers()
    scale = candidate / GRIDS[number].largest
    error = values - decode(encode(values, scale, number), scale)
    return float((histogram.counts * error**2).sum())


def _divergence(histogram: Histogram, candidate: float, number: Format) -> float:
    """Kullback-Leibler divergence of the coded from the clipped distribution, over the bins inside the range."""
    del number
    inside = int(np.clip(round(candidate / np.ldexp(1.0, histogram.exponent) * BINS), _LEVELS, BINS))
    clipped = histogram.counts[:inside].astype(np.float64)
    outside = float(histogram.counts[inside:].sum())
    level = np.arange(inside) * _LEVELS // inside
    filled = clipped > 0
    members = np.bincount(level, weights=filled, minlength=_LEVELS)
    mass = np.bincount(level, weights=clipped, minlength=_LEVELS)
    coded = np.where(filled, (mass / np.maximum(members, 1))[level], 0.0)
    clipped[-1] += outside
    # a bin that only holds what was clipped is unknown to the codes; a small mass keeps the divergence finite
    floor = 1e-9 * clipped.sum()
    p, q = clipped + floor, coded + floor
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


_COSTS: Mapping[str, Callable[[Histogram, float, Format], float]] = {"mse": _squared_error, "entropy": _divergence}
