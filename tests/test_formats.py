"""Number formats: nearest codes, exact round trips, scales that a graph can hold."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from headwise.calibration.formats import (
    GRIDS,
    decode,
    effective,
    encode,
    input_scale,
    quantize_weight,
    representable,
    restore,
    spread,
)
from headwise.model.quantization import Format

HALF, SINGLE, BRAIN = (np.dtype(t) for t in (np.float16, np.float32, ml_dtypes.bfloat16))
LAYOUTS: tuple[tuple[Format, int | None], ...] = (
    ("int8", None),
    ("int8", 32),
    ("fp8", None),
    ("int4", 32),
    ("nvfp4", 16),
    ("mxfp8", 32),
)


def weights(seed: int = 0) -> Any:
    """(64, 20) with outputs of very different sizes and one output of zeros."""
    values = np.random.default_rng(seed).normal(size=(64, 20)) * np.logspace(-3, 0, 20)
    values[:, 7] = 0
    return values.astype(np.float32)


def codes_of(number: Format) -> Any:
    """Every code of a format as a float."""
    grid = GRIDS[number]
    if grid.lowest is not None:
        return np.arange(grid.lowest, grid.largest + 1, dtype=np.float32)
    bits = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if number == "nvfp4":
        bits = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    return np.unique(bits[np.isfinite(bits)])


@pytest.mark.parametrize("number", GRIDS)
def test_every_value_gets_its_nearest_code(number: Format) -> None:
    known = codes_of(number)
    values = np.random.default_rng(0).uniform(1.2 * known[0], 1.2 * known[-1], 2000).astype(np.float32)
    found = encode(values, 1.0, number).astype(np.float32)
    best = np.abs(values[:, None] - known).min(axis=1)
    np.testing.assert_array_equal(np.abs(values - found), best)
    assert encode(np.zeros(1), 0.3, number).astype(np.float32) == 0


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN])
@pytest.mark.parametrize(("number", "block"), LAYOUTS)
def test_codes_survive_a_round_trip(number: Format, block: int | None, dtype: np.dtype[Any]) -> None:
    found = quantize_weight(weights(), number, block=block, dtype=dtype)
    again = restore(found, block, dtype)
    scales = spread(effective(found.scale, found.shared, dtype), block)
    np.testing.assert_array_equal(encode(again, scales, number), found.values)
    assert found.values.dtype == GRIDS[number].dtype
    assert found.scale.shape == ((20,) if block is None else (64 // block, 20))
    assert (again[:, 7] == 0).all()


@pytest.mark.parametrize(("number", "block", "error"), [("int8", None, 0.01), ("fp8", None, 0.04), ("int4", 32, 0.15)])
def test_outputs_of_every_size_keep_their_precision(number: Format, block: int | None, error: float) -> None:
    original = weights()
    found = restore(quantize_weight(original, number, block=block, dtype=HALF), block, HALF)
    loss = np.linalg.norm(found - original, axis=0) / np.maximum(np.linalg.norm(original, axis=0), 1e-9)
    assert loss.max() < error


def test_powers_of_two_are_exact_and_the_lowest_integer_is_not_used() -> None:
    original = np.float32([[127, -127], [64, 1], [-1, 32]])
    found = quantize_weight(original, "int8", block=None, dtype=HALF)
    np.testing.assert_array_equal(restore(found, None, HALF), original)
    assert found.values.min() == -127


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN])
def test_scales_are_numbers_of_the_graph(dtype: np.dtype[Any]) -> None:
    scale = quantize_weight(weights(), "int8", block=None, dtype=dtype).scale
    np.testing.assert_array_equal(scale.astype(dtype).astype(np.float32), scale)
    assert (representable([0.0, 1e-30], dtype) > 0).all()
    assert np.isfinite(representable(1e38, dtype))
    assert input_scale(12.7, "int8", SINGLE) == pytest.approx(0.1)


def test_microscaling_scales_are_powers_of_two_that_clip_nothing() -> None:
    original = weights()
    found = quantize_weight(original, "mxfp8", block=32, dtype=HALF)
    assert (np.exp2(np.rint(np.log2(found.scale))) == found.scale).all()
    largest = np.abs(original.reshape(2, 32, 20)).max(axis=1)
    assert (largest <= 448 * found.scale).all()
    assert (largest > 0.49 * 448 * found.scale)[largest > 0].all()


def test_fp4_scales_are_fp8_numbers_times_one_factor() -> None:
    found = quantize_weight(weights(), "nvfp4", block=16, dtype=HALF)
    np.testing.assert_array_equal(found.scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), found.scale)
    assert found.scale.max() == 448
    assert found.shared == float(np.float16(found.shared))


def test_a_smaller_range_clips() -> None:
    original = weights()
    found = quantize_weight(original, "int8", block=None, dtype=SINGLE, shrink=0.5)
    np.testing.assert_allclose(
        np.abs(decode(found.values, found.scale)).max(0)[8:], np.abs(original).max(0)[8:] / 2, 0.02
    )
