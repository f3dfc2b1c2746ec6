"""Runners: torch, ONNX Runtime, and the engine runner against a driver and a runtime made of numpy."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fake_gpu import Driver, fake_device
from torch import nn

from headwise.device import cuda
from headwise.errors import DataError, EngineError, ExportError, MachineError
from headwise.export.runners import EngineRunner, OrtRunner, TorchRunner

DOUBLE = """<ir_version: 10, opset_import: ["": 21]>
double ({dtype}[N, 4] x, int64[N, 4] ids) => ({dtype}[N, 4] y, int64[N, 4] z) {{ y = Add(x, x) z = Add(ids, ids) }}"""


def graph(folder: Path, text: str, name: str = "graph.onnx") -> Path:
    path = folder / name
    onnx.save(onnx.parser.parse_model(text), str(path))
    return path


def batch(rows: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, 4), 1.5), "ids": np.arange(4 * rows, dtype=np.int32).reshape(rows, 4)}


def test_torch_runner_names_outputs_and_returns_float32() -> None:
    class Heads(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": x.to(torch.bfloat16), "b": x.argmax(-1), "none": None}

    module = Heads().train()
    with TorchRunner(module) as runner:
        outputs = runner({"x": np.array([[1.0, 3.0]], np.float32)})
    assert list(outputs) == ["a", "b"]
    assert outputs["a"].dtype == np.float32
    assert outputs["b"].tolist() == [1]
    assert not module.training
    assert (runner.name, runner.device) == ("torch", "cpu")


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_ort_runner_casts_to_the_graph_and_back(tmp_path: Path, dtype: str) -> None:
    with OrtRunner(graph(tmp_path, DOUBLE.format(dtype=dtype)), threads=1) as runner:
        outputs = runner(batch())
    assert outputs["y"].dtype == np.float32
    np.testing.assert_array_equal(outputs["y"], np.full((3, 4), 3.0))
    np.testing.assert_array_equal(outputs["z"], 2 * batch()["ids"])


def test_ort_runner_names_missing_and_unknown_inputs(tmp_path: Path) -> None:
    path = graph(tmp_path, DOUBLE.format(dtype="float"))
    with pytest.raises(DataError, match="the batch lacks ids\n  expected: the inputs of the graph: x, ids"):
        OrtRunner(path)({"x": batch()["x"]})
    extra = {**batch(), "token_type_ids": np.zeros((3, 4), np.int64)}
    with pytest.raises(DataError, match="the graph has no input token_type_ids"):
        OrtRunner(path)(extra)
    assert OrtRunner(path, ignore=["token_type_ids"])(extra)["y"].shape == (3, 4)


def test_ort_runner_passes_on_what_onnx_runtime_says(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime refuses broken\.onnx: .*INVALID_PROTOBUF"):
        OrtRunner(broken)
    unknown = graph(tmp_path, DOUBLE.format(dtype="float").replace("y = Add", "y = Nonsense"))
    with pytest.raises(ExportError, match="Nonsense"):
        OrtRunner(unknown)
    with pytest.raises(ExportError, match=r"cannot run the graph on x \(3, 5\)"):
        OrtRunner(graph(tmp_path, DOUBLE.format(dtype="float")))({**batch(), "x": np.zeros((3, 5))})


def test_ort_runner_never_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path, DOUBLE.format(dtype="float"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MachineError, match="this onnxruntime has no CUDAExecutionProvider"):
        OrtRunner(path, provider="cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    real = onnxruntime.InferenceSession
    cpu = lambda file, options, **more: real(file, options, providers=["CPUExecutionProvider"])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", cpu)
    with pytest.raises(MachineError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"):
        OrtRunner(path, provider="cuda")


def test_engine_runner_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: None)
    assert cuda.gpu() is None
    with pytest.raises(MachineError, match=r"^no GPU\n") as caught:
        EngineRunner(tmp_path / "x.engine")
    assert caught.value.exit_code == 4
    with pytest.raises(MachineError, match=r"^no GPU\n"):
        cuda.DeviceMemory()


class Engine:
    """An engine that doubles x (half), rows 1 to 2."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.rows: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return ["x", "y"][index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="HALF")

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 4), (1, 4), (2, 4)]

    def create_execution_context(self) -> Engine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 2 and shape[1] == 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        size = 2 * int(np.prod(self.shape))
        values = np.frombuffer(ctypes.string_at(self.addresses["x"], size), np.float16)
        ctypes.memmove(self.addresses["y"], (values * 2).tobytes(), size)
        self.rows.append(self.shape[0])
        return True


class DecoderEngine(Engine):
    """A decoder's engine whose scores are the positions."""

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        **dict.fromkeys(("input_ids", "attention_mask", "position_ids"), (-1, -1)),
        "past_key_values.0.key": (-1, 2, -1, 4),
        "logits": (-1, -1, 1),
        "present.0.key": (-1, 2, -1, 4),
    }
    num_io_tensors = len(SHAPES)

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = dict(self.SHAPES)

    def get_tensor_name(self, index: int) -> str:
        return list(self.SHAPES)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="INT64" if len(self.SHAPES[name]) == 2 else "FLOAT")

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name in ("logits", "present.0.key") else "in"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows, tokens = self.shapes["input_ids"]
        return {"logits": (rows, tokens, 1), "present.0.key": (rows, 2, tokens, 4)}.get(name, self.shapes[name])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self.shapes["position_ids"]))
        positions = np.frombuffer(ctypes.string_at(self.addresses["position_ids"], 8 * count), np.int64)
        ctypes.memmove(self.addresses["logits"], positions.astype(np.float32).tobytes(), 4 * count)
        self.pasts = [*getattr(self, "pasts", []), self.shapes["past_key_values.0.key"]]
        return True


def test_engine_runner_slices_casts_and_frees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double, driver = Engine(), Driver()
    fake_device(monkeypatch, lambda data: double, driver)
    path = tmp_path / "x.engine"
    path.write_bytes(b"vtrt")
    (tmp_path / "x.engine.json").write_text(json.dumps({"runtime": "tensorrt-rtx"}))
    x = np.arange(20, dtype=np.float32).reshape(5, 4)
    with EngineRunner(path) as runner:
        outputs = runner({"x": x})
        with pytest.raises(EngineError, match=r"input x has shape \(2, 7\)\n  expected: a shape from \(1, 4\) to"):
            runner({"x": np.zeros((2, 7))})
    np.testing.assert_array_equal(outputs["y"], 2 * x)
    assert outputs["y"].dtype == np.float32
    assert double.rows == [2, 2, 1]
    assert runner.device == "NVIDIA Test"
    assert not driver.blocks


def test_engine_runner_gives_a_decoder_an_empty_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DecoderEngine()
    fake_device(monkeypatch, lambda data: decoder, Driver())
    path = tmp_path / "x.engine"
    path.write_bytes(b"vtrt")
    mask = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 0]])
    with EngineRunner(path, runtime="tensorrt-rtx") as runner:
        outputs = runner({"input_ids": 5 * mask, "attention_mask": mask})
    assert list(outputs) == ["logits"]
    np.testing.assert_array_equal(outputs["logits"][..., 0], [[0, 1, 2], [0, 0, 1], [0, 1, 1]])
    assert decoder.pasts == [(2, 2, 0, 4), (1, 2, 0, 4)]


def test_engine_runner_reports_a_refused_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, lambda data: None, Driver())
    path = tmp_path / "x.engine"
    path.write_bytes(b"vtrt")
    with pytest.raises(MachineError, match=r"tensorrt_rtx 1\.7 refuses x\.engine on NVIDIA Test \(sm89\)"):
        EngineRunner(path, runtime="tensorrt-rtx")
    with pytest.raises(ExportError, match=r"x\.engine\.json beside the engine is missing"):
        EngineRunner(path)


def test_a_driver_error_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: Driver(code=2))
    with pytest.raises(MachineError, match="answered cuMemAlloc_v2 with error 2"):
        cuda.DeviceMemory().reserve("x", 16)
