"""Channel scales: exact to the bit, folded where they can be, and chosen by the error of products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from headwise.calibration.histogram import Histogram
from headwise.calibration.products import dynamic_input, quantized_input
from headwise.calibration.ranges import Observed, pooled
from headwise.errors import ExportError, PlanError
from headwise.export.dynamic import write_dynamic
from headwise.export.matrices import TapRunner, find_matrices, products
from headwise.export.quantize import SCALE_DTYPES, write_quantized
from headwise.export.runners import OrtRunner
from headwise.export.smoothing import Smoothed, require_same, smooth
from headwise.model.quantization import Matrix, MatrixPlan
from headwise.passes.quantize import Quantize
from headwise.passes.smooth import best_exponents, exponents

Array = Any
# A block with grouped kv heads (4 query heads, 2 kv heads of width 8), a gated MLP and a second output.
BLOCK = """<ir_version: 10, opset_import: ["": 23]>
g (float[batch, sequence, 32] x) => (float[batch, sequence, 32] y, float[batch, sequence, 32] z)
<int64[4] queries = {0, 0, 4, 8}, int64[4] keys = {0, 0, 2, 8}, int64[3] join = {0, 0, 32}, float zero = {0}> {
    n = RMSNormalization(x, gain)
    qkv0 = MatMul(n, w_qkv)
    qkv = Add(qkv0, b_qkv)
    q, k, v = Split<axis=-1>(qkv, widths)
    q4 = Reshape(q, queries)
    k4 = Reshape(k, keys)
    v4 = Reshape(v, keys)
    qt = Transpose<perm=[0, 2, 1, 3]>(q4)
    kt = Transpose<perm=[0, 2, 1, 3]>(k4)
    vt = Transpose<perm=[0, 2, 1, 3]>(v4)
    a = Attention(qt, kt, vt)
    masked = Where(never, zero, a)
    at = Transpose<perm=[0, 2, 1, 3]>(masked)
    o = Reshape(at, join)
    p = MatMul(o, w_out)
    r = Add(x, p)
    m = LayerNormalization(r, gain2, bias2)
    gate = MatMul(m, w_gate)
    up = MatMul(m, w_up)
    s = Sigmoid(gate)
    h = Mul(s, up)
    d = MatMul(h, w_down)
    y = Add(r, d)
    e = Relu(y)
    z = MatMul(e, w_head)
}"""
SHAPES = {
    "gain": (32,),
    "gain2": (32,),
    "bias2": (32,),
    "w_qkv": (32, 64),
    "b_qkv": (64,),
    "w_out": (32, 32),
    "w_gate": (32, 48),
    "w_up": (32, 48),
    "w_down": (48, 32),
    "w_head": (32, 32),
}
NAMES = ["w_qkv", "w_out", "w_gate", "w_up", "w_down", "w_head"]


def block(folder: Path, *changes: tuple[str, str]) -> Path:
    text = BLOCK
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = (random.normal(size=shape) / 4 + (name.startswith("gain"))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.append(numpy_helper.from_array(np.int64([32, 16, 16]), "widths"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(False), "never"))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    path = folder / "block.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), str(path))
    return path


def batch() -> dict[str, Array]:
    return {"x": np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)}


def shifts(width: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(e) for e in np.random.default_rng(seed).integers(-3, 4, width))


def run(path: Path) -> dict[str, Array]:
    with OrtRunner(path, optimize=False) as runner:
        return runner(batch())


def smoothed(path: Path, scales: dict[str, tuple[int, ...]], names: list[str] = NAMES) -> tuple[Smoothed, Path]:
    model = onnx.load(str(path))
    info = smooth(model, scales, names)
    out = path.with_name("smoothed.onnx")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))
    return info, out


GROUPED = tuple(np.tile(np.array(shifts(16)).reshape(2, 1, 8), (1, 2, 1)).ravel().tolist())
"""The two readers of a kv head agree about its channels."""
FOLDS = {
    "the gain of an RMS norm": ("n", shifts(32)),
    "the gain and bias of a layer norm": ("m", shifts(32)),
    "the values of shared kv heads": ("o", GROUPED),
    "one factor of a gated MLP": ("h", shifts(48)),
}


@pytest.mark.parametrize("case", FOLDS)
def test_scales_fold_into_what_makes_the_channels(tmp_path: Path, case: str) -> None:
    path, (tap, scale) = block(tmp_path), FOLDS[case]
    info, out = smoothed(path, {tap: scale})
    assert info == Smoothed(folded=1, explicit=0)
    before, after = (TapRunner(p, [tap])(batch())[tap] for p in (path, out))
    np.testing.assert_array_equal(after, np.ldexp(before, -np.array(scale)))
    for name, values in run(path).items():
        np.testing.assert_array_equal(run(out)[name], values)
    assert require_same(path, out, batch()) < 1e-6
    assert len(onnx.load(str(out)).graph.node) == len(onnx.load(str(path)).graph.node)


EXPLICIT: dict[str, tuple[str, tuple[int, ...], tuple[tuple[str, str], ...]]] = {
    "an activation function stands before": ("e", shifts(32), ()),
    "the readers of a kv head disagree": ("o", shifts(32, 1), ()),
    "the tensor is an output": ("n", shifts(32), (("=> (float", "=> (float[batch, sequence, 32] n, float"),)),
    "somebody else reads the norm": ("m", shifts(32), (("y = Add(r, d)", "rm = Add(r, m)\n    y = Add(rm, d)"),)),
    "the values have another reader": ("o", GROUPED, (("k4 = Reshape(k", "kv = Add(k, v)\n    k4 = Reshape(kv"),)),
    "a square would be scaled twice": (
        "h",
        shifts(48),
        (("s = Sigmoid(gate)\n    h = Mul(s, up)", "h = Mul(up, up)"),),
    ),
}


@pytest.mark.parametrize("case", EXPLICIT)
def test_a_scale_that_does_not_fold_is_a_multiplication(tmp_path: Path, case: str) -> None:
    tap, scale, changes = EXPLICIT[case]
    path = block(tmp_path, *changes)
    info, out = smoothed(path, {tap: scale})
    assert info == Smoothed(folded=0, explicit=1)
    for name, values in run(path).items():
        np.testing.assert_array_equal(run(out)[name], values)
    found = {product.name: product.node.input[0] for product in products(onnx.load(str(out)).graph)}
    assert f"{tap}_smoothed" in found.values()


def test_a_matrix_that_is_not_quantized_keeps_its_input(tmp_path: Path) -> None:
    path = block(tmp_path)
    info, out = smoothed(path, {"m": shifts(32)}, ["w_up"])
    assert info == Smoothed(folded=0, explicit=1)
    found = {product.name: product.node.input[0] for product in products(onnx.load(str(out)).graph)}
    assert (found["w_gate"], found["w_up"]) == ("m", "m_smoothed")
    for name, values in run(path).items():
        np.testing.assert_array_equal(run(out)[name], values)


def test_a_shared_weight_is_scaled_for_its_reader_only(tmp_path: Path) -> None:
    path = block(tmp_path, ("z = MatMul(e, w_head)", "z = MatMul(e, w_out)"))
    info, out = smoothed(path, {"o": GROUPED, "e": shifts(32)}, [*NAMES, "w_out.2"])
    assert info == Smoothed(folded=1, explicit=1)
    for name, values in run(path).items():
        np.testing.assert_array_equal(run(out)[name], values)


@pytest.mark.parametrize("options", [{"rounding": "gptq"}, {"format": "int4", "block": 16}, {"smooth": 0.8}])
def test_layers_that_share_weights_share_their_codes(tmp_path: Path, options: dict[str, Any]) -> None:
    path = block(tmp_path, ("z = MatMul(e, w_head)", "z = MatMul(e, w_out)"))
    matrices, wanted = find_matrices(path), Quantize(**options)
    taps = TapRunner(path, [m.tap for m in matrices])(batch()).items()
    ranges = {tap: observed(values.reshape(-1, values.shape[-1])) for tap, values in taps}
    scaled = set(wanted.smoothing(matrices, ranges, quantized_input))
    assert scaled <= {"n", "m", "h"}
    assert scaled == {"n", "m", "h"} or "smooth" not in options
    plan, dtype = wanted.plan(matrices, ranges), SCALE_DTYPES["fp32"]
    codes = wanted.codes(plan, matrices, ranges, quantized_input, dtype)
    np.testing.assert_array_equal(codes["w_out"].values, codes["w_out.2"].values)
    writers: dict[str, Any] = {"q.onnx": lambda out: write_quantized(path, out, plan, codes, precision="fp32")}
    if wanted.format == "int8":
        writers["d.onnx"] = lambda out: write_dynamic(path, out, plan, codes)
    for name, write in writers.items():
        written = write(tmp_path / name)
        stored = [t for t in onnx.load(str(tmp_path / name)).graph.initializer if list(t.dims) == [32, 32]]
        assert len(stored) == 1
        with OrtRunner(tmp_path / name) as runner:
            found = runner(batch())["z"]
        assert np.linalg.norm(found - run(path)["z"]) < 0.3 * np.linalg.norm(found)
        if written is not None:
            decode = {promise.matrix: promise.decode for promise in written.promises}
            assert decode["w_out"] == decode["w_out.2"] != decode["w_up"]


def test_a_pool_of_tensors_has_the_tokens_of_all() -> None:
    random = np.random.default_rng(0)
    one, two = (observed(random.normal(size=(n, 4)).astype(np.float32) * n) for n in (10, 30))
    both = pooled([one, two])
    whole = observed(np.concatenate([one.rows, two.rows]))
    assert both.tokens == 40
    np.testing.assert_array_equal(both.largest, whole.largest)
    np.testing.assert_allclose(both.magnitude, whole.magnitude, rtol=1e-6)
    np.testing.assert_array_equal(both.histogram.counts, whole.histogram.counts)
    np.testing.assert_allclose(both.moment, whole.moment, rtol=1e-5)
    assert both.histogram.largest == whole.histogram.largest
    assert (both.rows[:5] == one.rows[::2]).all()
    assert (both.rows[5:] == two.rows[1::2]).all()
    assert pooled([one]) is one
    empty = Histogram()
    empty.merge(one.histogram)
    np.testing.assert_array_equal(empty.counts, one.histogram.counts)


def test_scales_that_are_wrong_are_found(tmp_path: Path) -> None:
    path = block(tmp_path)
    _, out = smoothed(path, {"h": shifts(48)})
    model = onnx.load(str(out))
    tensor = next(t for t in model.graph.initializer if t.name == "w_up")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, "w_up"))
    onnx.save(model, str(out))
    with pytest.raises(ExportError, match=r"scaling channels changed the graph by 0\.0"):
        require_same(path, out, batch())


def observed(rows: Array) -> Observed:
    histogram = Histogram()
    histogram.add(rows)
    magnitudes = np.abs(rows)
    return Observed(
        tokens=len(rows),
        largest=magnitudes.max(axis=0),
        magnitude=magnitudes.mean(axis=0),
        histogram=histogram,
        rows=rows,
        moment=rows.T @ rows / len(rows),
    )


def difficult() -> tuple[list[Matrix], Observed]:
    """Two matrices that share an input with two channels a hundred times larger than the others."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(300, 64)) * np.where(np.arange(64) < 2, 100, 1)
    weights = random.normal(size=(2, 64, 16)).astype(np.float32)
    members = [Matrix(name=str(i), node=str(i), tap="x", weight=w, biased=False) for i, w in enumerate(weights)]
    return members, observed(rows.astype(np.float32))


PLANS = [MatrixPlan(name=str(i), format="int8", input_largest=1.0) for i in range(2)]


def test_a_strength_of_one_levels_the_activation_and_of_zero_the_weights() -> None:
    members, seen = difficult()
    scaled = seen.largest / np.exp2(exponents(members, seen, 1.0, weights_only=False))
    assert scaled.max() / scaled.min() < 2.1
    weight = np.abs([matrix.weight for matrix in members]).max(axis=(0, 2))
    levelled = weight * np.exp2(exponents(members, seen, 0.0, weights_only=False))
    assert levelled.max() / levelled.min() < 2.1
    assert exponents(members, seen, 0.0, weights_only=True) == (0,) * 64
    awq = np.exp2(exponents(members, seen, 1.0, weights_only=True))
    assert awq[0] > 30 * np.median(awq)


def test_auto_finds_a_scale_where_it_helps_and_none_where_it_does_not() -> None:
    members, seen = difficult()
    found = best_exponents(members, PLANS, seen, quantized_input)
    assert found is not None
    assert min(found[:2]) > max(found[2:])
    even = observed(np.random.default_rng(0).choice([-1.0, 1.0], size=(300, 64)).astype(np.float32))
    flat = [Matrix(name="0", node="0", tap="x", weight=np.ones((64, 4), np.float32), biased=False)]
    assert best_exponents(flat, PLANS[:1], even, quantized_input) is None


def test_the_scale_suits_what_the_runtime_reads() -> None:
    members, seen = difficult()
    found = best_exponents(members, PLANS, seen, quantized_input)
    exact = best_exponents(members, PLANS, seen, lambda rows, plan, dtype: rows)
    assert found is not None
    assert exact is None or np.ptp(exact) < np.ptp(found)  # only the weights lose then, and scales make them lose more
    assert best_exponents(members, PLANS, seen, dynamic_input) is not None


def test_the_option_decides_which_tensors_are_scaled(tmp_path: Path) -> None:
    path = block(tmp_path)
    matrices = find_matrices(path)
    ranges = {
        tap: observed(v.reshape(-1, v.shape[-1]))
        for tap, v in TapRunner(path, [m.tap for m in matrices])(batch()).items()
    }
    assert Quantize(smooth=None).smoothing(matrices, ranges, quantized_input) == {}
    assert set(Quantize(smooth=0.8).smoothing(matrices, ranges, quantized_input)) == {"n", "o", "m", "h", "e"}
    assert (
        set(Quantize(smooth=0.8, matrices={"w_*": "float", "*": "int8"}).smoothing(matrices, ranges, quantized_input))
        == set()
    )
    some = Quantize(smooth=0.8, matrices={"w_gate": "float", "w_qkv": "float"}).smoothing(
        matrices, ranges, quantized_input
    )
    assert set(some) == {"o", "m", "h", "e"}
    with pytest.raises(PlanError, match='no matrix is called "lm_head"'):
        Quantize(matrices={"lm_head": "float"}).smoothing(matrices, ranges, quantized_input)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Quantize(smooth=1.5)
