"""Costs: operator rules against hand counts, shapes that inference cannot tell, and interleaved latency."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from headwise.errors import ExportError
from headwise.export.graph import NAME_SCOPES
from headwise.gates.cost import device_name, graph_cost, latency

QKV = "float[B, 8, 1, 16] q, float[B, 2, 1, 16] k, float[B, 2, 1, 16] v"
CACHE = "float[B, 2, 7, 16] c, float[B, 2, 7, 16] d"


def graph(folder: Path, signature: str, body: str, opset: int = 23) -> Path:
    text = f'<ir_version: 11, opset_import: ["": {opset}, "com.microsoft": 1]>\ng {signature} {{ {body} }}'
    path = folder / "graph.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))
    return path


@pytest.mark.parametrize(
    ("signature", "body", "shapes", "macs"),
    [
        (
            "(float[B, S, 8] x, float[8, 5] w) => (float[B, S, 5] y)",
            "y = MatMul(x, w)",
            {"x": (2, 3, 8)},
            2 * 3 * 8 * 5,
        ),
        ("(float[8, B] x, float[5, 8] w) => (float[B, 5] y)", "y = Gemm<transA=1, transB=1>(x, w)", {}, 7 * 8 * 5),
        (
            "(float[B, 4, 6, 6] x, float[8, 2, 3, 3] w) => (float[B, 8, 4, 4] y)",
            "y = Conv<group=2>(x, w)",
            {},
            7 * 2304,
        ),
        (
            "(float[B, 4, 5, 5] x, float[4, 3, 2, 2] w) => (float[B, 3, 6, 6] y)",
            "y = ConvTranspose(x, w)",
            {},
            7 * 4 * 25 * 12,
        ),
        (
            "(float[B, 4, 6] q, float[B, 9, 6] k) => (float[B, 4, 9] y)",
            'y = Einsum<equation="bid,bjd->bij">(q, k)',
            {},
            1512,
        ),
        (
            "(float[B, 4, 6] q, float[6, 5] k) => (float[B, 4, 5] y)",
            'y = Einsum<equation="...d,de->...e">(q, k)',
            {},
            840,
        ),
        ("(float[B, 4, 6] q) => (float[4, B, 6] y)", 'y = Einsum<equation="abc->bac">(q)', {}, 0),
        (
            "(float[B, 8, 5, 16] q, float[B, 2, 9, 16] k, float[B, 2, 9, 12] v) => (float[B, 8, 5, 12] y)",
            "y = Attention(q, k, v)",
            {},
            7 * 8 * 5 * 9 * (16 + 12),
        ),
        (
            "(float[B, 5, 128] q, float[B, 9, 32] k, float[B, 9, 24] v) => (float[B, 5, 96] y)",
            "y = Attention<q_num_heads=8, kv_num_heads=2>(q, k, v)",
            {},
            7 * 8 * 5 * 9 * (16 + 12),
        ),
        (
            f"({QKV}, float[B, 2, 6, 16] a, float[B, 2, 6, 16] b) => (float[B, 8, 1, 16] y, {CACHE})",
            "y, c, d = Attention(q, k, v, , a, b)",
            {},
            7 * 8 * 7 * 32,
        ),
    ],
)
def test_rules(tmp_path: Path, signature: str, body: str, shapes: dict[str, tuple[int, ...]], macs: int) -> None:
    path = graph(tmp_path, signature, body)
    filled = {
        value.name: tuple(dim.dim_value or 7 for dim in value.type.tensor_type.shape.dim)
        for value in onnx.load(str(path)).graph.input
    }
    assert graph_cost(path, {**filled, **shapes}).macs == macs


def test_scopes_weights_and_attention(tmp_path: Path) -> None:
    signature = "(float[B, 4] x) => (float[B, 4] y) <float[4, 4] a = {" + ",".join("1" * 16) + "}, float[1] one = {1}>"
    path = graph(tmp_path, signature, "h = MatMul(x, a) g = Mul(h, one) k = MatMul(g, a) y = MatMul(k, a)")
    model = onnx.load(str(path))
    scopes = [["", "l.1", "l.1.query", "linear"], None, ["", "l.1", "scores"], ["", "l.10", "linear_1"]]
    for node, paths in zip(model.graph.node, scopes, strict=True):
        if paths is not None:
            node.metadata_props.add(key=NAME_SCOPES, value=str(paths))
    onnx.save(model, str(path))
    cost = graph_cost(path, {"x": (2, 4)}, ["l.1"])
    assert cost.by_scope == {"l.1.query": 32, "l.1": 32, "l.10": 32}
    assert (cost.macs, cost.attention_macs, cost.parameters) == (96, 64, 16)
    assert cost.file_bytes == path.stat().st_size


@pytest.mark.parametrize(("dtype", "code"), [("float", 1), ("bfloat16", 16)])
def test_shapes_that_depend_on_the_data_are_measured(tmp_path: Path, dtype: str, code: int) -> None:
    body = f"i = NonZero(x) t = Transpose(i) f = Cast<to={code}>(t) y = MatMul(f, w)"
    path = graph(tmp_path, f"({dtype}[3, 2] x, {dtype}[2, 5] w) => ({dtype}[n, 5] y)", body)
    assert graph_cost(path, {"x": (3, 2), "w": (2, 5)}).macs == 6 * 2 * 5  # all six inputs are ones


def test_nothing_is_skipped_in_silence(tmp_path: Path) -> None:
    fused = graph(tmp_path, "(float[2, 2] x) => (float[2, 2] y)", "y = com.microsoft.FusedMatMul(x, x)")
    with pytest.raises(ExportError, match=r"com\.microsoft:FusedMatMul\) has no rule to count its work"):
        graph_cost(fused, {"x": (2, 2)})
    plain = graph(tmp_path, "(float[B, 2] x, float[B, 2] z) => (float[B, B] y)", "t = Transpose(z) y = MatMul(x, t)")
    with pytest.raises(ExportError, match="no shape for input z"):
        graph_cost(plain, {"x": (2, 2)})
    with pytest.raises(ExportError, match="input z has 3 along B, another input has 2"):
        graph_cost(plain, {"x": (2, 2), "z": (3, 2)})
    broken = graph(tmp_path, "(float[3, 2] x, float[4, 5] w) => (float[n, 5] y)", "i = NonZero(x) y = Nonsense(i, w)")
    model = onnx.load(str(broken))
    model.graph.node.add(op_type="MatMul", input=["y", "w"], output=["z"])
    onnx.save(model, str(broken))
    with pytest.raises(ExportError, match="the shapes of y, z are not known, and the graph does not run"):
        graph_cost(broken, {"x": (3, 2), "w": (4, 5)})


def test_latency_interleaves_and_names_the_device() -> None:
    calls: list[str] = []

    def runner(label: str, seconds: float):  # type: ignore[no-untyped-def]
        def call(batch: object) -> None:
            calls.append(label)
            time.sleep(seconds)

        return call

    found = latency({"slow": runner("slow", 0.004), "fast": runner("fast", 0.001)}, {"x": np.zeros((2, 8))}, 4, 1)
    one, other = ["slow"] * 2, ["fast"] * 2
    assert calls == ["slow", "fast", *[*one, *other, *other, *one] * 2], "in both orders, the first of two is not timed"
    assert found["slow"].median_ms > 1.5 * found["fast"].median_ms
    assert found["slow"].p90_ms >= found["slow"].median_ms >= 4
    assert found["fast"].device == device_name()
    assert "cores" in device_name()
    assert "interleaved" in found["fast"].method
    assert "2x8" in found["fast"].method
