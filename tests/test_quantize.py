"""Quantize: what it decides, the Q/DQ nodes that it becomes, and what engines make of them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from headwise.calibration.formats import input_scale, restore
from headwise.calibration.histogram import Histogram
from headwise.calibration.products import dynamic_input, quantized_input
from headwise.calibration.ranges import Observed
from headwise.errors import ExportError, PlanError
from headwise.export.decode import decode_for_onnxruntime
from headwise.export.dynamic import write_dynamic
from headwise.export.graph import NAME_SCOPES
from headwise.export.listing import read_listing
from headwise.export.matrices import TapRunner, find_matrices, find_taps
from headwise.export.precision import ExportSpec, Precision, convert_precision
from headwise.export.quantize import SCALE_DTYPES, Promise, QuantizedGraph, write_quantized
from headwise.export.runners import OrtRunner
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine, profiles_for
from headwise.gates.judge import Outcome
from headwise.gates.kernels import judge_kernels
from headwise.model.quantization import Format, MatrixPlan, QuantPlan
from headwise.passes.quantize import Quantize

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: no engine can be built"
)
GRAPH = """<ir_version: 10, opset_import: ["": 23]>
g (float[batch, sequence, 64] x) => (float[batch, sequence, 64] y, float[batch, sequence, 64] z) {
    q0 = MatMul(x, wq)
    q = Add(q0, bq)
    k = MatMul(x, wk)
    m = Mul(q, k)
    t = Tanh(m)
    u = MatMul(t, wo)
    q_t = Transpose<perm=[0, 2, 1]>(q)
    p = MatMul(m, q_t)
    s = MatMul(p, m)
    y = Add(u, s)
    f = Reshape(y, flat)
    h = Gemm<transB=1>(f, wg, bg)
    z = Reshape(h, back)
}"""
NAMES = ["attention.query", "attention.key", "attention.out", "head"]
ALL = tuple(MatrixPlan(name=name, format="int8", input_largest=4.0) for name in NAMES)


def graph(folder: Path) -> Path:
    """Four constant matrices (one stored the other way round), and a product of two activations."""
    model = onnx.parser.parse_model(GRAPH)
    random = np.random.default_rng(0)
    for name in ("wq", "wk", "wo", "wg"):
        values = (random.normal(size=(64, 64)) / 8).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for name in ("bq", "bg"):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(random.normal(size=64)), name))
    for name, dims in (("flat", [-1, 64]), ("back", [1, -1, 64])):
        model.graph.initializer.append(numpy_helper.from_array(np.int64(dims), name))
    scopes = {"q0": NAMES[0], "q": NAMES[0], "k": NAMES[1], "u": NAMES[2], "h": NAMES[3]}
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        if node.output[0] in scopes:
            entry = node.metadata_props.add()
            entry.key, entry.value = NAME_SCOPES, str(["", scopes[node.output[0]], node.output[0]])
    path = folder / "fp32.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return path


def batch(seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).normal(size=(1, 5, 64)).astype(np.float32)}


def observed(values: Any) -> Observed:
    histogram = Histogram()
    rows = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
    histogram.add(rows)
    return Observed(
        tokens=len(rows),
        largest=np.abs(rows).max(axis=0),
        magnitude=np.abs(rows).mean(axis=0),
        histogram=histogram,
        rows=rows,
        moment=rows.T.astype(np.float64) @ rows / len(rows),
    )


def ranges(path: Path) -> dict[str, Observed]:
    taps = [matrix.tap for matrix in find_matrices(path)]
    return {name: observed(values) for name, values in TapRunner(path, taps)(batch()).items()}


def written(
    path: Path, options: Quantize | None = None, plan: QuantPlan | None = None, *, precision: Precision = "fp16"
) -> tuple[Path, QuantizedGraph, QuantPlan]:
    options = options or Quantize()
    matrices = find_matrices(path)
    plan = plan or options.plan(matrices, ranges(path))
    codes = options.codes(plan, matrices, ranges(path), quantized_input, SCALE_DTYPES[precision])
    out = path.with_name("quantized.onnx")
    return out, write_quantized(path, out, plan, codes, precision=precision), plan


def run(path: Path, seed: int = 0, **options: Any) -> dict[str, Any]:
    with OrtRunner(path, **options) as runner:
        return runner(batch(seed))


def test_matrices_have_the_names_of_their_modules(tmp_path: Path) -> None:
    path = graph(tmp_path)
    found = find_matrices(path)
    assert [matrix.name for matrix in found] == NAMES
    assert [matrix.node for matrix in found] == ["node_q0", "node_k", "node_u", "node_h"]
    assert [matrix.tap for matrix in found] == ["x", "x", "t", "f"]
    assert [matrix.biased for matrix in found] == [True, False, False, True]
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    np.testing.assert_array_equal(found[0].weight, constants["wq"])
    np.testing.assert_array_equal(found[3].weight, constants["wg"].T)
    assert [tap.dims for tap in find_taps(path, ["x", "t"])] == [("batch", "sequence", 64)] * 2


def test_two_matrices_of_one_module_have_different_names(tmp_path: Path) -> None:
    path = graph(tmp_path)
    model = onnx.load(str(path))
    for node in model.graph.node:
        for entry in node.metadata_props:
            entry.value = str(["", "block", "x"])
    onnx.save(model, str(path))
    assert [matrix.name for matrix in find_matrices(path)] == ["block", "block.2", "block.3", "block.4"]


def test_a_graph_without_matrices(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) {y=Neg(x)}'
    )
    onnx.save(model, str(tmp_path / "g.onnx"))
    with pytest.raises(ExportError, match=r"g\.onnx multiplies with no constant matrix"):
        find_matrices(tmp_path / "g.onnx")


def test_the_plan_takes_ranges_from_calibration(tmp_path: Path) -> None:
    path = graph(tmp_path)
    seen = ranges(path)
    plan = Quantize().plan(find_matrices(path), seen)
    assert [entry.name for entry in plan.matrices] == NAMES
    assert [entry.scheme for entry in plan.matrices] == ["int8"] * 4
    assert [entry.input_largest for entry in plan.matrices] == [seen[t].histogram.largest for t in "xxtf"]
    clipped = Quantize(calibration="percentile", percentile=90).plan(find_matrices(path), seen)
    assert all(c.input_largest < e.input_largest for c, e in zip(clipped.matrices, plan.matrices, strict=True))  # type: ignore[operator]
    weights = Quantize(weights_only=True).plan(find_matrices(path), seen)
    assert {entry.scheme for entry in weights.matrices} == {"int8-weights"}
    assert QuantPlan.from_json(plan.to_json()) == plan


def test_patterns_choose_the_format_and_have_to_fit(tmp_path: Path) -> None:
    path = graph(tmp_path)
    options = Quantize(matrices={"attention.out": "int8", "attention.*": "float"})
    plan = options.plan(find_matrices(path), ranges(path))
    assert [entry.scheme for entry in plan.matrices] == ["float", "float", "int8", "int8"]
    assert list(plan.quantized()) == ["attention.out", "head"]
    assert plan.matrices[0].reason == "as the recipe says"
    assert options.schemes() == {"int8"}
    with pytest.raises(PlanError, match=r'no matrix is called "atention\.out".*\n.*\n.*did you mean "attention.out"'):
        Quantize(matrices={"atention.out": "float"}).plan(find_matrices(path), ranges(path))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_computes_what_the_codes_say(tmp_path: Path, precision: Precision) -> None:
    path = graph(tmp_path)
    out, info, plan = written(path, precision=precision)
    model = onnx.load(str(out))
    constants = {t.name: t for t in model.graph.initializer}
    assert "wq" not in constants
    assert constants["attention.query.weight_codes"].data_type == TensorProto.INT8
    assert constants["head.weight_codes"].data_type == TensorProto.INT8
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 3  # query and key share theirs
    assert [(p.matrix, p.node, p.scheme) for p in info.promises] == [
        (name, node, "int8") for name, node in zip(NAMES, ("node_q0", "node_k", "node_u", "node_h"), strict=True)
    ]
    dtype = SCALE_DTYPES[precision]
    matrices = {matrix.name: matrix for matrix in find_matrices(path)}
    entry = plan.quantized()["attention.query"]
    codes = Quantize().codes(plan, list(matrices.values()), ranges(path), quantized_input, dtype)["attention.query"]
    x = batch()["x"].astype(dtype).astype(np.float32)
    scale = input_scale(float(entry.input_largest or 0), "int8", dtype)
    expected = np.clip(np.rint(x / scale), -128, 127) * scale @ restore(codes, None, dtype)
    bias = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}["bq"]
    assert codes.bias_delta is not None
    assert 0 < np.abs(codes.bias_delta).max() < 0.02
    np.testing.assert_allclose(numpy_helper.to_array(constants["bq"]), bias + codes.bias_delta, atol=1e-3)
    got = TapRunner(out, ["q0"])({"x": batch()["x"].astype(dtype)})["q0"]
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=2e-2 if precision == "fp16" else 1e-5)
    reference, found = run(path), run(out)
    for name in ("y", "z"):
        error = np.linalg.norm(found[name] - reference[name]) / np.linalg.norm(reference[name])
        assert 1e-4 < error < 0.05
    assert info.bytes == out.stat().st_size < path.stat().st_size


def test_what_stays_float_is_the_same_graph(tmp_path: Path) -> None:
    path = graph(tmp_path)
    out, info, _ = written(path, Quantize(matrices={"*": "float"}))
    convert_precision(path, tmp_path / "fp16.onnx", "fp16")
    for name, values in run(tmp_path / "fp16.onnx").items():
        np.testing.assert_array_equal(run(out)[name], values)
    assert info.promises == ()


def test_different_ranges_of_one_input_have_scales_of_their_own(tmp_path: Path) -> None:
    path = graph(tmp_path)
    plan = QuantPlan(matrices=(ALL[0], replace(ALL[1], input_largest=1.0), *ALL[2:]))
    out, *_ = written(path, plan=plan)
    reference, found = (
        TapRunner(p, ["q0", "k"])({"x": batch()["x"].astype(t)}) for p, t in ((path, "f4"), (out, "f2"))
    )
    errors = {name: np.abs(found[name] - reference[name]).max() for name in ("q0", "k")}
    assert errors["q0"] < 0.2 < errors["k"]  # the smaller range clips what only the key reads


def test_dynamic_int8_follows_the_range_of_every_call(tmp_path: Path) -> None:
    path, out = graph(tmp_path), tmp_path / "dynamic.onnx"
    matrices = find_matrices(path)
    plan = Quantize(matrices={"attention.out": "float"}).plan(matrices, ranges(path))
    codes = Quantize().codes(plan, matrices, ranges(path), dynamic_input, SCALE_DTYPES["fp32"])
    write_dynamic(path, out, plan, codes)
    kinds = [node.op_type for node in onnx.load(str(out)).graph.node]
    assert (kinds.count("MatMulInteger"), kinds.count("DynamicQuantizeLinear")) == (3, 2)  # query and key share theirs
    assert (kinds.count("MatMul"), kinds.count("Gemm")) == (3, 0)  # one stays, two multiply activations
    x = batch()["x"]
    step = (x.max() - x.min()) / np.float32(255)
    zero = np.rint(-x.min() / step)
    inputs = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    expected = inputs @ restore(codes["attention.query"], None, SCALE_DTYPES["fp32"])
    np.testing.assert_allclose(TapRunner(out, ["q0"])(batch())["q0"], expected, atol=1e-5)
    plan_entry = plan.matrices[0]
    np.testing.assert_allclose(dynamic_input(x, plan_entry, SCALE_DTYPES["fp32"]), inputs, atol=1e-6)
    # ten times larger than anything that calibration saw: nothing is clipped
    reference, found = (TapRunner(p, ["k"])({"x": 10 * x}) for p in (path, out))
    assert np.linalg.norm(found["k"] - reference["k"]) / np.linalg.norm(reference["k"]) < 0.02
    for name, values in run(path).items():
        assert np.linalg.norm(run(out)[name] - values) / np.linalg.norm(values) < 0.05


WEIGHT_FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({"weights_only": True}, 0.05),
    "fp8": ({"format": "fp8", "weights_only": True}, 0.15),
    "fp8 with activations": ({"format": "fp8"}, 0.15),
    "int4": ({"format": "int4", "block": 16}, 0.5),
    "nvfp4": ({"format": "nvfp4", "weights_only": True}, 0.5),
    "nvfp4 with activations": ({"format": "nvfp4"}, 0.5),
    "mxfp8": ({"format": "mxfp8"}, 0.15),
    "int4 with gptq": ({"format": "int4", "rounding": "gptq"}, 0.5),
}


@pytest.mark.parametrize("case", WEIGHT_FORMATS)
def test_weights_of_every_format_are_what_the_codes_say(tmp_path: Path, case: str) -> None:
    options, limit = Quantize(**WEIGHT_FORMATS[case][0]), WEIGHT_FORMATS[case][1]
    path = graph(tmp_path)
    out, info, plan = written(path, options)
    decoded = tmp_path / "decoded.onnx"
    assert decode_for_onnxruntime(out, decoded) == (options.format in ("nvfp4", "mxfp8"))
    dtype = SCALE_DTYPES["fp16"]
    codes = options.codes(plan, find_matrices(path), ranges(path), quantized_input, dtype)
    runnable = decoded if decoded.exists() else out
    for promise_, name in zip(info.promises, NAMES, strict=True):
        values = TapRunner(runnable, [f"{name}.weight_values"])({"x": batch()["x"].astype(dtype)})
        expected = restore(codes[name], plan.quantized()[name].block, dtype).astype(dtype)
        got = values[f"{name}.weight_values"]
        np.testing.assert_array_equal(got.T if name == "head" else got, expected)
        assert promise_.weights_only == (not case.endswith("with activations"))
    for name, values in run(path).items():
        assert np.linalg.norm(run(runnable)[name] - values) / np.linalg.norm(values) < limit
    if decoded.exists():
        with pytest.raises(ExportError, match="ONNX Runtime refuses"):
            OrtRunner(out)


def test_activations_in_blocks_are_judged_by_the_arithmetic_that_the_plan_rests_on(tmp_path: Path) -> None:
    path, dtype = graph(tmp_path), SCALE_DTYPES["fp16"]
    out, _, plan = written(path, Quantize(format="nvfp4", smooth=None))
    nodes = [node.op_type for node in onnx.load(str(out)).graph.node]
    assert nodes.count("TRT_FP4DynamicQuantize") == 3  # query and key read one tensor
    assert decode_for_onnxruntime(out, tmp_path / "decoded.onnx")
    assert {node.domain for node in onnx.load(str(tmp_path / "decoded.onnx")).graph.node} == {""}
    x = batch()["x"].astype(dtype)
    x[0, 0, :16], x[0, 1, 16:32] = 0, 1e-7  # blocks without a scale
    x[0, 2] *= 40  # larger than anything that calibration saw
    found = TapRunner(tmp_path / "decoded.onnx", ["x_nvfp4_values"])({"x": x})["x_nvfp4_values"]
    expected = quantized_input(x.reshape(-1, 64).astype(np.float32), plan.matrices[0], dtype)
    np.testing.assert_array_equal(found.reshape(-1, 64), expected.astype(dtype))
    error = np.abs(expected - x.reshape(-1, 64)).reshape(5, 4, 16)[[0, 1, 3, 4]]
    assert 0.01 < error.max() / np.abs(batch()["x"]).max() < 1 / 6


def test_inputs_that_no_block_divides_stay_float(tmp_path: Path) -> None:
    path = graph(tmp_path)
    plan = Quantize(format="int4", block=128).plan(find_matrices(path), ranges(path))
    assert {(entry.scheme, entry.reason) for entry in plan.matrices} == {("float", "64 inputs are no multiple of 128")}


LISTING = """Layers:
Name: a+b_myl0, LayerType: gemm, Inputs: [ { Name: q, Dimensions: [-1,64], Datatype: Int8, Format: x }], Constants: [ \
{ Name: w, Dimensions: [64,128], Datatype: Int8, Format: x }, { Name: s, Dimensions: [1], Datatype: Float, \
Format: x }], Outputs: [ { Name: o, Dimensions: [-1,128], Datatype: Half, Format: x }], TacticName: t, StreamId: 0, \
Metadata: [ONNX Layer: a][ONNX Layer: a_dq][ONNX Layer: b][ONNX Layer: b_dq]
Name: c_myl1, LayerType: gemm, Inputs: [ { Name: o, Dimensions: [-1,64], Datatype: Half, Format: x }], Constants: [ \
{ Name: s, Dimensions: [1,64], Datatype: Half, Format: x }, { Name: w, Dimensions: [64,64], Datatype: Int4, \
Format: x }], Outputs: [ { Name: o, Dimensions: [-1,128], Datatype: Half, Format: x }], TacticName: t, StreamId: 0, \
Metadata: [ONNX Layer: c][ONNX Layer: c_dq]
Name: d_myl2, LayerType: gemm, Inputs: [ { Name: o, Dimensions: [-1,64], Datatype: Half, Format: x }], Constants: [ \
{ Name: w, Dimensions: [64,64], Datatype: Half, Format: x }], Outputs: [ { Name: o, Dimensions: [-1,64], \
Datatype: Half, Format: x }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: d]
"""


def promise(node: str, number: Format = "int8", *, weights_only: bool = False) -> Promise:
    return Promise(matrix=f"m.{node}", node=node, decode=f"{node}_dq", format=number, weights_only=weights_only)


def test_the_listing_says_what_became_of_every_node() -> None:
    found = read_listing(LISTING)
    assert found.gemms == {"Half": 1, "Half*Int4": 1, "Int8": 1}
    assert [found.products[node] for node in "abcd"] == ["Int8", "Int8", "Half*Int4", "Half"]
    assert found.constants["c_dq"] == "Int4"


def test_a_promised_matrix_that_runs_in_half_fails_the_gate() -> None:
    listing = read_listing(LISTING)
    kept = [promise("a"), promise("b"), promise("c", "int4", weights_only=True)]
    assert [(v.output, v.outcome, v.samples) for v in judge_kernels(listing, kept, "engine-sm86")] == [
        ("int8", Outcome.PASS, 2),
        ("int4-weights", Outcome.PASS, 1),
    ]
    (verdict,) = judge_kernels(listing, [promise("a"), promise("d"), promise("e")], "engine-sm86")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.difference == 2
    assert verdict.reason == "2 of 3 matrices do not run as planned: m.d (Half), m.e (not found)"
    (verdict,) = judge_kernels(listing, [replace(promise("d", "int4", weights_only=True), decode="c_dq")], "e")
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "1 of 1 as planned, 1 decoded by a kernel before")
    (verdict,) = judge_kernels(listing, [promise("c", "int4")], "engine-sm86")
    assert verdict.reason.endswith("m.c (Half*Int4)")  # weights in four bits are not yet a product in four bits
    (verdict,) = judge_kernels(None, kept[:1], "engine-sm86")
    assert verdict.outcome is Outcome.NOT_RUN
    assert judge_kernels(None, [], "engine-sm86") == []


@needs_builder
@pytest.mark.parametrize(
    ("case", "target"),
    [
        ("int8", "sm75"),
        ("fp8", "sm89"),
        ("fp8 with activations", "sm89"),
        ("int4", "sm86"),
        ("nvfp4", "sm120"),
        ("nvfp4 with activations", "sm120"),
    ],
)
def test_engines_hold_every_format(tmp_path: Path, case: str, target: str) -> None:
    path, info, _ = written(graph(tmp_path), Quantize(**WEIGHT_FORMATS[case][0]))
    engine = build_engine(path, tmp_path / "e", resolve_target(target), profiles=profiles_for(path, ExportSpec()))
    (verdict,) = judge_kernels(engine.listing, info.promises, "engine")
    assert verdict.outcome is Outcome.PASS, verdict.reason


@needs_builder
def test_small_weights_that_the_builder_decodes_itself_are_found(tmp_path: Path) -> None:
    path, info, _ = written(graph(tmp_path), Quantize(format="mxfp8"))
    engine = build_engine(path, tmp_path / "e", resolve_target("sm89"), profiles=profiles_for(path, ExportSpec()))
    (verdict,) = judge_kernels(engine.listing, info.promises, "engine")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.reason.startswith("4 of 4 matrices do not run as planned: attention.query (Half)")


@needs_builder
@pytest.mark.parametrize("target", ["sm75", "sm120"])
def test_engines_multiply_in_int8(tmp_path: Path, target: str) -> None:
    path, info, _ = written(graph(tmp_path), Quantize(matrices={"attention.out": "float"}))
    engine = build_engine(path, tmp_path / "e", resolve_target(target), profiles=profiles_for(path, ExportSpec()))
    (verdict,) = judge_kernels(engine.listing, info.promises, "engine")
    assert verdict.outcome is Outcome.PASS, verdict.reason
    broken = [*info.promises, promise("node_u")]
    (verdict,) = judge_kernels(engine.listing, broken, "engine")
    assert verdict.reason == "1 of 4 matrices do not run as planned: m.node_u (Half)"
