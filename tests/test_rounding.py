"""GPTQ and clipping: they agree with rounding where they must, and beat it where they promise to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headwise.calibration.formats import quantize_weight, restore
from headwise.model.quantization import Format
from headwise.passes.rounding import SHRINKS, best_shrink, gptq

SINGLE = np.dtype(np.float32)
Array = Any


def problem(seed: int = 0) -> tuple[Array, Array]:
    """(256, 24) weights with heavy tails, and 600 tokens whose channels are strongly correlated."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(600, 40)) @ random.normal(size=(40, 256)) + 0.1 * random.normal(size=(600, 256))
    return random.standard_t(4, size=(256, 24)).astype(np.float32), rows.astype(np.float32)


def error(rows: Array, weight: Array, found: Array) -> float:
    return float(((rows @ (weight - found)) ** 2).sum() / ((rows @ weight) ** 2).sum())


def moment(rows: Array) -> Array:
    return rows.T.astype(np.float64) @ rows / len(rows)


@pytest.mark.parametrize(("number", "block"), [("int8", None), ("int4", 32), ("nvfp4", 16), ("fp8", None)])
def test_without_correlation_gptq_is_rounding(number: Format, block: int | None) -> None:
    weight, _ = problem()
    nearest = quantize_weight(weight, number, block=block, dtype=SINGLE)
    found = gptq(weight, 3 * np.eye(256), number, block=block, dtype=SINGLE)
    np.testing.assert_array_equal(found.values, nearest.values)
    np.testing.assert_array_equal(found.scale, nearest.scale)
    assert found.shared == nearest.shared


@pytest.mark.parametrize(("number", "block"), [("int8", None), ("int4", 32), ("nvfp4", 16), ("mxfp8", 32)])
def test_with_correlation_gptq_has_less_error(number: Format, block: int | None) -> None:
    weight, rows = problem()
    nearest = restore(quantize_weight(weight, number, block=block, dtype=SINGLE), block, SINGLE)
    found = restore(gptq(weight, moment(rows), number, block=block, dtype=SINGLE), block, SINGLE)
    assert error(rows, weight, found) < 0.3 * error(rows, weight, nearest)


def test_feedback_passes_through_blocks_of_columns() -> None:
    """An input that repeats one of an earlier block makes its rounding good, whatever lies between them."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(500, 256))
    rows[:, 200] = rows[:, 3]
    weight = random.normal(size=(256, 8)).astype(np.float32)
    codes = restore(gptq(weight, moment(rows), "int4", block=None, dtype=SINGLE), None, SINGLE)
    nearest = restore(quantize_weight(weight, "int4", block=None, dtype=SINGLE), None, SINGLE)
    pair = [abs(float((w[[3, 200]].sum(0) - weight[[3, 200]].sum(0)).mean())) for w in (codes, nearest)]
    spread = [np.abs(w[[3, 200]].sum(0) - weight[[3, 200]].sum(0)).mean() for w in (codes, nearest)]
    assert spread[0] < 0.8 * spread[1], pair


def test_inputs_that_were_always_zero_are_no_trouble() -> None:
    weight, rows = problem()
    rows[:, [0, 9]] = 0
    found = restore(gptq(weight, moment(rows), "int4", block=32, dtype=SINGLE), 32, SINGLE)
    assert np.isfinite(found).all()
    assert error(rows, weight, found) < 0.01
    silent = gptq(weight, np.zeros((256, 256)), "int4", block=32, dtype=SINGLE)
    np.testing.assert_array_equal(silent.values, quantize_weight(weight, "int4", block=32, dtype=SINGLE).values)


@pytest.mark.parametrize("block", [None, 32])
def test_clipping_lowers_the_error_of_the_product(block: int | None) -> None:
    weight, rows = problem()
    shrink = best_shrink(weight, rows, "int4", block=block, dtype=SINGLE)
    assert shrink.shape == ((24,) if block is None else (8, 24))
    assert set(np.unique(shrink)) <= {np.float32(share) for share in SHRINKS}
    assert shrink.min() < 1
    errors = [
        error(
            rows, weight, restore(quantize_weight(weight, "int4", block=block, dtype=SINGLE, shrink=s), block, SINGLE)
        )
        for s in (shrink, 1.0)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_clipping_leaves_weights_alone_that_fit() -> None:
    weight = np.random.default_rng(0).choice([-7.0, 7.0, 3.0], size=(64, 8)).astype(np.float32)
    rows = np.random.default_rng(1).normal(size=(100, 64)).astype(np.float32)
    assert (best_shrink(weight, rows, "int4", block=32, dtype=SINGLE) == 1).all()
