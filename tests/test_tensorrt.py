"""Engines: builds in a child process, the layer listing, profiles, and every way that a build ends badly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from headwise.device import builder, runtimes
from headwise.device.cuda import Gpu
from headwise.device.runtimes import load_runtime
from headwise.errors import EngineError, ExportError, MachineError, MissingDependencyError, StorageError
from headwise.export.listing import read_listing
from headwise.export.precision import ExportSpec, Range
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine, engine_runtime, profiles_for

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: no engine can be built"
)
ATTENTION = """<ir_version: 10, opset_import: ["": 23]>
g ({dtype}[batch, sequence, 64] x, {dtype}[batch, 1, sequence, sequence] mask) => ({dtype}[batch, sequence, 64] y)
<int64[4] split = {{0, 0, {heads}, {width}}}, int64[3] join = {{0, 0, 64}}> {{
    p = MatMul(x, w)
    r = Reshape(p, split)
    o = MatMul(x, u)
    s = Reshape(o, split)
    q = Transpose<perm=[0, 2, 1, 3]>(r)
    k = Transpose<perm=[0, 2, 1, 3]>(s)
    a = Attention<{causal}scale=0.25>(q, k, k, mask)
    t = Transpose<perm=[0, 2, 1, 3]>(a)
    y = Reshape(t, join)
}}"""


def attention_graph(path: Path, *, dtype: str = "float16", heads: int = 4, causal: str = "") -> Path:
    text = ATTENTION.format(dtype=dtype, heads=heads, width=64 // heads, causal=causal)
    model = onnx.parser.parse_model(text)
    weight = np.full((64, 64), 1 / 16, np.float16 if dtype == "float16" else np.float32)
    model.graph.initializer.extend([numpy_helper.from_array(weight, "w"), numpy_helper.from_array(2 * weight, "u")])
    onnx.save(model, str(path))
    return path


@needs_builder
def test_fp16_attention_becomes_one_fused_kernel(tmp_path: Path) -> None:
    graph, out = attention_graph(tmp_path / "g.onnx"), tmp_path / "g.engine"
    profiles = profiles_for(graph, ExportSpec(), {"sequence": 32})
    info = build_engine(graph, out, resolve_target("rtx-3060"), profiles=profiles)
    assert info.listing is not None
    assert info.listing.fused_attention == len(info.listing.attention_kernels) == 1
    assert info.listing.gemms == {"Half": 1}
    assert (info.sm, info.runtime, info.bytes) == (86, "tensorrt-rtx", out.stat().st_size)
    assert info.weights_bytes
    assert info.activation_bytes
    assert json.loads((tmp_path / "g.engine.json").read_text())["profiles"]["x"]["max"] == [8, 32, 64]
    assert engine_runtime(out) == "tensorrt-rtx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.engine", "g.engine.json", "g.onnx"]


@needs_builder
def test_attention_without_a_fused_kernel_is_decomposed(tmp_path: Path) -> None:
    graph = attention_graph(tmp_path / "g.onnx", dtype="float")
    info = build_engine(
        graph, tmp_path / "g.engine", resolve_target("sm86"), profiles=profiles_for(graph, ExportSpec())
    )
    assert info.listing is not None
    assert info.listing.fused_attention == 0
    assert info.listing.gemms == {"Float": 3}  # both projections at once, scores, weighted sum


@needs_builder
def test_a_parser_error_names_the_node_and_what_to_do(tmp_path: Path) -> None:
    graph = attention_graph(tmp_path / "g.onnx", causal="is_causal=1, ")
    with pytest.raises(EngineError, match=r"\(Attention\): .*Option mask cannot be used together") as caught:
        build_engine(graph, tmp_path / "g.engine", resolve_target("sm86"), profiles=profiles_for(graph, ExportSpec()))
    assert "the mask only" in caught.value.fix
    assert not (tmp_path / "g.engine").exists()


@needs_builder
def test_a_builder_error_carries_its_reason(tmp_path: Path) -> None:
    graph = attention_graph(tmp_path / "g.onnx", dtype="float")
    with pytest.raises(EngineError, match=r"refused g\.onnx for sm75: .*FP32"):
        build_engine(graph, tmp_path / "g.engine", resolve_target("sm75"), profiles=profiles_for(graph, ExportSpec()))


def test_profiles_follow_the_graph_and_the_limits(tmp_path: Path) -> None:
    graph = attention_graph(tmp_path / "g.onnx")
    assert profiles_for(graph, ExportSpec(), {"sequence": 64})["x"] == {
        "min": (1, 1, 64),
        "opt": (1, 64, 64),
        "max": (8, 64, 64),
    }
    spec = ExportSpec(batch=Range(min=2, opt=4, max=16), sequence=Range(min=8, opt=8, max=100))
    assert profiles_for(graph, spec)["mask"] == {"min": (2, 1, 8, 8), "opt": (4, 1, 8, 8), "max": (16, 1, 100, 100)}
    with pytest.raises(ExportError, match=r"export\.sequence\.max is 100\n  expected: at most 64"):
        profiles_for(graph, spec, {"sequence": 64})


def worker(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """A runtime package that does ``code`` when it is imported."""
    (folder / "strange_runtime.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setitem(runtimes.MODULES, "tensorrt-rtx", "strange_runtime")


def build(folder: Path, **options: Any) -> None:
    graph = attention_graph(folder / "g.onnx")
    profiles = options.pop("profiles", None)
    profiles = profiles_for(graph, ExportSpec()) if profiles is None else profiles
    out = options.pop("out", folder / "g.engine")
    build_engine(graph, out, resolve_target(options.pop("target", "sm86")), profiles=profiles, **options)


def test_a_builder_that_dies_is_an_engine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, tmp_path, "import os; os.write(2, b'out of luck'); os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match="the builder's process ended with signal 9: out of luck"):
        build(tmp_path)


@needs_builder
def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*gone/g\.engine: No such file"):
        build(tmp_path, out=tmp_path / "gone" / "g.engine")


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_run_worker", lambda job: {"errno": 28})
    monkeypatch.setitem(runtimes.MODULES, "tensorrt-rtx", "json")  # some package that is there
    with pytest.raises(StorageError, match="no space left on the device while writing"):
        build(tmp_path)


def test_an_interrupt_kills_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, tmp_path, "import time; time.sleep(60)")
    children: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not children:
            children.append(self)
            raise KeyboardInterrupt
        return real(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert children[0].returncode == -9


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtimes.MODULES, "tensorrt-rtx", "no_such_runtime")
    with pytest.raises(MissingDependencyError, match=r"no_such_runtime cannot be imported(.*\n)*.*pip install"):
        build(tmp_path)
    with pytest.raises(MissingDependencyError, match="No module named 'no_such_runtime'") as caught:
        load_runtime("tensorrt-rtx")
    assert caught.value.exit_code == 4


def test_full_tensorrt_needs_the_device_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtimes.MODULES, "tensorrt", "json")  # some package that is there
    monkeypatch.setattr(builder, "gpu", lambda: None)
    with pytest.raises(MachineError, match="no GPU of sm87"):
        build(tmp_path, target="jetson-orin")
    monkeypatch.setattr(builder, "gpu", lambda: Gpu(name="NVIDIA L4", sm=89))
    with pytest.raises(MachineError, match="NVIDIA L4 is sm89, not sm87"):
        build(tmp_path, target="jetson-orin")


@needs_builder
def test_profiles_have_to_match_the_inputs(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"profiles for no input\n  expected: .*: mask, x"):
        build(tmp_path, profiles={})


def test_listing_types() -> None:
    def line(name: str, kind: str, data: str, weight: str, tactic: str) -> str:
        tensor = (
            "{{ Name: {0}, Dimensions: [{1}], Strides: [9,1], StrideOrder: [1,0], Datatype: {2}, Format: (Linear) x }}"
        )
        constants = [tensor.format("alpha", "1", "Float")] + ([tensor.format("w", "4,8", weight)] if weight else [])
        return (
            f"Name: {name}, LayerType: {kind}, Inputs: [ {tensor.format('a', '-1,4', data)}], Constants: "
            f"[ {', '.join(constants)}], Outputs: [ {tensor.format('o', '-1,8', 'Int64')}], TacticName: {tactic}, "
            "StreamId: 0, Metadata: [ONNX Layer: n]"
        )

    text = "\n".join(
        [
            "Layers:",
            line("call", "shape_call", "Half", "", ""),
            line("node_mha_proj_myl0_1", "gemm", "Half", "Half", "__myelin_CASK_STUB"),
            line("node_b", "gemm", "Int8", "Int8", "__myelin_CASK_STUB"),
            line("__myl_DqFcAdd_myl0_3", "runtime_fusion", "Half", "Int4", ""),
            line("__myl_FctAdd_myl0_3", "runtime_fusion", "Half", "", ""),
            line("scores", "gemm", "Half", "", "__myelin_CASK_STUB"),
            line("_gemm_mha_v2_myl0_4", "kgen", "Half", "", "_gemm_mha_v2_0x1"),
            "Bindings:",
        ]
    )
    summary = read_listing(text)
    assert summary.gemms == {"Half": 2, "Half*Int4": 1, "Int8": 1}
    assert (summary.layers, summary.fused_attention) == (7, 1)
    assert summary.attention_kernels == ("_gemm_mha_v2_0x1",)
