"""An ONNX graph on ONNX Runtime, on the provider that was asked for and no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwise.device.arrays import ANY, BF16, Array, Arrays, Port, as_float32
from headwise.device.runtimes import ORT, load_runtime
from headwise.errors import ExportError, MachineError

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
DISABLED_OPTIMIZERS = ("QDQPropagationTransformer",)
"""It lets nodes that move data read codes; those of ONNX Runtime take no fp8."""
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": BF16,
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def open_session(
    path: Path, *, threads: int | None = None, provider: str = "cpu", optimize: bool = True, integer: bool = False
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the provider that was asked for.

    Args:
        path: the graph.
        threads: intra-op threads; None lets ONNX Runtime take every core.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        optimize: False runs the graph as it is written.
        integer: let ONNX Runtime put integer kernels in the place of Q/DQ nodes, as it does by itself.

    Raises:
        ExportError: ONNX Runtime refuses the graph; the message is ONNX Runtime's.
        MachineError: the provider is not to be had here. There is no fallback to another one.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    ort: Any = load_runtime(ORT)
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
    # As they are written, Q/DQ nodes round as TensorRT does. Integer kernels in their place would round to 8 bits what
    # weights in codes multiply, which nobody asked for, and there are none for fp8.
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not integer)))
    options.log_severity_level = 4  # errors are raised below, with the same message
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            str(path), options, providers=[asked], disabled_optimizers=list(DISABLED_OPTIMIZERS)
        )
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


def ports(items: Sequence[Any]) -> dict[str, Port]:
    """Name -> dtype and dims of ``session.get_inputs()`` or ``get_outputs()``."""
    return {
        item.name: Port(_DTYPES[item.type], tuple(dim if isinstance(dim, int | str) else ANY for dim in item.shape))
        for item in items
    }


class OrtSession:
    """A graph that is run on named arrays.

    Args:
        path, threads, provider, optimize, integer: see :func:`open_session`, also for the errors.

    Attributes:
        inputs, outputs: name -> dtype and dims.
        device: the provider.
        version: of ONNX Runtime.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        provider: str = "cpu",
        optimize: bool = True,
        integer: bool = False,
    ) -> None:
        self._session = open_session(path, threads=threads, provider=provider, optimize=optimize, integer=integer)
        self.device, self.threads = provider, threads
        self.version = str(load_runtime(ORT).__version__)
        self.inputs, self.outputs = ports(self._session.get_inputs()), ports(self._session.get_outputs())

    def run(self, feed: Arrays, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs with these names, or all of them; half precision as float32.

        Raises:
            ExportError: the graph does not run on these arrays.
        """
        names = list(self.outputs if outputs is None else outputs)
        try:
            arrays = self._session.run(names, dict(feed))
        except Exception as error:  # same as above: no public base class
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
            raise ExportError(
                f"ONNX Runtime cannot run the graph on {shapes}: {str(error).strip()}",
                expected="a graph that runs at every batch size and length it was exported for",
                fix="mark the axes that vary as dynamic; in forward, take sizes from tensor.shape (len() fixes them)",
            ) from error
        return {name: as_float32(np.asarray(array)) for name, array in zip(names, arrays, strict=True)}

    def close(self) -> None:
        """Nothing is held that Python does not free."""
