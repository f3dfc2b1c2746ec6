"""Keys and values in 8 bits: the folded graph is the same function, and its tensors suit one scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from runs import TEXT, begun, run, write_recipe
from test_smooth import BLOCK, batch, block

from headwise.calibration.ranges import Tap, collect_ranges
from headwise.calibration.tasks import Examples
from headwise.errors import ExportError, TargetError
from headwise.export.kv import Cached, find_cached, fold_channels, quantize_cached
from headwise.export.matrices import TapRunner
from headwise.export.precision import convert_precision
from headwise.export.runners import OrtRunner
from headwise.export.smoothing import require_same
from headwise.export.targets import check_target, resolve_target
from headwise.passes.kv import channel_exponents
from headwise.passes.quantize import Quantize

Array = Any
TURNED = """qr = RotaryEmbedding(qt, cosines, sines)
    kr = RotaryEmbedding(kt, cosines, sines)
    a = Attention(qr, kr, vt)"""
ROTARY = ("a = Attention(qt, kt, vt)", TURNED)


def rotary_block(folder: Path) -> Path:
    """The block of the smoothing tests with rotary positions, for (2, 5, 32) inputs."""
    path = block(folder, ROTARY)
    model = onnx.load(str(path))
    angles = np.random.default_rng(5).normal(size=(2, 5, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(np.cos(angles), "cosines"))
    model.graph.initializer.append(numpy_helper.from_array(np.sin(angles), "sines"))
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), str(path))
    return path


def exponents(seed: int = 3) -> Array:
    """For two kv heads of width 8, not whole, the same for channels that rotary positions mix."""
    half = np.random.default_rng(seed).uniform(-3, 3, size=(2, 1, 4))
    return np.tile(half, (1, 2, 1)).ravel()


def folded(path: Path, *names: str) -> tuple[frozenset[str], Path]:
    model = onnx.load(str(path))
    done = fold_channels(model, {name: exponents(seed) for seed, name in enumerate(names)})
    onnx.save(model, str(path.with_name("folded.onnx")))
    return done, path.with_name("folded.onnx")


@pytest.mark.parametrize("rotary", [False, True])
def test_folding_scales_the_channels_and_changes_no_output(tmp_path: Path, rotary: bool) -> None:
    path = rotary_block(tmp_path) if rotary else block(tmp_path)
    keys = "kr" if rotary else "kt"
    found = find_cached(onnx.load(str(path)))
    pairs = tuple((index, index + 4) for index in range(4)) if rotary else ()
    assert found == (
        Cached(name=keys, tap=keys, heads=2, width=8, pairs=pairs, label=".key"),
        Cached(name="vt", tap="vt", heads=2, width=8, label=".value"),
    )
    done, out = folded(path, keys, "vt")
    assert done == {keys, "vt"}
    before, after = (TapRunner(p, [keys, "vt"])(batch()) for p in (path, out))
    for seed, name in enumerate((keys, "vt")):
        scale = np.exp2(-exponents(seed)).reshape(2, 1, 8)
        np.testing.assert_allclose(after[name], before[name] * scale, rtol=2e-5, atol=1e-6)
    assert require_same(path, out, batch()) < 1e-6
    assert len(onnx.load(str(out)).graph.node) == len(onnx.load(str(path)).graph.node)


def test_channels_that_rotary_positions_mix_need_one_scale(tmp_path: Path) -> None:
    path = rotary_block(tmp_path)
    model = onnx.load(str(path))
    fold_channels(model, {"kr": np.linspace(-2, 2, 16)})
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    with pytest.raises(ExportError, match="scaling channels changed the graph"):
        require_same(path, tmp_path / "wrong.onnx", batch())
    largest = np.float32([1, 8, 2, 4])
    mixed = channel_exponents(largest, width=4, pairs=[(0, 2), (1, 3)])
    np.testing.assert_allclose(mixed[[0, 1]], mixed[[2, 3]])
    assert mixed[1] - mixed[0] == pytest.approx(2)
    free = channel_exponents(largest, width=4)
    assert np.ptp(np.log2(largest) - free) < 1e-6


TURN = "Transpose<perm=[0, 2, 1, 3]>"
UNFOLDED = {
    "somebody else reads the keys": (("s = Sigmoid(gate)", "ke = Neg(kt)\n    s = Sigmoid(gate)"), "kt"),
    "something is done to the queries": ((f"qt = {TURN}(q4)", f"qe = Relu(q4)\n    qt = {TURN}(qe)"), "kt"),
    "the output meets no matrix": (("p = MatMul(o, w_out)", "oe = Relu(o)\n    p = MatMul(oe, w_out)"), "vt"),
}


@pytest.mark.parametrize("case", UNFOLDED)
def test_what_cannot_be_made_up_for_stays_as_it_is(tmp_path: Path, case: str) -> None:
    change, name = UNFOLDED[case]
    path = block(tmp_path, change)
    done, out = folded(path, name)
    assert done == frozenset()
    with OrtRunner(path) as first, OrtRunner(out) as second:
        np.testing.assert_array_equal(first(batch())["y"], second(batch())["y"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_rounds_keys_and_values_to_codes(tmp_path: Path, precision: Any) -> None:
    path = block(tmp_path)
    model = onnx.load(str(path))
    quantize_cached(model, {"kt": 0.25, "vt": 0.125}, {"kt": "int8", "vt": "int8"})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(tmp_path / "kv.onnx"))
    convert_precision(tmp_path / "kv.onnx", tmp_path / "out.onnx", precision)
    x = {"x": batch()["x"].astype("f2" if precision == "fp16" else "f4")}
    values = TapRunner(tmp_path / "out.onnx", ["kt", "kt_kv_codes", "kt_kv_values", "vt_kv_values"])(x)
    assert values["kt_kv_codes"].dtype == np.int8
    np.testing.assert_array_equal(values["kt_kv_codes"], np.rint(values["kt"] / 0.25))
    np.testing.assert_array_equal(values["kt_kv_values"], values["kt_kv_codes"] * 0.25)
    attention = next(node for node in onnx.load(str(tmp_path / "out.onnx")).graph.node if node.op_type == "Attention")
    assert list(attention.input) == ["qt", "kt_kv_values", "vt_kv_values"]


def test_ranges_of_heads_are_those_of_their_channels() -> None:
    heads = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    heads[1, :, 2:] = 100  # padding
    rows = [
        {"x": np.zeros(4), "attention_mask": np.ones(4, int)},
        {"x": np.zeros(2), "attention_mask": np.ones(2, int)},
    ]
    seen = collect_ranges(
        lambda inputs: {"k": heads},
        Examples.of(rows, source="made up"),
        [Tap(name="k", dims=("batch", "heads", "sequence", "width"), heads=True)],
    )["k"]
    real = np.concatenate([heads[0], heads[1, :, :2]], axis=1)
    np.testing.assert_array_equal(seen.largest, np.abs(real).max(axis=1).ravel())
    assert seen.tokens == 6


def test_a_graph_without_attention_is_refused(tmp_path: Path) -> None:
    text = BLOCK.replace("a = Attention(qt, kt, vt)", "a = Add(qt, qt)")
    with pytest.raises(ExportError, match="the keys and values of the attention cannot be told"):
        find_cached(onnx.parser.parse_model(text))
    with pytest.raises(ExportError, match=r"the keys and values of layer\.1 cannot be told"):
        find_cached(onnx.load(str(block(tmp_path))), ["layer.1"])


def test_targets_know_the_formats_of_caches() -> None:
    assert Quantize(kv="fp8", matrices={"*": "float"}).schemes() == {"fp8-kv"}
    check_target(resolve_target("sm75"), "fp16", {"int8-kv"})
    check_target(resolve_target("cpu"), "fp32", {"int8-kv"})
    with pytest.raises(TargetError, match="cannot run fp8-kv: fp8 begins with Ada"):
        check_target(resolve_target("sm86"), "fp16", {"fp8-kv"})


def test_a_run_with_keys_and_values_in_int8(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = begun("text", tmp_path_factory.getbasetemp(), tmp_path)
    write_recipe(folder, {**TEXT, "passes": [{"quantize": {"kv": "int8", "matrices": {"*": "float"}}}]})
    found = run(folder)
    assert found.exit_code == 0, found.reason
    stage = next(stage for stage in found.report["stages"] if stage["name"] == "quantize")
    record = stage["record"]["kv"]
    assert (record["format"], record["tensors"], record["per_channel"]) == ("int8", 4, 4)
    graph = onnx.load(str(found.folder / stage["folder"] / "model.onnx")).graph
    assert [node.op_type for node in graph.node].count("QuantizeLinear") == 4
    scales = [t for t in graph.initializer if t.name.endswith("_kv_scale")]
    assert {helper.tensor_dtype_to_np_dtype(t.data_type) for t in scales} == {np.dtype(np.float16)}
    assert "4 keys and values in int8, 4 per channel" in (found.folder / "report.md").read_text().replace("\\", "")
