"""Runners: one call signature, batch of arrays -> named arrays, over torch, ONNX Runtime and a TensorRT engine.

Float outputs always come back as float32, whatever the graph computes in, so that the gates compare like with like.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from headwise.errors import DataError, EngineError, ExportError, MachineError
from headwise.export.cuda import DeviceMemory, gpu
from headwise.export.graph import Dims
from headwise.export.ports import first_call
from headwise.export.tensorrt import engine_runtime, load_runtime
from headwise.model.cache import is_present
from headwise.model.forward import run, to_torch

Arrays = Mapping[str, NDArray[Any]]
Input = tuple[np.dtype[Any], Dims]
"""Dtype and dims of a graph's input; a dim that varies is a name, or None."""

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ORT_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}
_ENGINE_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Runner(Protocol):
    """Anything that turns a batch into named outputs.

    Attributes:
        name: ``torch``, ``onnxruntime`` or ``tensorrt``.
        device: what it runs on, for reports.
        threads: CPU threads it uses, None when the backend decides.
    """

    name: str
    device: str
    threads: int | None

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch (batch axis first in every array)."""
        ...


def as_float32(array: NDArray[Any]) -> NDArray[Any]:
    """Half precision as float32; everything else as it is."""
    is_half = array.dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
    return array.astype(np.float32) if is_half else array


def _select(batch: Arrays, inputs: Mapping[str, Input], ignore: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays that a graph takes, in its own dtypes; a decoder's graph gets an empty past."""
    batch = first_call(batch, {name: dims for name, (_, dims) in inputs.items()})
    wanted = {name: dtype for name, (dtype, _) in inputs.items()}
    missing = [name for name in wanted if name not in batch]
    extra = [name for name in batch if name not in wanted and name not in ignore]
    if missing or extra:
        problem = f"the batch lacks {', '.join(missing)}" if missing else f"the graph has no input {', '.join(extra)}"
        raise DataError(
            problem,
            expected="the inputs of the graph: " + ", ".join(wanted),
            fix="give exactly these, or export the model again with the batch that you want to run",
        )
    return {name: np.ascontiguousarray(batch[name], dtype=dtype) for name, dtype in wanted.items()}


class TorchRunner:
    """The PyTorch module itself.

    Args:
        module: put into eval mode and moved to ``device``.
        device: a torch device.
    """

    name = "torch"

    def __init__(self, module: torch.nn.Module, device: str = "cpu") -> None:
        self.device = device
        self.threads: int | None = torch.get_num_threads()
        self._module = module.eval().to(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch without gradients."""
        with torch.no_grad():
            outputs = run(self._module, to_torch(batch, self.device))
        return {name: _to_numpy(tensor) for name, tensor in outputs.items()}


def _to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return np.asarray(tensor.detach().cpu().numpy())


def open_session(
    path: Path, *, threads: int | None = None, provider: str = "cpu", optimize: bool = True
) -> ort.InferenceSession:
    """A session on the provider that was asked for; arguments and errors are those of ``OrtRunner``."""
    asked = _PROVIDERS.get(provider, provider)
    if asked not in ort.get_available_providers():
        raise MachineError(
            f"this onnxruntime has no {asked}",
            expected="one of " + ", ".join(ort.get_available_providers()),
            fix="install onnxruntime-gpu instead of onnxruntime, or use provider cpu",
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Threads that wait for the next call would slow down whatever is timed in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # errors are raised below, with the same message
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=[asked])
    except Exception as error:  # ONNX Runtime's own exception classes share no public base
        raise ExportError(
            f"ONNX Runtime refuses {path.name}: {str(error).strip()}",
            expected="a graph that ONNX Runtime can run",
            fix="see the message above for the node; a graph made for another runtime cannot be judged here",
        ) from error
    if asked not in session.get_providers():
        raise MachineError(
            f"ONNX Runtime fell back from {asked} to {', '.join(session.get_providers())}",
            expected=f"a working {asked}",
            fix="install the CUDA and cuDNN versions that this onnxruntime-gpu needs, or use provider cpu",
        )
    return session


def session_inputs(session: ort.InferenceSession) -> dict[str, Input]:
    """Input -> its dtype and dims."""
    return {item.name: (_ORT_DTYPES[item.type], tuple(item.shape)) for item in session.get_inputs()}


class OrtRunner:
    """An ONNX file on ONNX Runtime. A decoder's graph with a cache reads every batch from its beginning.

    Args:
        path: the graph.
        threads: intra-op threads; None lets ONNX Runtime take every core.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        optimize: False runs the graph as it is written.
        ignore: batch keys that the graph is known not to use.

    Raises:
        ExportError: ONNX Runtime refuses the graph; the message is ONNX Runtime's.
        MachineError: the provider is not to be had here. There is no fallback to another one.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        provider: str = "cpu",
        optimize: bool = True,
        ignore: Collection[str] = (),
    ) -> None:
        self.device, self.threads, self._ignore = provider, threads, ignore
        self._session = open_session(path, threads=threads, provider=provider, optimize=optimize)
        self._inputs = session_inputs(self._session)
        self._outputs = [item.name for item in self._session.get_outputs() if not is_present(item.name)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch; float inputs are cast to the dtype of the graph."""
        feed = _select(batch, self._inputs, self._ignore)
        try:
            outputs = self._session.run(self._outputs, feed)
        except Exception as error:  # same as above: no public base class
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
            raise ExportError(
                f"ONNX Runtime cannot run the graph on {shapes}: {str(error).strip()}",
                expected="a graph that runs at every batch size and length it was exported for",
                fix="mark the axes that vary as dynamic; in forward, take sizes from tensor.shape (len() fixes them)",
            ) from error
        return {name: as_float32(np.asarray(array)) for name, array in zip(self._outputs, outputs, strict=True)}


class EngineRunner:
    """A TensorRT engine on the first GPU, with ``tensorrt_rtx`` or ``tensorrt``.

    Needs the package that built the engine, an NVIDIA driver and a GPU of the engine's compute capability; neither
    torch nor CUDA bindings for Python. Batches larger than the engine's profile are run in slices.

    Args:
        path: the engine file.
        runtime: ``tensorrt-rtx`` or ``tensorrt``; None reads it from the JSON file that the build left beside it.
        ignore: batch keys that the engine is known not to use.

    Raises:
        MachineError: no GPU, or the runtime refuses the engine on this GPU.
        EngineError: a batch is outside of the engine's profile.
    """

    name = "tensorrt"

    def __init__(self, path: Path, *, runtime: str | None = None, ignore: Collection[str] = ()) -> None:
        found = gpu()
        if found is None:
            raise MachineError(
                "no GPU", expected="a GPU of the engine's target", fix="run this on the device that it was built for"
            )
        self.device, self._ignore = found.name, ignore
        self.threads: int | None = None
        self._trt: Any = load_runtime(runtime or engine_runtime(path))
        self.version = str(self._trt.__version__)
        self._memory = DeviceMemory()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            self._memory.close()
            raise MachineError(
                f"{self._trt.__name__} {self._trt.__version__} refuses {path.name} on {found.name} (sm{found.sm})",
                expected="the GPU and the runtime version that the engine was built for",
                fix=f"build the engine again with target sm{found.sm}",
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        dtypes = {name: _ENGINE_DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT]
        dims = {n: tuple("any" if d < 0 else int(d) for d in self._engine.get_tensor_shape(n)) for n in inputs}
        self._inputs = {name: (dtypes[name], dims[name]) for name in inputs}
        self.inputs: Mapping[str, Input] = self._inputs
        self._outputs = {name: dtypes[name] for name in names if name not in inputs}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._context, self._engine, self._runtime
        self._memory.close()

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch; float inputs are cast to the dtype of the engine."""
        feed = _select(batch, self._inputs, self._ignore)
        rows = len(next(iter(feed.values())))
        step = min(int(self._engine.get_tensor_profile_shape(name, 0)[2][0]) for name in feed)
        parts = [self._run({n: a[i : i + step] for n, a in feed.items()}) for i in range(0, rows, step)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        for name, array in feed.items():
            if not self._context.set_input_shape(name, array.shape):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise EngineError(
                    f"input {name} has shape {tuple(array.shape)}",
                    expected=f"a shape from {tuple(low)} to {tuple(high)}",
                    fix="set export.batch and export.sequence to what you run, and build the engine again",
                )
            self._context.set_tensor_address(name, self._memory.upload(name, array))
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in shapes.items():
            size = int(np.prod(shape)) * self._outputs[name].itemsize
            self._context.set_tensor_address(name, self._memory.reserve(name, size))
        if not self._context.execute_async_v3(self._memory.stream):
            raise EngineError(
                "the engine did not run",
                expected="a successful execution",
                fix="run it again with the runtime's verbose log to see the kernel that failed",
            )
        answers = {name: dtype for name, dtype in self._outputs.items() if not is_present(name)}
        downloads = {name: self._memory.download(name, shapes[name], dtype) for name, dtype in answers.items()}
        return {name: as_float32(array) for name, array in downloads.items()}
