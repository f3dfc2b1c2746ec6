"""A TensorRT engine on the first GPU, run on named arrays through the driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwise.device.arrays import ANY, BF16, FP8, Array, Arrays, Port, restore, stored_dtype
from headwise.device.cuda import DeviceMemory, require_gpu
from headwise.device.runtimes import load_runtime
from headwise.errors import EngineError, MachineError

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": BF16,
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "FP8": FP8,
    "UINT8": "uint8",
    "BOOL": "bool",
}


class EngineSession:
    """An engine that is run on named arrays, with ``tensorrt_rtx`` or ``tensorrt``.

    Needs the package that built the engine, an NVIDIA driver and a GPU of the engine's compute capability; neither
    torch nor CUDA bindings for Python.

    Args:
        path: the engine file.
        runtime: ``tensorrt-rtx`` or ``tensorrt``.

    Attributes:
        inputs, outputs: name -> dtype and dims.
        device: name of the GPU.
        version: of the runtime.
        device_bytes: device memory that loading the engine took, as the driver counts it.

    Raises:
        MachineError: no GPU, or the runtime refuses the engine on this GPU.
        MissingDependencyError: the runtime is not installed.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        found = require_gpu()
        self.device, self.threads = found.name, None
        self._trt: Any = load_runtime(runtime)
        self.version = str(self._trt.__version__)
        self._memory = DeviceMemory()
        free = self._memory.free()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            self._memory.close()
            raise MachineError(
                f"{self._trt.__name__} {self.version} refuses {path.name} on {found.name} (sm{found.sm})",
                expected="the GPU and the runtime version that the engine was built for",
                fix=f"build the engine again with target sm{found.sm}",
            )
        self._context, self._profile = self._engine.create_execution_context(), 0
        self.device_bytes = free - self._memory.free()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        ports = {name: self._port(name) for name in names}
        is_input = {n: self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT for n in names}
        self.inputs = {name: port for name, port in ports.items() if is_input[name]}
        self.outputs = {name: port for name, port in ports.items() if not is_input[name]}

    def _port(self, name: str) -> Port:
        dims = tuple(ANY if dim < 0 else int(dim) for dim in self._engine.get_tensor_shape(name))
        return Port(_DTYPES[self._engine.get_tensor_dtype(name).name], dims)

    @property
    def largest_batch(self) -> int:
        """Rows that one call takes at most."""
        return min(int(self._engine.get_tensor_profile_shape(name, 0)[2][0]) for name in self.inputs)

    def run(self, feed: Arrays, outputs: Sequence[str] | None = None, profile: int = 0) -> dict[str, Array]:
        """The outputs with these names, or all of them; half precision as float32.

        Args:
            feed: every input, with the bits that the engine has (:func:`headwise.device.arrays.store`).
            outputs: those that are copied back.
            profile: which of the engine's sets of shapes to run.

        Raises:
            EngineError: a shape is outside of the profile, or the engine does not run.
        """
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._memory.stream)
            self._profile = profile
        for name, array in feed.items():
            if not self._context.set_input_shape(name, array.shape):
                low, _, high = self._engine.get_tensor_profile_shape(name, profile)
                raise EngineError(
                    f"input {name} has shape {tuple(array.shape)}",
                    expected=f"a shape from {tuple(low)} to {tuple(high)}",
                    fix="set export.batch and export.sequence to what you run, and build the engine again",
                )
            self._context.set_tensor_address(name, self._memory.upload(name, array))
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self.outputs}
        dtypes = {name: stored_dtype(port.dtype) for name, port in self.outputs.items()}
        for name, shape in shapes.items():
            size = int(np.prod(shape)) * dtypes[name].itemsize
            self._context.set_tensor_address(name, self._memory.reserve(name, size))
        if not self._context.execute_async_v3(self._memory.stream):
            raise EngineError(
                "the engine did not run",
                expected="a successful execution",
                fix="run it again with the runtime's verbose log to see the kernel that failed",
            )
        return {
            name: restore(self._memory.download(name, shapes[name], dtypes[name]), self.outputs[name].dtype)
            for name in (self.outputs if outputs is None else outputs)
        }

    def close(self) -> None:
        """Free the engine and its device memory."""
        del self._context, self._engine, self._runtime
        self._memory.close()
