"""Which matrices to leave in the precision of the graph, so that a mix of formats keeps a limit."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pydantic import Field, model_validator

from headwise.errors import PlanError
from headwise.spec import Spec

Measure = Callable[[Collection[str]], float]
"""Names of the matrices that are quantized -> the drop that it costs."""


class Budget(Spec):
    """A limit on the whole of the quantized matrices. What does not fit keeps the precision of the graph."""

    max_drop: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Largest drop on the calibration samples: points of fidelity or agreement, or nats per token."""
    size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest size of all matrices with their scales, in MB; within it, those stay that lose the most."""
    samples: int = Field(default=128, ge=8)
    """Calibration samples that every matrix is measured on; ranges and roundings are fitted to the others."""

    @model_validator(mode="after")
    def _one_limit(self) -> Budget:
        if (self.max_drop is None) == (self.size is None):
            raise ValueError("give either max_drop or size")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What quantizing one matrix costs and saves.

    Attributes:
        name: of the matrix.
        drop: when it is the only one.
        saved: bytes.
    """

    name: str
    drop: float
    saved: int

    @property
    def price(self) -> float:
        """Drop per byte."""
        return self.drop / max(self.saved, 1)


def left_alone(offers: Collection[Offer], budget: Budget, *, total: int, measure: Measure) -> frozenset[str]:
    """Names of the matrices that stay as they are: those with the highest price, and no more than the budget asks for.

    Args:
        offers: one per matrix that could be quantized.
        budget: the limit.
        total: bytes of all matrices when every offer is taken.
        measure: the drop of a set of quantized matrices; for ``max_drop`` the answer rests on it and not on a sum.

    Raises:
        PlanError: not even quantizing all of them is small enough.
    """
    ranked = sorted(offers, key=lambda offer: (-offer.price, offer.name))
    if budget.max_drop is not None:
        return _fewest(ranked, budget.max_drop, measure)
    assert budget.size is not None, "one of the two limits is set"
    room = budget.size * 1e6 - total
    if room < 0:
        raise PlanError(
            f"all matrices in the format of the recipe are {total / 1e6:.2f} MB",
            expected=f"at most {budget.size:g} MB, the budget",
            fix="raise budget.size, or choose a format with fewer bits",
        )
    kept = set()
    for offer in ranked:
        if offer.saved <= room and offer.drop > 0:
            room -= offer.saved
            kept.add(offer.name)
    return frozenset(kept)


def _fewest(ranked: list[Offer], limit: float, measure: Measure) -> frozenset[str]:
    """Bisection: the drop falls as more of the most expensive matrices stay."""
    names = [offer.name for offer in ranked]
    low, high = 0, len(names)  # with ``high`` of them left alone the limit holds
    while low < high:
        middle = (low + high) // 2
        if measure(names[middle:]) <= limit:
            high = middle
        else:
            low = middle + 1
    return frozenset(names[:high])
