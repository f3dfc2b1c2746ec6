"""Speed: intervals of ratios, what they are called, the gate on them, and why a smaller graph is not faster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from runs import copied, finished, run
from test_cost import graph

from headwise.errors import RecipeError
from headwise.gates.judge import GateSpec, Outcome
from headwise.gates.slowness import Sizes, operator_times, why_not_faster
from headwise.gates.speed import Speedup, judge_speed, speed_words
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.regression.baseline import Baseline
from headwise.pipeline.regression.compare import compare
from headwise.pipeline.report.document import junit, markdown, read_report
from headwise.pipeline.speeds import deployed, in_words, judge_stage

BEFORE = Sizes(macs=1000, attention_macs=300, odd=(), half=False)
TIMES = Counter({"MatMul": 8.0, "LayerNormalization": 1.0, "Softmax": 1.0})


def rounds(factor: float, *, noise: float = 0.002, count: int = 40) -> tuple[list[float], list[float]]:
    """Times of a reference and of what is ``factor`` times as fast, on a machine whose load doubles half-way."""
    random = np.random.default_rng(0)
    load = np.where(np.arange(count) < count // 2, 1.0, 2.0)
    reference, value = load * (1 + noise * random.standard_normal((2, count)))
    return reference.tolist(), (value / factor).tolist()


def test_a_ratio_is_paired_by_round() -> None:
    speed = Speedup.of(*rounds(1.3))
    low, high = speed.interval
    assert 1.295 < low < speed.ratio < high < 1.305  # the load alone, unpaired, makes it 0.65 to 2.6
    wide = Speedup.of(*rounds(1.3), 0.999).interval
    assert wide[0] < low < high < wide[1]


def test_intervals_hold_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    pairs = 1 + 0.1 * random.standard_normal((200, 2, 20))
    held = [low <= 1 <= high for low, high in (Speedup.of(a.tolist(), b.tolist()).interval for a, b in pairs)]
    assert 0.9 <= np.mean(held) <= 0.99


def test_what_differs_between_starts_is_in_the_interval() -> None:
    """Ten rounds of each start agree among themselves; only the starts say how far they are from each other."""
    random = np.random.default_rng(0)
    held, narrow = [], []
    for _ in range(200):
        times = 1 + 0.02 * random.standard_normal((6, 2, 1)) + 0.002 * random.standard_normal((6, 2, 10))
        speed = Speedup.of_starts([(reference, value) for reference, value in times])
        held.append(speed.interval[0] <= 1 <= speed.interval[1])
        narrow.append(Speedup.of(*(row.ravel() for row in times.transpose(1, 0, 2))).interval)
    assert 0.9 <= np.mean(held) <= 0.99
    assert np.mean([low <= 1 <= high for low, high in narrow]) < 0.8, "rounds taken for independent say too much"
    assert speed.rounds == 60


def test_starts_in_both_orders_cancel_what_the_first_process_gets() -> None:
    slow = np.full(10, 1.02)
    fast = np.ones(10)
    speed = Speedup.of_starts([(slow, fast), (fast, slow)] * 3)
    assert speed.ratio == pytest.approx(1)
    assert speed.interval[0] < 1 < speed.interval[1]
    assert Speedup.of_starts([(slow, fast)]) == Speedup.of(slow, fast)


def test_words() -> None:
    assert Speedup.of(*rounds(1.31)).words().startswith("1.31 times faster (95 % interval 1.3")
    assert Speedup.of(*rounds(0.5)).words().startswith("2.00 times slower (95 % interval 2.00 to 2.00)")
    same = Speedup.of(*rounds(1.0, noise=0.02))
    assert same.words().startswith("no difference can be told (ratio 0.98")
    assert speed_words(same, smaller=True).startswith("smaller but not faster: no difference")
    assert speed_words(Speedup.of(*rounds(1.31)), smaller=True).startswith("1.31 times faster")
    reported = Speedup.of(*rounds(1.31), 0.9).to_json()
    assert "90 % interval" in reported["words"]
    assert reported["rounds"] == 40


@pytest.mark.parametrize(
    ("minimum", "outcome", "reason"),
    [
        (1.2, Outcome.PASS, "1.31 times faster .* limit 1.20"),
        (1.4, Outcome.FAIL, "1.31 times faster .* limit 1.40"),
        (1.31, Outcome.INCONCLUSIVE, "40 rounds cannot separate the speed from the limit 1.31"),
    ],
)
def test_the_bad_end_is_compared_with_the_limit(minimum: float, outcome: Outcome, reason: str) -> None:
    times = dict(zip(("reference", "value"), rounds(1.31), strict=True))
    verdict = judge_speed(times, GateSpec(), minimum, "onnx")
    assert (verdict.gate, verdict.stage, verdict.outcome) == ("speed", "onnx", outcome)
    assert pytest.raises(AssertionError, match=reason).matches(AssertionError(verdict.reason))


@pytest.mark.parametrize(
    ("after", "now", "why"),
    [
        ({"macs": 990}, TIMES, "the multiply-accumulates stayed"),
        ({"macs": 970}, TIMES, r"only 3% of the multiply-accumulates went \(attention has 30% of them\).*Softmax 10%"),
        ({"macs": 500, "odd": (61,)}, TIMES, r"100% of their former time for 50% .* multiple of 8 \(61\): round_to"),
        ({"macs": 500}, TIMES, "starting a kernel costs as much as its work"),
        ({"macs": 500, "half": True}, {"MatMul": 4.0, "Cast": 4.0}, "spends 50% of the time on casts"),
        (
            {"macs": 500},
            {"MatMulIntegerToFloat": 4.0, "DynamicQuantizeLinear": 1.0},
            "quantizing activations takes 20%",
        ),
        ({"macs": 500}, {"MatMul": 4.0, "Softmax": 1.0}, "less than times vary"),
    ],
)
def test_why_not_faster(after: dict[str, Any], now: dict[str, float], why: str) -> None:
    found = why_not_faster(BEFORE, replace(BEFORE, **after), TIMES, now)
    assert pytest.raises(AssertionError, match=why).matches(AssertionError(found))


def test_sizes_and_times_are_those_of_the_graph(tmp_path: Path) -> None:
    weights = "<float[6, 61] w = {" + ",".join("1" * 366) + "}>"
    path = graph(tmp_path, f"(float[B, 6] x) => (float[B, 61] y) {weights}", "h = MatMul(x, w) y = Softmax(h)", 21)
    sizes = Sizes.of(path, {"macs": 5, "attention_macs": 2})
    assert sizes == Sizes(macs=5, attention_macs=2, odd=(6, 61), half=False)
    times = operator_times(path, {"x": np.ones((2, 6), np.float32)})
    assert set(times) == {"MatMul", "Softmax"}
    assert all(0 < time < 1000 for time in times.values())
    assert onnx.load(str(path)).graph.node


def test_what_is_deployed() -> None:
    stages = [("baseline", "baseline"), ("onnx", "onnx"), ("fp16", "precision")]
    assert deployed(stages) == {"onnx"}
    assert deployed([*stages, ("cpu", "engine"), ("engine-sm86", "engine")]) == {"cpu", "engine-sm86"}


def latency(factor: float) -> dict[str, Any]:
    reference, value = rounds(factor)
    return {"times_ms": {"reference": reference, "value": value}, "why": "it is small"}


def test_limits_reach_what_is_deployed_and_what_is_named() -> None:
    gate = GateSpec.model_validate({"min_speedup": 1.2, "stages": {"precision": {"min_speedup": 1.5}}})
    onnx_stage = {"name": "onnx", "kind": "onnx", "cost": {"latency": latency(1.1)}}
    assert judge_stage(onnx_stage, gate, frozenset({"cpu"})) == []
    assert judge_stage(onnx_stage, gate, frozenset({"onnx"}))[0].outcome is Outcome.FAIL
    engine = judge_stage({"name": "engine-sm86", "kind": "engine"}, gate, frozenset({"engine-sm86"}))[0]
    assert engine.outcome is Outcome.NOT_RUN
    assert "no engine of the untouched model to compare with" in engine.reason
    half = judge_stage({"name": "fp16", "kind": "precision", "cost": {"latency": latency(2)}}, gate, frozenset())[0]
    assert (half.outcome, half.limit) == (Outcome.NOT_RUN, 1.5)
    assert "for TensorRT: its speed on a CPU says nothing" in half.reason


def test_the_reason_follows_the_plain_sentence() -> None:
    before, after = {"macs": 10, "file_bytes": 10}, {"macs": 10, "file_bytes": 9}
    words = in_words(latency(1.0), before, after, 0.95)["verdict"]
    assert words.startswith("smaller but not faster: no difference can be told")
    assert words.endswith("likely because it is small")
    assert "because" not in in_words(latency(1.0), before, before, 0.95)["verdict"]
    assert "because" not in in_words(latency(1.3), before, after, 0.95)["verdict"]


@pytest.mark.parametrize("name", ["prune-heads", "pass", "baseline"])
def test_a_stage_without_a_graph_has_no_speed(name: str, tmp_path: Path) -> None:
    values = {
        "task": {"data": {"path": "x.npz"}},
        "calibration": {"data": {"path": "y.npz"}},
        "passes": [{"prune-heads": {"ratio": 0.5}}],
        "gate": {"stages": {name: {"min_speedup": 1.2}}},
    }
    with pytest.raises(RecipeError, match=rf"gate\.stages\.{name}\.min_speedup: this stage makes no graph"):
        load_recipe(values)


def test_a_run_judges_its_speed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = copied("plain", tmp_path_factory.getbasetemp(), tmp_path)
    found = run(folder, "gate.min_speedup=1000", "gate.stages.onnx.on_fail=warn")
    stages = {stage["name"]: stage for stage in found.report["stages"]}
    assert (stages["onnx"]["status"], stages["fp16"]["status"]) == ("warned", "passed")
    (verdict,) = [v for v in stages["onnx"]["verdicts"] if v["gate"] == "speed"]
    assert (verdict["outcome"], verdict["limit"]) == ("FAIL", 1000)
    assert "latency | speedup" in markdown(found.report)
    assert "≥ 1000.00" in markdown(found.report)
    assert "speed: latency speedup" in junit(found.report)
    report = read_report(found.folder)
    words = stages["onnx"]["cost"]["latency"]["verdict"]
    assert f"onnx: {words}".replace("_", r"\_") in markdown(report).replace("_", r"\_")
    # The limit of a check is that of the baseline, whatever the run's own was.
    baseline = Baseline.of(report, GateSpec(min_speedup=0.0001))
    assert compare(found.folder, baseline).exit_code == 0
    strict = compare(found.folder, Baseline.of(report, GateSpec(min_speedup=1000)))
    bad = [(finding.stage, finding.metric) for finding in strict.findings if finding.bad]
    assert (strict.exit_code, bad) == (1, [("onnx", "speedup")])


def test_every_graph_stage_says_how_fast_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, found = finished("text", tmp_path_factory.getbasetemp())
    for stage in found.report["stages"]:
        timed = stage["kind"] in ("onnx", "precision")
        assert ("latency" in stage["cost"]) == timed
        if timed:
            entry = stage["cost"]["latency"]
            assert len(entry["times_ms"]["value"]) == entry["rounds"] == entry["speedup"]["rounds"]
            assert entry["speedup"]["words"] in entry["verdict"]
            assert entry["tokens"] == 8
