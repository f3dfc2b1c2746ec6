"""A GPU made of host memory: the driver, and a runtime whose engines are ONNX graphs on ONNX Runtime."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from headwise.device import cuda
from headwise.device.session import ports

_NAMES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}


class Driver:
    """libcuda, on host memory."""

    def __init__(self, code: int = 0, sm: int = 89) -> None:
        self.code, self.sm = code, sm
        self.blocks: dict[int, Any] = {}

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA Test"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: self.sm // 10, 76: self.sm % 10}[attribute]
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        block = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(block)
        self.blocks[pointer._obj.value] = block
        return self.code

    def cuMemFree_v2(self, pointer: Any) -> int:
        del self.blocks[pointer.value]
        return 0

    def cuMemcpyHtoD_v2(self, target: Any, source: Any, size: Any) -> int:
        assert size.value
        ctypes.memmove(target.value, source, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, size: Any) -> int:
        ctypes.memmove(target, source.value, size.value)
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value = (1 << 30) - sum(map(ctypes.sizeof, self.blocks.values()))
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0


class GraphEngine:
    """An engine whose file is an ONNX graph. It is its own execution context.

    Args:
        data: the graph.
        change: done to the outputs, by name.
    """

    def __init__(self, data: bytes, change: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self.change = change
        self.inputs, self.outputs = ports(self.session.get_inputs()), ports(self.session.get_outputs())
        self.names = [*self.inputs, *change({name: name for name in self.outputs})]
        self.num_io_tensors = len(self.names)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiles: list[int] = []
        self.results: dict[str, Any] = {}

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def _port(self, name: str) -> Any:
        return self.inputs.get(name) or self.change(dict(self.outputs))[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[self._port(name).dtype])

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def create_execution_context(self) -> GraphEngine:
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profiles.append(profile)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self.shapes:
            return tuple(dim if isinstance(dim, int) else -1 for dim in self._port(name).dims)
        if name == next(n for n in self.names if n not in self.inputs):
            self.results = self._run()
        return tuple(self.results[name].shape)

    def _run(self) -> dict[str, Any]:
        feed = {}
        for name, port in self.inputs.items():
            dtype, count = np.dtype(port.dtype), int(np.prod(self.shapes[name]))
            data = ctypes.string_at(self.addresses[name], count * dtype.itemsize)
            feed[name] = np.frombuffer(data, dtype).reshape(self.shapes[name])
        found = self.session.run(list(self.outputs), feed)
        return self.change(dict(zip(self.outputs, found, strict=True)))

    def execute_async_v3(self, stream: int) -> bool:
        for name, array in self.results.items():
            data = np.ascontiguousarray(array).tobytes()
            ctypes.memmove(self.addresses[name], data, len(data))
        return True


def fake_device(
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[bytes], Any] = GraphEngine,
    driver: Driver | None = None,
    *,
    package: str = "tensorrt_rtx",
    version: str = "1.7",
) -> None:
    """A GPU, and the package of a runtime that loads engines with ``load``."""
    trt: Any = SimpleNamespace(
        __name__=package,
        __version__=version,
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=load),
        TensorIOMode=SimpleNamespace(INPUT="in"),
    )
    gpu = driver or Driver()
    monkeypatch.setattr(cuda, "_library", lambda: gpu)
    monkeypatch.setitem(sys.modules, package, trt)
