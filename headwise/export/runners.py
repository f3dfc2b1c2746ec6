"""Runners: one call signature, batch of arrays -> named arrays, over torch, ONNX Runtime and a TensorRT engine.

Float outputs always come back as float32, whatever the graph computes in, so that the gates compare like with like.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from headwise.device.arrays import Arrays, Port, store
from headwise.device.cuda import require_gpu
from headwise.device.engine import EngineSession
from headwise.device.session import OrtSession
from headwise.errors import DataError
from headwise.export.ports import first_call
from headwise.export.tensorrt import engine_runtime
from headwise.model.cache import is_present
from headwise.model.forward import run, to_torch


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


def _select(batch: Arrays, inputs: Mapping[str, Port], ignore: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays that a graph takes, in its own dtypes; a decoder's graph gets an empty past."""
    batch = first_call(batch, {name: port.dims for name, port in inputs.items()})
    missing = [name for name in inputs if name not in batch]
    extra = [name for name in batch if name not in inputs and name not in ignore]
    if missing or extra:
        problem = f"the batch lacks {', '.join(missing)}" if missing else f"the graph has no input {', '.join(extra)}"
        raise DataError(
            problem,
            expected="the inputs of the graph: " + ", ".join(inputs),
            fix="give exactly these, or export the model again with the batch that you want to run",
        )
    return {name: store(batch[name], port.dtype) for name, port in inputs.items()}


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


class OrtRunner:
    """An ONNX file on ONNX Runtime. A decoder's graph with a cache reads every batch from its beginning.

    Args:
        path: the graph.
        threads: intra-op threads; None lets ONNX Runtime take every core.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        optimize: False runs the graph as it is written.
        integer: let ONNX Runtime put integer kernels in the place of Q/DQ nodes; a gate judges them as written.
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
        integer: bool = False,
        ignore: Collection[str] = (),
    ) -> None:
        self.device, self.threads, self._ignore = provider, threads, ignore
        self._session = OrtSession(path, threads=threads, provider=provider, optimize=optimize, integer=integer)
        self._outputs = [name for name in self._session.outputs if not is_present(name)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch; float inputs are cast to the dtype of the graph."""
        return self._session.run(_select(batch, self._session.inputs, self._ignore), self._outputs)


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
        # Without a GPU, what lies beside the engine does not matter.
        require_gpu()
        self._session = EngineSession(path, runtime or engine_runtime(path))
        self.device, self._ignore = self._session.device, ignore
        self.threads: int | None = None
        self._outputs = [name for name in self._session.outputs if not is_present(name)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Run one batch; float inputs are cast to the dtype of the engine."""
        feed = _select(batch, self._session.inputs, self._ignore)
        rows, step = len(next(iter(feed.values()))), self._session.largest_batch
        slices = [{n: a[i : i + step] for n, a in feed.items()} for i in range(0, rows, step)]
        parts = [self._session.run(part, self._outputs) for part in slices]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
