"""What can be timed: a graph on ONNX Runtime, a checkpoint in PyTorch, an engine; inputs are made beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from headwise.errors import DataError, MachineError
from headwise.export.ports import IDS, MASK, POSITIONS
from headwise.export.random_inputs import Case, random_inputs, vocabulary_of
from headwise.export.runners import EngineRunner, Input, open_session, session_inputs
from headwise.model.cache import is_past, is_present
from headwise.model.checkpoint import load_checkpoint
from headwise.model.decoder import make_cache, why_no_cache
from headwise.model.forward import run

Inputs = Mapping[str, Input]
ENGINES = frozenset({".engine", ".plan", ".trt"})


class Variant(Protocol):
    """One thing that is timed.

    Attributes:
        runtime: ``torch``, ``onnxruntime`` or ``tensorrt``.
        version: of that package.
        device: what it runs on.
        inputs: what it takes; empty where it does not say, so that another variant has to.
        vocabulary: of its ids; None where it does not say.
        cached: whether it takes and returns the keys and values of earlier calls.
        longest: tokens that it takes; None where nothing says.
        bytes: of its file or its weights.
    """

    runtime: str
    version: str
    device: str
    inputs: Inputs
    vocabulary: int | None
    cached: bool
    longest: int | None
    bytes: int

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """Make the inputs of the coming calls.

        Args:
            case: sizes.
            others: inputs of another variant, for one that does not say its own.

        Returns:
            Name -> shape.
        """
        ...

    def reset(self) -> None:
        """What has to be done before each call and is no part of it."""

    def call(self) -> None:
        """Run once, until the answers are in the memory of the CPU."""


class GraphVariant:
    """An ONNX file. Its cache, where it has one, stays on the device."""

    runtime = "onnxruntime"
    longest: int | None = None

    def __init__(self, path: Path, *, threads: int, provider: str) -> None:
        self._session = open_session(path, threads=threads, provider=provider)
        self.version, self.device = ort.__version__, provider
        self.inputs: Inputs = session_inputs(self._session)
        self.vocabulary = vocabulary_of(path)
        self.cached = any(map(is_past, self.inputs))
        data = path.with_name(f"{path.name}.data")
        self.bytes = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
        self._memory = "cpu" if provider == "cpu" else "cuda"
        self._binding: Any = None

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """See ``Variant``."""
        del others
        arrays = random_inputs(self.inputs, case)
        self._binding = self._session.io_binding()
        for name, array in arrays.items():
            if is_past(name):
                self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0))
            else:
                self._binding.bind_cpu_input(name, array)
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name, self._memory if is_present(output.name) else "cpu")
        return {name: array.shape for name, array in arrays.items()}

    def reset(self) -> None:
        """See ``Variant``."""

    def call(self) -> None:
        """See ``Variant``."""
        self._session.run_with_iobinding(self._binding)


class TorchVariant:
    """A checkpoint, with its cache where it is a decoder that can keep one."""

    runtime = "torch"

    def __init__(self, source: str, *, threads: int, provider: str) -> None:
        if provider == "tensorrt":
            raise MachineError(
                f"{source} is a checkpoint, which PyTorch runs, not TensorRT",
                expected="provider cpu or cuda",
                fix="name the graph of a run instead of the checkpoint",
            )
        if provider == "cuda" and not torch.cuda.is_available():
            raise MachineError("torch finds no GPU", expected="provider cpu", fix="use --provider cpu")
        torch.set_num_threads(threads)
        checkpoint = load_checkpoint(source)
        self._module = checkpoint.module.to(provider)
        self._view = checkpoint.view()
        self.version, self.device = str(torch.__version__), provider
        self.cached = not why_no_cache(self._view)
        self.longest = checkpoint.longest_sequence()
        self._names = checkpoint.input_names()
        self.inputs: Inputs
        self.inputs, self.vocabulary = _stock_inputs(self._module, self._names)
        self.bytes = sum(p.numel() * p.element_size() for p in self._module.parameters())
        self._batch: dict[str, torch.Tensor] = {}
        self._past: dict[str, torch.Tensor] | None = None
        self._more: dict[str, Any] = {}

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """See ``Variant``."""
        inputs = dict(self.inputs or {name: entry for name, entry in others.items() if name in self._names})
        if not inputs:
            raise DataError(
                f"{type(self._module).__name__} does not say what its inputs look like",
                expected="a graph among the things to compare, whose inputs say it, or a stock model of transformers",
                fix="name the run that was made from this checkpoint as well",
            )
        layout = self._view.layout.cache
        self._past = None
        if case.past is not None:
            dims = {name: tensor.dims("batch", "past") for name, tensor in layout.past().items()}
            inputs |= {name: (np.dtype(np.float32), found) for name, found in dims.items()}
            inputs[POSITIONS] = (np.dtype(np.int64), ("batch", "sequence"))
        arrays = random_inputs(inputs, case)
        tensors = {name: torch.as_tensor(array, device=self.device) for name, array in arrays.items()}
        self._batch = {name: tensor for name, tensor in tensors.items() if not is_past(name)}
        if case.past is not None:
            self._past = {name: tensor for name, tensor in tensors.items() if is_past(name)}
        return {name: array.shape for name, array in arrays.items()}

    def reset(self) -> None:
        """See ``Variant``; a call adds to the cache that it is given."""
        if self._past is not None:
            self._more = {"past_key_values": make_cache(self._view.layout.cache, self._past), "use_cache": True}

    def call(self) -> None:
        """See ``Variant``."""
        with torch.no_grad():
            outputs = run(self._module, {**self._batch, **self._more})
        for tensor in outputs.values():
            tensor.cpu()


class EngineVariant:
    """A TensorRT engine on the first GPU; inputs are copied to it in every call."""

    runtime = "tensorrt"
    vocabulary: int | None = None
    longest: int | None = None
    cached = False

    def __init__(self, path: Path) -> None:
        self._runner = EngineRunner(path)
        self.version = self._runner.version
        self.device, self.inputs = self._runner.device, self._runner.inputs
        self.bytes = path.stat().st_size
        self._batch: dict[str, NDArray[Any]] = {}

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """See ``Variant``."""
        del others
        self._batch = random_inputs({n: entry for n, entry in self.inputs.items() if not is_past(n)}, case)
        return {name: array.shape for name, array in self._batch.items()}

    def reset(self) -> None:
        """See ``Variant``."""

    def call(self) -> None:
        """See ``Variant``."""
        self._runner(self._batch)


def _stock_inputs(module: Any, names: tuple[str, ...]) -> tuple[dict[str, Input], int | None]:
    """Inputs and vocabulary of a model of transformers that reads text or images of one size; empty for others."""
    config = getattr(module, "config", None)
    found: dict[str, Input] = {}
    vocabulary = None
    if config is None or getattr(config, "is_encoder_decoder", False):
        return found, vocabulary
    text, image = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    if IDS in names:
        vocabulary = int(text.vocab_size)
        found |= {n: (np.dtype(np.int64), ("batch", "sequence")) for n in (IDS, MASK) if n in names}
    if "pixel_values" in names:
        size = image.image_size
        height, width = (size, size) if isinstance(size, int) else size
        found["pixel_values"] = (np.dtype(np.float32), ("batch", image.num_channels, height, width))
    return found, vocabulary


def open_variant(artifact: str, *, threads: int, provider: str) -> Variant:
    """Load a graph, an engine or a checkpoint.

    Raises:
        HeadwiseError: it cannot be loaded, or not on this machine.
    """
    path = Path(artifact)
    if path.suffix == ".onnx":
        return GraphVariant(path, threads=threads, provider=provider)
    if path.suffix in ENGINES:
        return EngineVariant(path)
    return TorchVariant(artifact, threads=threads, provider=provider)
