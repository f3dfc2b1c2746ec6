"""Activation ranges: streamed histograms, padding left out, samples that do not depend on batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwise.calibration.histogram import BINS, Histogram, RangeMethod, range_of
from headwise.calibration.ranges import Tap, collect_ranges, load_ranges, save_ranges
from headwise.calibration.tasks import Examples
from headwise.errors import DataError, StorageError

Array = Any
WIDTH = 6
BATCH_SEQUENCE = ("batch", "sequence", WIDTH)


def examples(count: int = 12) -> Examples:
    """Rows of 3 to 8 tokens; a token's id says which row and position it has."""
    rows = []
    for index in range(count):
        length = 3 + index % 6
        ids = 1 + 100 * index + np.arange(length)
        rows.append({"input_ids": ids, "attention_mask": np.ones(length, np.int64)})
    return Examples.of(rows, source="made up")


def activations(ids: Array) -> Array:
    """(B, T, WIDTH) numbers of the token; padding (id 0) is huge."""
    values = np.sin(ids[..., None] * np.arange(1, WIDTH + 1)) * np.arange(1, WIDTH + 1)
    return np.where(ids[..., None] == 0, 1e6, values).astype(np.float32)


def every_token(source: Examples) -> Array:
    return np.concatenate([activations(row["input_ids"]) for row in source.rows])


LAYOUTS: Mapping[str, tuple[tuple[int | str, ...], Callable[[Array], Array]]] = {
    "rows of tokens": (BATCH_SEQUENCE, lambda x: x),
    "tokens of rows": (("sequence", "batch", WIDTH), lambda x: x.swapaxes(0, 1)),
    "flat": (("batch*sequence", WIDTH), lambda x: x.reshape(-1, WIDTH)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_padding_does_not_count_and_batches_do_not_matter(layout: str, batch_size: int) -> None:
    dims, arrange = LAYOUTS[layout]
    source = examples()

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"x": arrange(activations(batch["input_ids"]))}

    tap = Tap(name="x", dims=dims)
    seen = collect_ranges(run, source, [tap], rows=20, moments=["x"], batch_size=batch_size)["x"]
    tokens = every_token(source)
    assert seen.tokens == len(tokens)
    np.testing.assert_array_equal(seen.largest, np.abs(tokens).max(axis=0))
    np.testing.assert_allclose(seen.magnitude, np.abs(tokens).mean(axis=0), rtol=1e-6)
    assert seen.moment is not None
    np.testing.assert_allclose(seen.moment, tokens.T @ tokens / len(tokens), rtol=1e-4)
    once = collect_ranges(run, source, [tap], rows=20, batch_size=3)["x"]
    np.testing.assert_array_equal(seen.rows, once.rows)
    np.testing.assert_array_equal(seen.histogram.counts, once.histogram.counts)
    assert once.moment is None
    assert len(seen.rows) == 20
    known = {row.tobytes() for row in tokens}
    assert all(row.tobytes() in known for row in seen.rows)
    assert len({row.tobytes() for row in seen.rows}) == 20


def test_padding_counts_where_a_call_takes_the_range_of_all_it_gets() -> None:
    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"x": activations(batch["input_ids"])}

    seen = collect_ranges(run, examples(), [Tap(name="x", dims=BATCH_SEQUENCE)], padding=True, batch_size=4)["x"]
    assert seen.largest.tolist() == [1e6] * WIDTH
    assert seen.tokens > len(every_token(examples()))


def test_a_tensor_without_tokens_counts_every_row() -> None:
    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"pooled": batch["input_ids"][:, :1] * np.ones((1, WIDTH), np.float32)}

    seen = collect_ranges(run, examples(), [Tap(name="pooled", dims=("batch", WIDTH))], batch_size=5)["pooled"]
    assert seen.tokens == 12
    assert seen.largest.tolist() == [1101] * WIDTH


def test_a_calibration_that_was_killed_goes_on_and_sees_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.calibration.ranges._INTERVAL", 0.0)
    monkeypatch.setattr("headwise.calibration.ranges._SHARE", 0)
    calls: list[int] = []

    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        calls.append(len(batch["input_ids"]))
        return {"x": activations(batch["input_ids"])}

    def killed(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(batch)

    partial, told = tmp_path / "ranges.partial", []
    options: Any = {"rows": 20, "moments": ["x"], "batch_size": 2}
    tap = Tap(name="x", dims=BATCH_SEQUENCE)
    whole = collect_ranges(run, examples(), [tap], **options)["x"]
    assert len(calls) == 6
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        collect_ranges(killed, examples(), [tap], partial=partial, **options)
    assert partial.exists()
    calls.clear()
    seen = collect_ranges(run, examples(), [tap], partial=partial, progress=told.append, **options)["x"]
    assert len(calls) == 3
    assert sum(told) == 12
    assert not partial.exists()
    for field in ("tokens", "largest", "magnitude", "rows", "moment"):
        np.testing.assert_array_equal(getattr(seen, field), getattr(whole, field))
    np.testing.assert_array_equal(seen.histogram.counts, whole.histogram.counts)
    assert (seen.histogram.exponent, seen.histogram.largest) == (whole.histogram.exponent, whole.histogram.largest)
    partial.write_bytes(b"half of a file")
    with pytest.raises(StorageError, match=r"ranges\.partial cannot be read"):
        collect_ranges(run, examples(), [tap], partial=partial, **options)


def test_numbers_that_are_none_are_an_error() -> None:
    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"x": activations(batch["input_ids"]) * np.inf}

    with pytest.raises(DataError, match="the activation x is not finite"), np.errstate(invalid="ignore"):
        collect_ranges(run, examples(), [Tap(name="x", dims=BATCH_SEQUENCE)])


def test_ranges_are_stored_and_read_back(tmp_path: Path) -> None:
    def run(batch: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"x": activations(batch["input_ids"]), "y": activations(batch["input_ids"]) / 8}

    taps = [Tap(name=name, dims=BATCH_SEQUENCE) for name in ("x", "y")]
    seen = collect_ranges(run, examples(), taps, moments=["y"])
    save_ranges(seen, tmp_path / "ranges.npz")
    again = load_ranges(tmp_path / "ranges.npz")
    assert list(again) == ["x", "y"]
    for name, before in seen.items():
        after = again[name]
        for field in ("largest", "magnitude", "rows"):
            np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
        assert (after.moment is None) == (before.moment is None) == (name == "x")
        assert (after.histogram.exponent, after.histogram.largest) == (
            before.histogram.exponent,
            before.histogram.largest,
        )
        np.testing.assert_array_equal(after.histogram.counts, before.histogram.counts)
    (tmp_path / "ranges.npz").write_bytes(b"half of a file")
    with pytest.raises(StorageError, match=r"ranges\.npz cannot be read"):
        load_ranges(tmp_path / "ranges.npz")


def test_a_histogram_does_not_depend_on_the_order() -> None:
    values = np.random.default_rng(0).standard_cauchy(20_000).astype(np.float32)
    forward, backward, whole = Histogram(), Histogram(), Histogram()
    for part in np.split(np.sort(np.abs(values)), 10):
        forward.add(part)
    for part in np.split(np.sort(np.abs(values))[::-1], 10):
        backward.add(-part)
    whole.add(values)
    for other in (forward, backward):
        assert (other.exponent, other.largest) == (whole.exponent, whole.largest)
        np.testing.assert_array_equal(other.counts, whole.counts)
    assert whole.counts.sum() == len(values)
    index = np.abs(values.astype(np.float64) / 2.0**whole.exponent * BINS).astype(int)
    np.testing.assert_array_equal(whole.counts, np.bincount(index, minlength=BINS))


def test_an_empty_histogram_and_zeros() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(0))
    assert not histogram.counts.any()
    histogram.add(np.zeros(5))
    assert range_of(histogram, "mse", "int8", percentile=99) == 1.0


def histogram_of(values: Array) -> Histogram:
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def error_of(values: Array, largest: float) -> float:
    scale = largest / 127
    return float(((np.clip(np.rint(values / scale), -128, 127) * scale - values) ** 2).mean())


def test_minmax_and_percentile() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    histogram = histogram_of(values)
    assert range_of(histogram, "minmax", "int8", percentile=50) == np.float32(np.abs(values).max())
    for percentile in (90.0, 99.9):
        found = range_of(histogram, "percentile", "int8", percentile=percentile)
        assert found == pytest.approx(np.percentile(np.abs(values), percentile), rel=0.01)
    assert range_of(histogram, "percentile", "int8", percentile=100) == histogram.largest


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_one_outlier_does_not_decide_the_range(method: RangeMethod) -> None:
    values = np.append(np.random.default_rng(0).normal(size=50_000), 60)
    found = range_of(histogram_of(values), method, "int8", percentile=99)
    assert 3 < found < 54
    assert error_of(values[:-1], found) < 0.8 * error_of(values[:-1], 60)


def test_mse_has_the_smallest_error_of_all_ranges() -> None:
    values = np.random.default_rng(1).laplace(size=50_000)
    histogram = histogram_of(values)
    found = range_of(histogram, "mse", "int8", percentile=99)
    others = [error_of(values, float(share) * histogram.largest) for share in np.linspace(0.1, 1, 40)]
    assert error_of(values, found) <= 1.02 * min(others)
    assert found < histogram.largest
