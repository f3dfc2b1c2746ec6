"""The verdict on a measurement: the bad end of a paired bootstrap interval against a limit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import DegenerateDataWarning, bootstrap

from headwise.gates.measure import Measurement
from headwise.gates.metrics import Metric, find_metric
from headwise.spec import Spec

OnFail = Literal["stop", "rollback", "warn"]

_ELEMENTS_AT_ONCE = 2_000_000


class Outcome(StrEnum):
    """What a gate says. Everything but PASS and NOT_RUN is a no."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    ANOMALOUS = "ANOMALOUS"
    NOT_RUN = "NOT RUN"


class GateLimits(Spec):
    """Limits for one output, metric or stage; what is left out keeps the gate's own value."""

    max_drop: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """How much worse is still accepted, in the metric's unit (points of 100 for metrics between 0 and 1)."""
    max_gain: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How much better is no longer believed, in the metric's unit."""
    confidence: float | None = Field(default=None, gt=0, lt=1)
    """Confidence of the two-sided interval."""


class StageLimits(GateLimits):
    """Limits for one stage, by its name or kind."""

    on_fail: OnFail | None = None
    """What happens after this stage when its gate says no."""
    min_speedup: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How many times faster than the untouched model's fp32 graph the graph of this stage has to be at least."""


class GateSpec(Spec):
    """How much may be lost, and how sure the answer has to be."""

    max_drop: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How much worse is still accepted, in the metric's unit (points of 100 for metrics between 0 and 1)."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the two-sided interval whose bad end is compared with ``max_drop``."""
    on_fail: OnFail = "stop"
    """When a gate says no: stop the run, go back to the model before the stage, or warn and go on."""
    max_gain: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How much better is no longer believed; by default 5 times max_drop or 5 % of the reference, the larger one."""
    min_samples: int = Field(default=30, ge=2)
    """Fewer samples than this fail."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the resamples."""
    min_speedup: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How many times faster what is deployed has to be than the untouched model's fp32 graph, by the bad end of the
    interval: the graph of the target ``cpu``, or the fp32 graph where there is no target."""
    outputs: dict[str, GateLimits] = Field(default_factory=dict)
    """Limits for single outputs, by name."""
    metrics: dict[str, GateLimits] = Field(default_factory=dict)
    """Limits for single metrics, before those of outputs; ``fidelity`` and ``agreement`` are judged when named here."""
    stages: dict[str, StageLimits] = Field(default_factory=dict)
    """Limits for single stages, by name (prune-heads, onnx, engine-sm86) or kind (pass, onnx, precision, engine)."""

    def for_stage(self, name: str, kind: str) -> GateSpec:
        """The gate of one stage: an entry for its kind applies, and one for its name before that."""
        changes = [self.stages[key].model_dump(exclude_none=True) for key in (kind, name) if key in self.stages]
        return self.model_copy(update={key: value for change in changes for key, value in change.items()})

    def speed_limit(self, name: str, kind: str, *, is_deployed: bool) -> float | None:
        """``min_speedup`` of one stage; the gate's own only concerns what is deployed."""
        entries = (self.stages[key].min_speedup for key in (name, kind) if key in self.stages)
        own = self.min_speedup if is_deployed else None
        return next((limit for limit in entries if limit is not None), own)

    def limit_for(self, output: str, metric: str) -> float:
        """``max_drop`` of an output's metric."""
        return self.resolved(output, metric).max_drop

    def judges(self, measurement: Measurement) -> bool:
        """Whether a measurement gets a verdict: the task's own metrics, and those that ``metrics`` names."""
        return measurement.judged or measurement.metric in self.metrics

    def resolved(self, output: str, metric: str) -> GateSpec:
        """The gate of one metric of one output."""
        found = [limits for limits in (self.outputs.get(output), self.metrics.get(metric)) if limits is not None]
        changes = [limits.model_dump(exclude_none=True) for limits in found]
        return self.model_copy(update={key: value for change in changes for key, value in change.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a gate said about one metric of one output after one stage.

    Attributes:
        gate: which gate, ``accuracy`` for measurements.
        stage: name of the stage.
        output: name of the output.
        metric: name of the metric.
        outcome: the decision.
        difference: candidate against reference in the metric's unit, positive is worse; NaN where there is none.
        interval: of the difference; (NaN, NaN) where there is none.
        limit: the largest difference that passes; NaN where the verdict is not about a difference.
        samples: how many it rests on.
        reason: in words.
    """

    gate: str = "accuracy"
    stage: str
    output: str
    metric: str
    outcome: Outcome
    difference: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    limit: float
    samples: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; null where a number is missing."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        numbers = {
            "difference": _finite(self.difference),
            "interval": [_finite(end) for end in self.interval],
            "limit": _finite(self.limit),
        }
        return {**plain, "outcome": self.outcome.value, **numbers}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """The inverse of ``to_json``."""
        low, high, difference, limit = (
            math.nan if number is None else float(number)
            for number in (*values["interval"], values["difference"], values["limit"])
        )
        numbers = {
            "difference": difference,
            "interval": (low, high),
            "limit": limit,
            "outcome": Outcome(values["outcome"]),
        }
        return cls(**{**values, **numbers})


def judge(measurement: Measurement, gate: GateSpec, stage: str) -> Verdict:
    """Decide whether a candidate is good enough.

    The samples are drawn with replacement, the same ones for reference, candidate and labels (paired bootstrap,
    percentile interval), so that what both have in common does not blur their difference.

    Args:
        measurement: paired per-sample results.
        gate: limits, resolved for the stage.
        stage: name of the stage, for the verdict.

    Returns:
        FAIL where there is nothing to rest on or the interval lies beyond the limit, PASS where its bad end is within,
        ANOMALOUS where even the bad end is an implausible gain, INCONCLUSIVE otherwise.
    """
    limits = gate.resolved(measurement.output, measurement.metric)
    metric = find_metric(measurement.metric, higher_is_better=measurement.higher_is_better)

    def verdict(outcome: Outcome, reason: str, **numbers: Any) -> Verdict:
        return Verdict(
            stage=stage,
            output=measurement.output,
            metric=measurement.metric,
            outcome=outcome,
            limit=limits.max_drop,
            samples=len(measurement.candidate),
            reason=reason,
            **numbers,
        )

    broken = unusable(measurement, limits.min_samples)
    if broken:
        return verdict(Outcome.FAIL, broken)
    reference, candidate = measurement.values()
    difference = reference - candidate if metric.higher_is_better else candidate - reference
    if not math.isfinite(difference):
        return verdict(Outcome.FAIL, f"{metric.name} is not defined on these samples (constant labels or predictions)")
    low, high = _interval(measurement, metric, limits)
    if not math.isfinite(low) or not math.isfinite(high):
        reason = f"{metric.name} is not defined on some resamples: too few samples with different labels"
        return verdict(Outcome.FAIL, reason, difference=difference)
    outcome, reason = _decide(difference, (low, high), limits, reference, len(measurement.candidate))
    return verdict(outcome, reason, difference=difference, interval=(low, high))


Judge = Callable[[Measurement, GateSpec, str], Verdict]


def judge_all(
    measurements: Sequence[Measurement], gate: GateSpec, stage: str, one: Judge = judge
) -> tuple[Verdict, ...]:
    """Verdicts on everything that the gate judges, each by ``one``.

    Nothing to judge fails, and so does an output or metric that the gate names but nobody measured.
    """
    judged = [found for found in measurements if gate.judges(found)]
    verdicts = [one(found, gate, stage) for found in judged]
    outputs, metrics = {found.output for found in judged}, {found.metric for found in judged}
    missing = [(name, "") for name in gate.outputs if name not in outputs]
    missing += [("", name) for name in gate.metrics if name not in metrics]
    if not measurements or not (judged or missing):
        missing.append(("", ""))
    for output, metric in missing:
        what = f'the output "{output}"' if output else f'the metric "{metric}"' if metric else "anything"
        verdicts.append(
            Verdict(
                stage=stage,
                output=output,
                metric=metric,
                outcome=Outcome.FAIL,
                limit=gate.limit_for(output, metric),
                samples=0,
                reason=f"the gate judges {what}, but there is no measurement of it",
            )
        )
    return tuple(verdicts)


def not_run(measurement: Measurement, gate: GateSpec, stage: str, reason: str) -> Verdict:
    """The verdict of a check that this machine cannot do."""
    return Verdict(
        stage=stage,
        output=measurement.output,
        metric=measurement.metric,
        outcome=Outcome.NOT_RUN,
        limit=gate.limit_for(measurement.output, measurement.metric),
        samples=0,
        reason=reason,
    )


def unusable(measurement: Measurement, min_samples: int) -> str:
    """Why a measurement cannot be judged, or an empty string."""
    n = len(measurement.candidate)
    lengths = {"reference": len(measurement.reference), "candidate": n}
    if measurement.labels is not None:
        lengths["labels"] = len(measurement.labels)
    if not any(lengths.values()):
        return "there are no samples"
    if n == 0:
        return f'the candidate has no usable values for the output "{measurement.output}"'
    if len(set(lengths.values())) > 1:
        return "unequal samples: " + ", ".join(f"{name} {count}" for name, count in lengths.items())
    if n < min_samples:
        return f"{n} samples are fewer than the {min_samples} that the gate asks for"
    for name in lengths:
        values: NDArray[Any] = np.asarray(getattr(measurement, name), dtype=np.float64)
        bad = int((~np.isfinite(values)).reshape(n, -1).any(axis=1).sum())
        if bad:
            return f"{bad} of {n} {name} values are NaN or infinite"
    return ""


def _interval(measurement: Measurement, metric: Metric, gate: GateSpec) -> tuple[float, float]:
    n = len(measurement.candidate)
    both = np.stack([measurement.reference, measurement.candidate])

    def differences(drawn: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        indices = np.moveaxis(drawn, axis, -1).astype(np.int64)
        reference, candidate = metric.resampled(both, measurement.labels, indices.reshape(-1, n))
        worse = reference - candidate if metric.higher_is_better else candidate - reference
        return np.reshape(worse, indices.shape[:-1])

    with warnings.catch_warnings():
        # A resample without a defined metric makes the interval NaN, which the caller turns into a reason.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (np.arange(n),),
            differences,
            n_resamples=gate.resamples,
            batch=max(1, _ELEMENTS_AT_ONCE // both.size),
            confidence_level=gate.confidence,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(gate.seed),
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _decide(
    difference: float, interval: tuple[float, float], gate: GateSpec, reference: float, samples: int
) -> tuple[Outcome, str]:
    low, high = interval
    max_gain = max(5 * gate.max_drop, 0.05 * abs(reference)) if gate.max_gain is None else gate.max_gain
    measured = (
        f"{_worse(difference)}, {gate.confidence:.4g} interval {low:.3g} to {high:.3g}, limit {gate.max_drop:.3g}"
    )
    if high < -max_gain:
        return Outcome.ANOMALOUS, f"better by {-high:.3g} or more, {max_gain:.3g} is plausible: check the samples"
    if high <= gate.max_drop:
        return Outcome.PASS, measured
    if low > gate.max_drop:
        return Outcome.FAIL, measured
    separate = f"{samples} samples cannot separate {difference:.3g} from the limit {gate.max_drop:.3g}"
    return Outcome.INCONCLUSIVE, f"{separate} (interval {low:.3g} to {high:.3g})"


def _worse(difference: float) -> str:
    return f"{abs(difference):.3g} {'better' if difference < 0 else 'worse'}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
