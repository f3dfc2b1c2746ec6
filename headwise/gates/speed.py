"""How much faster one thing is than another: a ratio with its interval, in words, and against a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, sem
from scipy.stats import t as student

from headwise.gates.judge import GateSpec, Outcome, Verdict

Times = Sequence[float] | NDArray[np.float64]
"""Milliseconds by round."""

GATE, METRIC = "speed", "speedup"
"""Names of the gate and of its metric in verdicts."""

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times faster a candidate is than its reference.

    Attributes:
        ratio: median over the rounds of the reference's time by the candidate's; 2 is twice as fast. Both were timed in
            the same round, so that what slowed a round down cancels out. Of several starts, the geometric mean.
        interval: of the ratio, two-sided, by a bootstrap over the rounds; of several starts, Student's over them.
        confidence: of the interval.
        rounds: that it rests on.
    """

    ratio: float
    interval: tuple[float, float]
    confidence: float
    rounds: int

    @classmethod
    def of(cls, reference: Times, candidate: Times, confidence: float = 0.95) -> Self:
        """The speedup from the times of the same rounds, two of them at least."""
        ratios = np.asarray(reference, float) / np.asarray(candidate, float)
        found = bootstrap(
            (ratios,),
            np.median,
            n_resamples=_RESAMPLES,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = map(float, found.confidence_interval)
        return cls(ratio=float(np.median(ratios)), interval=(low, high), confidence=confidence, rounds=len(ratios))

    @classmethod
    def of_starts(cls, starts: Sequence[tuple[Times, Times]], confidence: float = 0.95) -> Self:
        """The speedup from the times of reference and candidate by start.

        The rounds of a start share what its processes happened to get, memory above all, and say nothing about another
        start. What differs between starts is in the interval when there are two of them at least.
        """
        if len(starts) == 1:
            return cls.of(*starts[0], confidence)
        logs = np.log([np.median(np.asarray(reference) / np.asarray(candidate)) for reference, candidate in starts])
        middle, half = float(logs.mean()), float(sem(logs) * student.ppf((1 + confidence) / 2, len(logs) - 1))
        return cls(
            ratio=math.exp(middle),
            interval=(math.exp(middle - half), math.exp(middle + half)),
            confidence=confidence,
            rounds=sum(len(reference) for reference, _ in starts),
        )

    @property
    def faster(self) -> bool:
        """Whether even the bad end of the interval is faster."""
        return self.interval[0] > 1

    def words(self) -> str:
        """``1.31 times faster (95 % interval 1.27 to 1.36)``, slower, or that no difference can be told."""
        low, high = self.interval
        if self.faster:
            return f"{_times(self.ratio)} times faster ({self._interval(low, high)})"
        if high < 1:
            return f"{_times(1 / self.ratio)} times slower ({self._interval(1 / high, 1 / low)})"
        return f"no difference can be told (ratio {_times(self.ratio)}, {self._interval(low, high)})"

    def _interval(self, low: float, high: float) -> str:
        return f"{100 * self.confidence:.4g} % interval {_times(low)} to {_times(high)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the words."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "words": self.words()}


def speed_words(speed: Speedup, *, smaller: bool) -> str:
    """The words of a speedup, behind a plain "smaller but not faster" where that is so."""
    return f"smaller but not faster: {speed.words()}" if smaller and not speed.faster else speed.words()


def judge_speed(times: Mapping[str, Sequence[float]], gate: GateSpec, minimum: float, stage: str) -> Verdict:
    """Compare the bad end of a speedup's interval with a limit.

    Args:
        times: ``reference`` and ``value``, the times of the same rounds.
        gate: whose confidence is used.
        minimum: how many times faster the value has to be.
        stage: for the verdict.
    """
    speed = Speedup.of(times["reference"], times["value"], gate.confidence)
    low, high = speed.interval
    measured = f"{speed.words()}, limit {_times(minimum)}"
    if low >= minimum:
        outcome = Outcome.PASS
    elif high < minimum:
        outcome = Outcome.FAIL
    else:
        outcome = Outcome.INCONCLUSIVE
        measured = f"{speed.rounds} rounds cannot separate the speed from the limit {_times(minimum)}: {speed.words()}"
    return _verdict(outcome, minimum, stage, measured, samples=speed.rounds)


def speed_not_run(minimum: float, stage: str, reason: str) -> Verdict:
    """The verdict where a speed cannot be measured here."""
    return _verdict(Outcome.NOT_RUN, minimum, stage, reason, samples=0)


def _verdict(outcome: Outcome, minimum: float, stage: str, reason: str, *, samples: int) -> Verdict:
    return Verdict(
        gate=GATE,
        stage=stage,
        output="latency",
        metric=METRIC,
        outcome=outcome,
        difference=math.nan,
        limit=minimum,
        samples=samples,
        reason=reason,
    )


def _times(ratio: float) -> str:
    """Two decimals, three near 1, where they matter."""
    return f"{ratio:.3f}" if abs(ratio - 1) < 0.1 else f"{ratio:.2f}"
