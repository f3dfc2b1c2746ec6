"""What can be timed: a graph on ONNX Runtime, an engine, a checkpoint in PyTorch; inputs are made beforehand.

Nothing here needs torch, whose memory would count as that of a graph; ``torch_variant.py`` is imported for checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from headwise.device.arrays import Array, Port, store
from headwise.device.cuda import require_gpu
from headwise.device.engine import EngineSession
from headwise.device.runtimes import ORT, load_runtime
from headwise.device.session import open_session, ports
from headwise.export.random_inputs import Case, random_inputs, vocabulary_of
from headwise.model.cache import is_past, is_present

Inputs = Mapping[str, Port]
SINGLE = "decode.onnx"
"""Graph of single tokens beside that of a decoder: ``export.decoder.DECODE``, whose module needs torch."""
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
    """An ONNX file. Its cache stays on the device; a graph of its own beside it runs single tokens."""

    runtime = "onnxruntime"
    longest: int | None = None

    def __init__(self, path: Path, *, threads: int, provider: str) -> None:
        options: dict[str, Any] = {"threads": threads, "provider": provider, "integer": True}
        self._session = open_session(path, **options)
        single = path.with_name(SINGLE)
        self._single = open_session(single, **options) if single.exists() else self._session
        self._ort: Any = load_runtime(ORT)
        self.version, self.device = str(self._ort.__version__), provider
        self.inputs: Inputs = ports(self._session.get_inputs())
        self.vocabulary = vocabulary_of(path)
        self.cached = any(map(is_past, self.inputs))
        data = path.with_name(f"{path.name}.data")
        self.bytes = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
        self._memory = "cpu" if provider == "cpu" else "cuda"
        self._used: Any = self._session
        self._binding: Any = None

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """See ``Variant``."""
        del others
        session = self._single if case.past is not None and case.tokens == 1 else self._session
        arrays = random_inputs(ports(session.get_inputs()), case)
        self._used, self._binding = session, session.io_binding()
        for name, array in arrays.items():
            if is_past(name):
                value = self._ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)
                self._binding.bind_ortvalue_input(name, value)
            else:
                self._binding.bind_cpu_input(name, array)
        for output in session.get_outputs():
            self._binding.bind_output(output.name, self._memory if is_present(output.name) else "cpu")
        return {name: array.shape for name, array in arrays.items()}

    def reset(self) -> None:
        """See ``Variant``."""

    def call(self) -> None:
        """See ``Variant``."""
        self._used.run_with_iobinding(self._binding)


class EngineVariant:
    """A TensorRT engine on the first GPU; inputs are copied to it in every call."""

    runtime = "tensorrt"
    vocabulary: int | None = None
    longest: int | None = None
    cached = False

    def __init__(self, path: Path) -> None:
        require_gpu()
        from headwise.export.tensorrt import engine_runtime

        self._session = EngineSession(path, engine_runtime(path))
        self.version, self.device = self._session.version, self._session.device
        self.inputs: Inputs = self._session.inputs
        self.bytes = path.stat().st_size
        self._feed: dict[str, Array] = {}

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """See ``Variant``."""
        del others
        arrays = random_inputs(self.inputs, case)
        self._feed = {name: store(array, self.inputs[name].dtype) for name, array in arrays.items()}
        return {name: array.shape for name, array in arrays.items()}

    def reset(self) -> None:
        """See ``Variant``."""

    def call(self) -> None:
        """See ``Variant``."""
        self._session.run(self._feed)


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
    from headwise.export.torch_variant import TorchVariant

    return TorchVariant(artifact, threads=threads, provider=provider)
