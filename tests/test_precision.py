"""fp16 and bf16 graphs: types, values, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from headwise.errors import ExportError
from headwise.export.precision import ExportSpec, Range, convert_precision
from headwise.export.runners import OrtRunner
from headwise.export.widen import widen

LOWEST = "-3.4028234663852886e38"
GRAPH = """<ir_version: 10, opset_import: ["": {opset}]>
g (float[B, 2] x, int64[B, 2] mask) => (float[B, 2] y, int64[B, 2] ids)
<float[2, 2] w = {{0.5, 1.25, -2, {weight}}}, float lowest = {{{lowest}}}, float one = {{1}}> {{
    m = Cast<to=1>(mask)
    closed = Sub(one, m)
    bias = Mul(closed, lowest)
    h = MatMul(x, w)
    c = {op}(h)
    y = Add(c, bias)
    ids = Add(mask, mask)
}}"""
BATCH = {"x": np.array([[1, 2], [3, -4]], np.float32), "mask": np.array([[1, 1], [1, 1]])}


def source(folder: Path, *, weight: str = "3", op: str = "Tanh", opset: int = 21) -> Path:
    path = folder / "fp32.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH.format(weight=weight, op=op, lowest=LOWEST, opset=opset)), str(path))
    return path


def types(path: Path) -> dict[str, str]:
    graph = onnx.load(str(path)).graph
    values = [*graph.input, *graph.output]
    return {v.name: TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values}


@pytest.mark.parametrize("keep_io", [False, True])
def test_fp16(tmp_path: Path, keep_io: bool) -> None:
    src, dst = source(tmp_path), tmp_path / "fp16.onnx"
    info = convert_precision(src, dst, "fp16", keep_io=keep_io)
    kept = "FLOAT" if keep_io else "FLOAT16"
    assert types(dst) == {"x": kept, "mask": "INT64", "y": kept, "ids": "INT64"}
    assert (info.precision, info.runs_on_cpu, info.bytes) == ("fp16", True, dst.stat().st_size)
    weight = next(t for t in onnx.load(str(dst)).graph.initializer if t.name == "w")
    assert weight.data_type == TensorProto.FLOAT16
    with OrtRunner(src) as fp32, OrtRunner(dst) as fp16:
        np.testing.assert_allclose(fp16(BATCH)["y"], fp32(BATCH)["y"], atol=2e-3)


def test_a_weight_that_fp16_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"weight w holds 70000\n  expected: at most 65504"):
        convert_precision(source(tmp_path, weight="70000"), tmp_path / "fp16.onnx", "fp16")
    assert not (tmp_path / "fp16.onnx").exists()


@pytest.mark.parametrize("keep_io", [False, True])
@pytest.mark.parametrize("op", ["Tanh", "Celu"])  # Celu has no bf16 in its schema
def test_bf16(tmp_path: Path, op: str, keep_io: bool) -> None:
    src, dst = source(tmp_path, op=op), tmp_path / "bf16.onnx"
    info = convert_precision(src, dst, "bf16", keep_io=keep_io)
    kept = "FLOAT" if keep_io else "BFLOAT16"
    assert types(dst) == {"x": kept, "mask": "INT64", "y": kept, "ids": "INT64"}
    assert info.casts == 2 * (op == "Celu") + 2 * keep_io
    assert not info.runs_on_cpu
    with pytest.raises(ExportError, match="ONNX Runtime refuses"):
        OrtRunner(dst)
    model = onnx.load(str(dst))
    dtype = np.float32 if keep_io else numpy_helper.to_array(model.graph.initializer[0]).dtype
    y, ids = ReferenceEvaluator(model).run(None, {**BATCH, "x": BATCH["x"].astype(dtype)})
    with OrtRunner(src) as fp32:
        expected = fp32(BATCH)["y"]
    assert np.isfinite(y.astype(np.float32)).all()  # the mask's lowest float must not become -inf: 0 * -inf is NaN
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2e-2)
    assert ids.tolist() == [[2, 2], [2, 2]]


def test_bf16_constants(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[B] x) => (float[B] y)
    { a = Constant<value_float=0.5>() s = Shape(x) z = ConstantOfShape<value=float[1] {2}>(s)
      p = Mul(x, a) f = Cast<to=1>(p) y = Add(f, z) }"""
    path, dst = tmp_path / "constants.onnx", tmp_path / "bf16.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))
    convert_precision(path, dst, "bf16", keep_io=True)
    (y,) = ReferenceEvaluator(onnx.load(str(dst))).run(None, {"x": np.array([3, 5], np.float32)})
    assert y.tolist() == [3.5, 4.5]


def test_bf16_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    text = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
    g (float[B, 2] x) => (float[B, 2] y) { y = com.microsoft.FusedMatMul(x, x) }"""
    onnx.save(onnx.parser.parse_model(text), str(path))
    with pytest.raises(ExportError, match=r"com\.microsoft:FusedMatMul\) is not an ONNX operator"):
        convert_precision(path, tmp_path / "bf16.onnx", "bf16")
    text = """<ir_version: 10, opset_import: ["": 21]> g (bool c, float[2] x) => (float[2] y)
    { y = If(c) <then_branch = a () => (float[2] p) { p = Neg(x) },
                 else_branch = b () => (float[2] q) { q = Abs(x) }> }"""
    onnx.save(onnx.parser.parse_model(text), str(path))
    with pytest.raises(ExportError, match=r"\(If\) holds a subgraph"):
        convert_precision(path, tmp_path / "bf16.onnx", "bf16")


def test_a_graph_that_ends_up_invalid(tmp_path: Path) -> None:
    src = source(tmp_path)
    model = onnx.load(str(src))
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, str(src))
    with pytest.raises(ExportError, match=r"the fp16 graph is not valid: .*Nonsense"):
        convert_precision(src, tmp_path / "fp16.onnx", "fp16")


def test_fp32_is_a_copy(tmp_path: Path) -> None:
    src, dst = source(tmp_path), tmp_path / "copy.onnx"
    assert convert_precision(src, dst, "fp32").bytes == src.stat().st_size
    assert dst.read_bytes() == src.read_bytes()


def test_ranges_are_ordered() -> None:
    assert ExportSpec().batch == Range(min=1, opt=1, max=8)
    with pytest.raises(ValidationError, match="min 1 <= opt 9 <= max 8 does not hold"):
        Range(opt=9)
    with pytest.raises(ValidationError, match="extra"):
        ExportSpec.model_validate({"presicion": "fp16"})


def test_a_bf16_graph_runs_in_fp32_with_its_rounded_weights(tmp_path: Path) -> None:
    source, half, wide = (tmp_path / name for name in ("fp32.onnx", "bf16.onnx", "wide.onnx"))
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[N, 2] x) => (float[N, 2] y, float[N, 2] z) {
        p = MatMul(x, w)
        y = Erf(p)
        c = Constant<value = float[2] {1.001, 2.0}>()
        z = Add(p, c)
    }"""
    model = onnx.parser.parse_model(text)
    weight = np.array([[1 + 2**-9, 0.5], [3, -1]], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, str(source))
    convert_precision(source, half, "bf16", keep_io=False)
    widen(half, wide)
    found = OrtRunner(wide)({"x": np.eye(2, dtype=np.float32)})
    np.testing.assert_array_equal(found["z"], np.array([[1, 0.5], [3, -1]], np.float32) + np.array([1, 2], np.float32))
    assert not any(t.data_type == TensorProto.BFLOAT16 for t in onnx.load(str(wide)).graph.initializer)
