"""Bounds from published peaks: counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from runs import finished
from test_cost import graph

from headwise.cli import main
from headwise.errors import DataError, TargetError
from headwise.export.targets import resolve_target
from headwise.gates.gpus import GPUS, Gpu, find_gpu
from headwise.gates.roofline import roofline
from headwise.pipeline.bench.bounds import bound

GPU = Gpu(bandwidth=1e-3, tflops={"fp32": 1e-6, "fp16": 2e-6, "int8": 4e-6})  # 10^6 bytes and operations per second
ONES = ",".join("1" * 32)


def test_operations_and_bytes(tmp_path: Path) -> None:
    weights = "<float[4, 8] w = {" + ONES + "}>"
    path = graph(tmp_path, f"(float[B, 4] x) => (float[B, 8] y) {weights}", "y = MatMul(x, w)", 21)
    found = roofline(path, {"x": (3, 4)}, GPU)
    (work,) = found.work
    assert (work.name, work.count, work.number) == ("graph MatMul", 1, "fp32")
    assert (work.flops, work.weight_bytes, work.activation_bytes) == (2 * 3 * 4 * 8, 128, 4 * (12 + 24))
    assert work.bound_ms == pytest.approx(0.192)
    assert found.bytes == 128 + 4 * (12 + 24)
    assert (found.compute_ms, found.memory_ms) == (pytest.approx(0.192), pytest.approx(0.272))
    assert found.bound_ms == found.memory_ms


def test_quantized_products_run_in_their_format(tmp_path: Path) -> None:
    weights = "<int8[4, 8] w = {" + ONES + "}, float s = {1}, int8 z = {0}>"
    quantized = "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) c = DequantizeLinear(w, s, z)"
    path = graph(tmp_path, f"(float[B, 4] x) => (float[B, 8] y) {weights}", f"{quantized} y = MatMul(b, c)", 21)
    both = roofline(path, {"x": (3, 4)}, GPU)
    assert (both.work[0].number, both.work[0].weight_bytes) == ("int8", 32)
    path = graph(tmp_path, f"(float[B, 4] x) => (float[B, 8] y) {weights}", f"{quantized} y = MatMul(x, c)", 21)
    weights_only = roofline(path, {"x": (3, 4)}, GPU)
    assert (weights_only.work[0].number, weights_only.work[0].weight_bytes) == ("fp32", 32)
    assert both.compute_ms == weights_only.compute_ms / 4


def test_peaks_are_ordered_and_have_the_names_of_targets() -> None:
    for name, gpu in GPUS.items():
        assert gpu.peak("fp32") < gpu.peak("fp16") < gpu.peak("int8"), name
        assert resolve_target(name).sm > 0
        assert gpu.peak("int4") == gpu.peak("fp16")
    with pytest.raises(TargetError, match='the peaks of "rtx3060" are not known here'):
        find_gpu("rtx3060")


def test_a_run_on_a_named_gpu(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    _, run = finished("text", tmp_path_factory.getbasetemp())
    result = CliRunner().invoke(main, ["bench", "--roofline", str(run.folder), "--gpu", "rtx-3060", "--seq", "6"])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "fp16" in shown
    assert "2×" in shown, "both layers in one line"
    assert "No engine of this graph takes less than" in shown
    assert "a bound, never a measurement" in shown
    found = bound(str(run.folder), "l4", batch=2, tokens=6, past=None)
    assert found["shapes"]["input_ids"] == [2, 6]
    assert found["is"] == "a bound by published peaks, not a measurement"
    assert found["flops"] == sum(work["flops"] for work in found["work"]) > 0
    with pytest.raises(DataError, match="no GPU was named"):
        bound(str(run.folder), None, batch=1, tokens=None, past=None)
    with pytest.raises(DataError, match=r"--past 3, but .* takes no cache"):
        bound(str(run.folder), "l4", batch=1, tokens=None, past=3)
    with pytest.raises(DataError, match="is no graph"):
        bound(str(tmp_path), "l4", batch=1, tokens=None, past=None)
    for arguments, message in ((["--gpu", "l4", "x"], "--gpu without --roofline"), (["--roofline", "x", "y"], "2 art")):
        refused = CliRunner().invoke(main, ["bench", *arguments])
        assert refused.exit_code == 2
        assert message in refused.output
