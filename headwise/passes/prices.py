"""What heads and neurons are paid in when a budget is spent: multiply-accumulates, or milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from headwise.calibration.stats import HeadStats, Stat
from headwise.calibration.timing import Curve
from headwise.errors import PlanError
from headwise.model.view import ModelView

Saved = Callable[[int], float]
"""What a layer saves without so many of its units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What the model costs and what its layers can save.

    Attributes:
        option: the recipe's name of the budget.
        whole: what the share is of, in words.
        what: what is counted, in words.
        total: of the whole model.
        heads: per attention layer; ``neurons``: per MLP.
        where: where it was measured; empty where it was counted.
    """

    option: str
    whole: str
    what: str
    total: float
    heads: Sequence[Saved]
    neurons: Sequence[Saved]
    where: str = ""

    def spent(self, heads: float, neurons: float) -> str:
        """One line for reports: what stays, and what went with heads and with neurons."""
        left = self.total - heads - neurons
        amounts = f"{left:.3g} of {self.total:.3g}" if self.where else f"{left:,.0f} of {self.total:,.0f}"
        return (
            f"{amounts} {self.what} stay ({100 * left / self.total:.1f} %); {100 * heads / self.total:.1f} % go with "
            f"heads, {100 * neurons / self.total:.1f} % with neurons{self.where}"
        )


def in_macs(stats: HeadStats) -> Prices:
    """Multiply-accumulates of one sample."""
    heads, neurons, (total,) = (macs.tolist() for macs in stats[Stat.MACS])
    return Prices(
        option="macs",
        whole="multiply-accumulates",
        what="multiply-accumulates per sample",
        total=total,
        heads=[_each(size) for size in heads],
        neurons=[_each(size) for size in neurons],
    )


def in_milliseconds(view: ModelView, stats: HeadStats) -> Prices:
    """Measured latency of one sample.

    Raises:
        PlanError: nobody measured.
    """
    table = stats.latency
    if table is None:
        raise PlanError(
            "a budget of latency without a latency table",
            expected="latencies of the model's layers, measured on this machine",
            fix="use `headwise compress` or `headwise plan`, or give run_pass the table of gates.timing.measure_table",
        )
    return Prices(
        option="latency",
        whole="latency",
        what="ms are predicted to",
        total=table.total,
        heads=[_on(curve, len(layer.layout.units())) for curve, layer in zip(table.heads, view.attention, strict=True)],
        neurons=[_on(curve, len(mlp.layout.neurons)) for curve, mlp in zip(table.neurons, view.mlp, strict=True)],
        where=f"; measured on {table.machine}, {table.method}",
    )


def _each(size: float) -> Saved:
    return lambda gone: size * gone


def _on(curve: Curve, count: int) -> Saved:
    return partial(curve.saved, count)
