"""Metrics against scipy and scikit-learn, prediction in the order of the samples, and measurements on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

from headwise.calibration.data import DataSpec
from headwise.calibration.tasks import (
    Examples,
    FidelityOptions,
    LanguageOptions,
    MultiOutputOptions,
    SimilarityOptions,
    make_task,
)
from headwise.errors import DataError, StorageError
from headwise.gates.judge import GateSpec, judge
from headwise.gates.measure import (
    Measurement,
    Predictions,
    load_measurements,
    measure,
    predict,
    save_measurements,
)
from headwise.gates.metrics import METRICS, find_metric

RNG = np.random.default_rng(3)
DATA = DataSpec(path="unused.npz")


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("spearman", lambda labels, values: stats.spearmanr(labels, values).statistic),
        ("pearson", lambda labels, values: stats.pearsonr(labels, values).statistic),
        ("mse", sklearn_metrics.mean_squared_error),
        ("mae", sklearn_metrics.mean_absolute_error),
        ("r2", sklearn_metrics.r2_score),
    ],
)
def test_value_metrics_agree_with_the_libraries(name: str, theirs: Any) -> None:
    labels = np.round(RNG.uniform(0, 5, size=200), 1)
    values = np.round(labels + RNG.normal(size=200), 1)
    _compare(name, theirs, labels, values)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("accuracy", sklearn_metrics.accuracy_score),
        ("f1", lambda labels, ids: sklearn_metrics.f1_score(labels, ids, average="macro")),
        ("matthews", sklearn_metrics.matthews_corrcoef),
    ],
)
def test_class_metrics_agree_with_the_libraries(name: str, theirs: Any) -> None:
    labels = RNG.integers(0, 5, size=200)
    # Class 5 is predicted but never true, and class 6 does not occur at all.
    ids = np.where(RNG.random(200) < 0.6, labels, RNG.integers(0, 6, size=200))
    _compare(name, theirs, labels, ids)


def _compare(name: str, theirs: Any, labels: np.ndarray, values: np.ndarray) -> None:
    metric = METRICS[name]
    assert metric.of(values, labels) == pytest.approx(metric.scale * theirs(labels, values), abs=1e-9)
    indices = RNG.integers(0, 200, size=(4, 200))
    both = np.stack([values, np.roll(values, 1)])
    ours = metric.resampled(both, labels, indices)
    expected = [[metric.scale * theirs(labels[i], side[i]) for i in indices] for side in both]
    assert ours == pytest.approx(np.array(expected), abs=1e-9)


def test_undefined_metrics_are_nan() -> None:
    same, rising = np.full(40, 0.1), np.arange(40.0)
    assert np.isnan(METRICS["spearman"].of(rising, same))
    assert np.isnan(METRICS["pearson"].of(same, rising))
    assert np.isnan(METRICS["r2"].of(rising, same))
    assert np.isnan(METRICS["matthews"].of(rising.astype(int) % 2, np.ones(40, dtype=int)))
    assert METRICS["matthews"].of(np.ones(40, dtype=int), rising.astype(int) % 2) == 0


def test_perplexity_is_the_exponential_of_nats() -> None:
    windows = np.array([[20.0, 10.0], [10.0, 10.0]])
    assert METRICS["nats"].of(windows, None) == pytest.approx(1.5)
    assert METRICS["perplexity"].of(windows, None) == pytest.approx(np.exp(1.5))


def test_find_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match='did you mean "spearman"'):
        find_metric("spaerman")
    with pytest.raises(DataError, match="cannot be imported"):
        find_metric("no_such_module_here:f")
    (tmp_path / "custom_metric_here.py").write_text(
        "def hits(predictions, labels):\n    return float((predictions.argmax(-1) == labels).sum())\n"
    )
    monkeypatch.chdir(tmp_path)
    metric = find_metric("custom_metric_here:hits", higher_is_better=False)
    assert (metric.higher_is_better, metric.unit, metric.scale) == (False, "", 1.0)
    logits = np.eye(3)[[0, 1, 2, 0]]
    assert metric.of(logits, np.array([0, 1, 0, 0])) == 3.0
    drawn = metric.resampled(np.stack([logits, logits]), np.array([0, 1, 0, 0]), np.array([[0, 0, 0, 0], [2, 2, 2, 2]]))
    assert drawn.tolist() == [[4.0, 0.0], [4.0, 0.0]]


class Echo:
    """A runner whose token states are a function of the token alone, and which counts the rows that it runs."""

    def __init__(self) -> None:
        self.rows = 0
        self.largest = 0

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = batch["input_ids"]
        self.rows += len(ids)
        self.largest = max(self.largest, len(ids))
        states = np.stack([ids, np.ones_like(ids), ids**2], axis=-1).astype(np.float32)
        return {"last_hidden_state": states}


def token_examples(lengths: list[int], *, per_sample: int = 1, labels: dict[str, np.ndarray] | None = None) -> Examples:
    rows = []
    for i, length in enumerate(lengths):
        ids = np.arange(1, length + 1, dtype=np.int64) + i
        rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return Examples.of(
        rows,
        source="made",
        padding={"input_ids": 99.0},
        per_sample=per_sample,
        labels=labels,
        facts={"pooling": "mean"},
    )


def test_predictions_come_in_the_order_of_the_samples_whatever_the_batches() -> None:
    lengths = [3, 7, 1, 5, 2, 6]
    task = make_task(SimilarityOptions(type="sentence-similarity", data=DATA))
    examples = token_examples(lengths, per_sample=2, labels={"embedding": np.array([1.0, 2.0, 3.0])})
    expected = np.array([np.arange(1, n + 1).mean() + i for i, n in enumerate(lengths)]).reshape(3, 2)
    seen: list[int] = []
    for size in (1, 2, 32):
        values = predict(Echo(), task, examples, batch_size=size, progress=seen.append).values["embedding"]
        assert values.shape == (3, 2, 3)
        assert values[..., 0] == pytest.approx(expected)
        assert sum(seen) == 3
        seen.clear()


def test_equal_rows_run_once_and_batches_keep_their_size() -> None:
    task = make_task(FidelityOptions(data=DATA))
    examples = token_examples([4, 3, 2])
    repeated = Examples.of([*examples.rows, *examples.rows], source="made", facts={"pooling": "mean"})
    runner = Echo()
    values = predict(runner, task, repeated, batch_size=2).values["last_hidden_state"]
    assert (runner.rows, runner.largest) == (3, 2)
    assert np.array_equal(values[:3], values[3:])
    assert not np.array_equal(values[0], values[1])


def test_token_classes_of_different_lengths_are_filled_with_minus_one() -> None:
    task = make_task(LanguageOptions(type="language-modeling", data=DATA))
    examples = token_examples([4, 2, 3])

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.eye(100, dtype=np.float32)[batch["input_ids"]]}

    found = predict(runner, task, examples, batch_size=1).values["logits:argmax"]
    assert found.tolist() == [[1, 2, 3, 4], [2, 3, -1, -1], [3, 4, 5, -1]]
    whole = predict(runner, task, examples, batch_size=8).values["logits:argmax"]
    assert np.array_equal(found, whole)


def test_own_metrics_are_judged_and_closeness_only_on_request() -> None:
    spec = MultiOutputOptions.model_validate(
        {
            "type": "multi-output",
            "data": DATA,
            "outputs": {"digit": {"type": "classification"}, "age": {"type": "regression", "metric": "mae"}},
        }
    )
    rows = [{"x": np.array([float(i)], dtype=np.float32)} for i in range(4)]
    labels = {"digit": np.array([0, 1, 2, 2]), "age": np.array([1.0, 2.0, 3.0, 4.0])}
    examples = Examples.of(rows, source="made", labels=labels)
    logits = np.eye(3)[[0, 1, 2, 0]]
    reference = Predictions(values={"digit": logits, "age": np.array([1.0, 2.0, 3.0, 5.0])})
    turned = Predictions(values={"digit": logits[:, [1, 0, 2]], "age": np.array([1.0, 2.0, 3.0, 4.0])})
    found = measure(make_task(spec), examples, reference, turned)
    assert [(m.output, m.metric, m.judged) for m in found] == [
        ("digit", "accuracy", True),
        ("age", "mae", True),
        ("digit", "fidelity", False),
    ]
    assert found[0].values() == (75.0, 25.0)
    assert found[1].values() == (0.25, 0.0)
    assert found[2].values() == (100.0, 25.0)
    assert (found[0].unit, found[1].unit, found[1].higher_is_better) == ("points", "", False)


def test_nan_logits_do_not_count_as_class_zero() -> None:
    spec = MultiOutputOptions.model_validate(
        {"type": "multi-output", "data": DATA, "outputs": {"digit": {"type": "classification"}}}
    )
    examples = Examples.of([{"x": np.zeros(1)}] * 40, source="made", labels={"digit": np.zeros(40, dtype=int)})
    logits = np.tile([1.0, 0.0], (40, 1))
    broken = np.full_like(logits, np.nan)
    found = measure(
        make_task(spec), examples, Predictions(values={"digit": logits}), Predictions(values={"digit": broken})
    )
    for measurement in found:
        verdict = judge(measurement, GateSpec(max_drop=100), "s")
        assert (verdict.outcome, verdict.reason) == ("FAIL", "40 of 40 candidate values are NaN or infinite")


def test_closeness_of_vectors_and_of_classes() -> None:
    task = make_task(FidelityOptions(data=DATA))
    examples = Examples.of([{"x": np.zeros(1)}] * 4, source="made")
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    other = np.array([[3.0, 0.0], [2.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    classes, turned = np.array([[1, 2, -1]] * 4), np.array([[1, 3, 7], [1, 2, 7], [3, 3, 7], [-1, 2, 7]])
    reference = Predictions(values={"state": vectors, "logits:argmax": classes})
    candidate = Predictions(values={"state": other, "logits:argmax": turned})
    cosine, agreement = measure(task, examples, reference, candidate)
    assert (cosine.output, cosine.metric, cosine.judged) == ("state", "fidelity", True)
    assert cosine.candidate.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert cosine.values() == (100.0, 50.0)
    assert (agreement.output, agreement.metric) == ("logits", "agreement")
    assert agreement.candidate.tolist() == [0.5, 1.0, 0.0, 0.5]


def test_an_output_that_the_candidate_lacks_fails() -> None:
    task = make_task(FidelityOptions(data=DATA))
    examples = Examples.of([{"x": np.zeros(1)}] * 40, source="made")
    reference = Predictions(values={"state": np.ones((40, 2)), "more": np.ones((40, 2))})
    candidate = Predictions(values={"state": np.ones((40, 2))})
    verdicts = [judge(found, GateSpec(), "s") for found in measure(task, examples, reference, candidate)]
    assert [verdict.outcome for verdict in verdicts] == ["PASS", "FAIL"]
    assert 'no usable values for the output "more"' in verdicts[1].reason


def test_saved_results_can_be_judged_again(tmp_path: Path) -> None:
    labels = RNG.normal(size=60)
    found = (
        Measurement(
            output="embedding",
            metric="spearman",
            unit="points",
            higher_is_better=True,
            judged=True,
            labels=labels,
            reference=labels + 0.1,
            candidate=labels + RNG.normal(size=60),
        ),
        Measurement(
            output="a:b/c",
            metric="fidelity",
            unit="points",
            higher_is_better=True,
            judged=False,
            labels=None,
            reference=np.ones(60),
            candidate=np.ones(60),
        ),
    )
    save_measurements(found, tmp_path / "samples.npz")
    again = load_measurements(tmp_path / "samples.npz")
    assert [judge(m, GateSpec(), "s") for m in again] == [judge(m, GateSpec(), "s") for m in found]
    assert [(m.output, m.metric, m.unit, m.judged, m.labels is None) for m in again] == [
        ("embedding", "spearman", "points", True, False),
        ("a:b/c", "fidelity", "points", False, True),
    ]
    predictions = Predictions(values={"file": RNG.normal(size=(3, 2)), "logits:nll": np.ones((3, 2))})
    predictions.save(tmp_path / "predictions.npz")
    restored = Predictions.load(tmp_path / "predictions.npz").values
    assert set(restored) == {"file", "logits:nll"}
    assert np.array_equal(restored["file"], predictions.values["file"])


def test_damaged_results(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(StorageError, match=r"samples\.npz cannot be read"):
        load_measurements(path)
    with pytest.raises(StorageError, match="cannot be read"):
        Predictions.load(tmp_path / "missing.npz")
    np.savez(path, something=np.zeros(2))
    with pytest.raises(StorageError, match="cannot be read"):
        load_measurements(path)


def test_the_torch_module_and_its_predictions_agree() -> None:
    module = torch.nn.Linear(3, 2)
    spec = MultiOutputOptions.model_validate(
        {"type": "multi-output", "data": DATA, "outputs": {"output": {"type": "classification"}}}
    )
    inputs = RNG.normal(size=(5, 3)).astype(np.float32)
    examples = Examples.of([{"input": row} for row in inputs], source="made")

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": module(torch.as_tensor(batch["input"])).detach().numpy()}

    values = predict(runner, make_task(spec), examples, batch_size=2).values["output"]
    assert values == pytest.approx(module(torch.as_tensor(inputs)).detach().numpy(), abs=1e-6)
