"""What every layer adds to a measured latency, by the heads or neurons that it keeps: what a latency budget rests on.

Pure data: the table is measured where there are graphs to measure, see ``gates.timing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headwise.model.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Latency of one layer at some sizes; linear between them.

    Attributes:
        counts: units of heads, or neurons, that the layer keeps, rising.
        ms: latency at each, above that of the first; never falling.
    """

    counts: tuple[int, ...]
    ms: tuple[float, ...]

    def saved(self, count: int, gone: int) -> float:
        """Milliseconds that a layer of ``count`` units saves without ``gone`` of them."""
        before, after = np.interp([count, count - gone], self.counts, self.ms)
        return float(before - after)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Latency of a model and of its layers, for one input on one machine (a lookup table as in arXiv 2302.04089).

    Attributes:
        total: of the whole model, in ms.
        heads: a curve per attention layer, over its ``layout.units()``.
        neurons: a curve per MLP.
        device: what it was measured on.
        threads: CPU threads; None where the backend decides.
        method: how it was measured, with the size of the input.
    """

    total: float
    heads: tuple[Curve, ...]
    neurons: tuple[Curve, ...]
    device: str
    threads: int | None
    method: str

    def predict(self, before: Layout, after: Layout) -> float:
        """Milliseconds that are left when the measured model, with layout ``before``, has become ``after``."""
        saved = 0.0
        for curve, old, new in zip(self.heads, before.attention, after.attention, strict=True):
            count = len(old.units())
            saved += curve.saved(count, count - len(new.units()))
        for curve, had, has in zip(self.neurons, before.mlp, after.mlp, strict=True):
            saved += curve.saved(len(had.neurons), len(had.neurons) - len(has.neurons))
        return self.total - saved

    @property
    def machine(self) -> str:
        """Device and threads, for reports."""
        threads = "" if self.threads is None else f", {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.device}{threads}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        curves = {
            name: tuple(Curve(counts=tuple(curve["counts"]), ms=tuple(curve["ms"])) for curve in data[name])
            for name in ("heads", "neurons")
        }
        return cls(**{**data, **curves})
