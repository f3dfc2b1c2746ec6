"""Verdicts with known answers."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from headwise.gates.judge import GateLimits, GateSpec, Outcome, StageLimits, Verdict, judge, judge_all, not_run
from headwise.gates.measure import Measurement
from headwise.gates.metrics import METRICS

RNG = np.random.default_rng(7)


def measured(reference: Any, candidate: Any, *, labels: Any = None, metric: str = "mae", **changes: Any) -> Measurement:
    known = METRICS[metric]
    return Measurement(
        **{
            "output": "logits",
            "metric": metric,
            "unit": known.unit,
            "higher_is_better": known.higher_is_better,
            "judged": True,
            "labels": None if labels is None else np.asarray(labels),
            "reference": np.asarray(reference),
            "candidate": np.asarray(candidate),
            **changes,
        }
    )


def accuracy(right_before: int, right_after: int, n: int) -> Measurement:
    """Labels are all 1; the candidate's hits are a part of the reference's, or the other way round."""
    before, after = ((np.arange(n) < right).astype(int) for right in (right_before, right_after))
    return measured(before, after, labels=np.ones(n, dtype=int), metric="accuracy")


def test_no_change_passes_with_an_empty_interval() -> None:
    verdict = judge(accuracy(800, 800, 1000), GateSpec(max_drop=0.0), "onnx")
    assert verdict.outcome is Outcome.PASS
    assert (verdict.difference, verdict.interval, verdict.limit) == (0.0, (0.0, 0.0), 0.0)
    assert (verdict.gate, verdict.stage, verdict.output, verdict.metric) == ("accuracy", "onnx", "logits", "accuracy")
    assert verdict.samples == 1000


def test_the_interval_is_that_of_a_share_of_paired_flips() -> None:
    # 20 of 1000 samples go wrong: the difference is a binomial share with a standard error of sqrt(p (1 - p) / n).
    verdict = judge(accuracy(800, 780, 1000), GateSpec(max_drop=5.0, resamples=4000), "s")
    error = 196 * np.sqrt(0.02 * 0.98 / 1000)
    assert verdict.outcome is Outcome.PASS
    assert verdict.difference == pytest.approx(2.0)
    assert verdict.interval == pytest.approx((2 - error, 2 + error), abs=0.12)


def test_pairing_makes_the_interval_narrower() -> None:
    labels = RNG.normal(size=500)
    reference = labels + RNG.normal(size=500)
    candidate = reference + 0.05 * RNG.normal(size=500)
    gate = GateSpec(max_drop=10)
    paired = judge(measured(reference, candidate, labels=labels, metric="spearman"), gate, "s")
    strange = labels + RNG.normal(size=500)
    unpaired = judge(measured(reference, strange, labels=labels, metric="spearman"), gate, "s")
    width, wide = (verdict.interval[1] - verdict.interval[0] for verdict in (paired, unpaired))
    assert width < wide / 5


def test_a_clear_drop_fails() -> None:
    verdict = judge(accuracy(800, 700, 1000), GateSpec(max_drop=1.0), "s")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.difference == pytest.approx(10.0)
    assert verdict.interval[0] > 1.0
    assert "10 worse" in verdict.reason
    assert "limit 1" in verdict.reason


def test_a_drop_within_the_limit_whose_bad_end_is_not_is_inconclusive() -> None:
    verdict = judge(accuracy(320, 318, 400), GateSpec(max_drop=0.6), "s")
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.difference < verdict.limit < verdict.interval[1]
    assert verdict.reason.startswith("400 samples cannot separate 0.5 from the limit 0.6")


def test_the_confidence_decides_how_far_the_bad_end_is() -> None:
    found = accuracy(320, 318, 400)
    assert judge(found, GateSpec(max_drop=1.5, confidence=0.95), "s").outcome is Outcome.PASS
    assert judge(found, GateSpec(max_drop=1.5, confidence=0.9999), "s").outcome is Outcome.INCONCLUSIVE


def test_an_implausible_gain_is_anomalous() -> None:
    verdict = judge(accuracy(500, 800, 1000), GateSpec(max_drop=1.0), "s")
    assert verdict.outcome is Outcome.ANOMALOUS
    assert verdict.difference == pytest.approx(-30.0)
    # 5 % of a reference of 50 points are 2.5, and 5 times max_drop are 5: the larger one counts.
    assert "5 is plausible" in verdict.reason
    assert judge(accuracy(500, 520, 1000), GateSpec(max_drop=1.0), "s").outcome is Outcome.PASS
    assert judge(accuracy(500, 520, 1000), GateSpec(max_drop=1.0, max_gain=0.5), "s").outcome is Outcome.ANOMALOUS
    assert judge(accuracy(500, 800, 1000), GateSpec(max_drop=1.0, max_gain=40), "s").outcome is Outcome.PASS


def test_of_a_lower_is_better_metric_a_rise_is_a_drop() -> None:
    labels = np.zeros(200)
    values = 1 + 0.1 * RNG.normal(size=200)
    worse = judge(measured(values, values + 0.5, labels=labels), GateSpec(max_drop=0.1), "s")
    assert worse.outcome is Outcome.FAIL
    assert worse.difference == pytest.approx(0.5)
    better = judge(measured(values, values - 0.05, labels=labels), GateSpec(max_drop=0.1), "s")
    assert better.outcome is Outcome.PASS
    assert better.difference == pytest.approx(-0.05)
    tokens = np.full(200, 50.0)
    windows = np.stack([tokens * values, tokens], axis=1)
    nats = judge(measured(windows, windows * [1.1, 1], metric="nats"), GateSpec(max_drop=0.2), "s")
    assert nats.outcome is Outcome.PASS
    assert nats.difference == pytest.approx(0.1 * values.mean())


def test_nats_weigh_windows_by_their_tokens() -> None:
    windows = np.array([[10.0, 10.0]] * 99 + [[3000.0, 1000.0]])
    found = measured(windows, windows, metric="nats")
    assert found.values()[0] == pytest.approx((990 + 3000) / 1990)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (measured([], [], labels=[]), "there are no samples"),
        (measured(np.ones(50), []), "the candidate has no usable values"),
        (measured(np.ones(50), np.ones(49)), "unequal samples: reference 50, candidate 49"),
        (measured(np.ones(50), np.ones(50), labels=np.ones(51)), "labels 51"),
        (measured(np.ones(29), np.ones(29), labels=np.ones(29)), "29 samples are fewer than the 30"),
        (measured(np.ones(50), [np.nan] + [1.0] * 49, labels=np.ones(50)), "1 of 50 candidate values are NaN"),
        (measured([np.inf] * 2 + [1.0] * 48, np.ones(50), labels=np.ones(50)), "2 of 50 reference values are NaN"),
        (measured(np.ones(50), np.ones(50), labels=[np.nan] * 50), "50 of 50 labels values are NaN"),
        (measured(np.arange(50), np.arange(50), labels=np.ones(50), metric="spearman"), "spearman is not defined"),
        (measured(np.arange(50.0), np.full(50, 0.1), labels=np.arange(50), metric="pearson"), "pearson is not defined"),
        (
            measured(np.arange(50) % 2, np.arange(50) % 2, labels=[1] + [0] * 49, metric="matthews"),
            "matthews is not defined on some resamples",
        ),
    ],
)
def test_what_cannot_be_judged_fails(found: Measurement, reason: str) -> None:
    verdict = judge(found, GateSpec(max_drop=100), "s")
    assert verdict.outcome is Outcome.FAIL
    assert reason in verdict.reason


def test_the_same_seed_gives_the_same_verdict() -> None:
    found = accuracy(320, 310, 400)
    assert judge(found, GateSpec(), "s") == judge(found, GateSpec(), "s")
    assert judge(found, GateSpec(seed=1), "s").interval != judge(found, GateSpec(resamples=999), "s").interval


def test_spearman_on_an_sts_sized_set_takes_seconds() -> None:
    labels = np.round(RNG.uniform(0, 5, size=1379), 1)
    reference = labels + RNG.normal(size=1379)
    found = measured(reference, reference + 0.1 * RNG.normal(size=1379), labels=labels, metric="spearman")
    start = time.process_time()
    verdict = judge(found, GateSpec(), "s")
    assert time.process_time() - start < 3
    assert verdict.outcome is Outcome.PASS


def test_limits_of_outputs_metrics_and_stages() -> None:
    gate = GateSpec(
        max_drop=1.0,
        outputs={"digit": GateLimits(max_drop=2.0)},
        metrics={"fidelity": GateLimits(max_drop=5.0)},
        stages={"pass": StageLimits(max_drop=3.0, on_fail="warn"), "prune-heads": StageLimits(on_fail="rollback")},
    )
    assert gate.limit_for("parity", "accuracy") == 1.0
    assert gate.limit_for("digit", "accuracy") == 2.0
    assert gate.limit_for("digit", "fidelity") == 5.0
    stage = gate.for_stage("prune-heads", "pass")
    assert (stage.max_drop, stage.on_fail) == (3.0, "rollback")
    assert stage.limit_for("digit", "accuracy") == 2.0
    assert gate.for_stage("onnx", "onnx") == gate
    found = accuracy(800, 770, 1000)
    assert judge(found, gate, "s").outcome is Outcome.FAIL
    assert judge(found, gate.model_copy(update={"outputs": {"logits": GateLimits(max_drop=9)}}), "s").limit == 9
    strict = GateSpec(max_drop=3.1, metrics={"accuracy": GateLimits(confidence=0.1)})
    assert judge(found, strict, "s").outcome is Outcome.PASS


def test_which_measurements_are_judged() -> None:
    own = accuracy(80, 80, 100)
    close = measured(np.ones(100), np.full(100, 0.9), metric="fidelity", judged=False)
    assert [v.metric for v in judge_all([own, close], GateSpec(), "s")] == ["accuracy"]
    both = judge_all([own, close], GateSpec(metrics={"fidelity": GateLimits(max_drop=5)}), "s")
    assert [(v.metric, v.outcome) for v in both] == [("accuracy", Outcome.PASS), ("fidelity", Outcome.FAIL)]
    assert both[1].difference == pytest.approx(10.0)


def test_a_gate_that_measured_nothing_fails() -> None:
    (verdict,) = judge_all([], GateSpec(), "s")
    assert verdict.outcome is Outcome.FAIL
    assert "judges anything, but there is no measurement" in verdict.reason
    own = accuracy(80, 80, 100)
    gate = GateSpec(outputs={"parity": GateLimits()}, metrics={"fidelity": GateLimits(max_drop=5)})
    first, *rest = judge_all([own], gate, "s")
    assert first.outcome is Outcome.PASS
    assert [verdict.outcome for verdict in rest] == [Outcome.FAIL, Outcome.FAIL]
    assert 'the output "parity"' in rest[0].reason
    assert 'the metric "fidelity"' in rest[1].reason
    assert rest[1].limit == 5


def test_verdicts_survive_json() -> None:
    found = accuracy(320, 318, 400)
    for verdict in (judge(found, GateSpec(), "s"), not_run(found, GateSpec(max_drop=2), "engine-sm86", "no GPU")):
        text = json.dumps(verdict.to_json(), allow_nan=False)
        assert repr(Verdict.from_json(json.loads(text))) == repr(verdict)
    assert json.loads(text)["outcome"] == "NOT RUN"
    assert json.loads(text)["interval"] == [None, None]
    assert (verdict.limit, verdict.reason, verdict.samples) == (2, "no GPU", 0)


@pytest.mark.parametrize("bad", [{"max_drop": -1}, {"max_drop": float("nan")}, {"confidence": 1}, {"min_samples": 1}])
def test_impossible_limits_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GateSpec.model_validate(bad)
