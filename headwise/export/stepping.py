"""A decoder that is called step by step and keeps its cache between the calls: on ONNX Runtime, or in PyTorch.

Shape letters: B batch, T tokens of a call, S tokens of all calls up to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from headwise.device.arrays import as_float32
from headwise.device.session import open_session, ports
from headwise.errors import DataError
from headwise.export.ports import IDS, MASK, POSITIONS
from headwise.model.cache import PAST, is_past, is_present, next_past, prunes_prompts
from headwise.model.decoder import empty_past, make_cache, read_cache
from headwise.model.view import ModelView

Array = NDArray[Any]


class Decoder(Protocol):
    """Reads tokens, a part of every row at a time.

    Attributes:
        name: ``torch`` or ``onnxruntime``.
        prunes: whether it keeps a share of every prompt, so that one call has to read all of it.
    """

    name: str
    prunes: bool

    def begin(self, rows: int) -> None:
        """Forget everything; the next calls have this many rows."""

    def __call__(self, ids: Array, mask: Array, positions: Array) -> Array:
        """Read the next tokens of every row.

        Args:
            ids: (B, T) the new tokens.
            mask: (B, S) 1 at tokens and 0 at padding, of everything read so far and the new tokens.
            positions: (B, T) of the new tokens.

        Returns:
            (B, T, vocabulary) float32 scores of the tokens that come next.
        """
        ...


class TorchDecoder:
    """A PyTorch model and its cache."""

    name = "torch"

    def __init__(self, view: ModelView) -> None:
        self._module: Any = view.module
        self._layout = view.layout.cache
        self.prunes = prunes_prompts(self._layout.past())
        self.begin(1)

    def begin(self, rows: int) -> None:
        """See ``Decoder``."""
        self.cache = make_cache(self._layout, empty_past(self._layout, rows))

    def __call__(self, ids: Array, mask: Array, positions: Array) -> Array:
        """See ``Decoder``."""
        inputs = {IDS: ids, MASK: mask, POSITIONS: positions}
        tensors = {name: torch.as_tensor(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with torch.no_grad():
            output = self._module(**tensors, past_key_values=self.cache, use_cache=True)
        return np.asarray(output.logits.float().numpy())

    def cached(self) -> dict[str, Array]:
        """What the layers hold, by the names of a graph's outputs."""
        return {name: np.asarray(tensor.numpy()) for name, tensor in read_cache(self._layout, self.cache).items()}


class OrtDecoder:
    """A graph with its cache as inputs and outputs; what it caches stays inside of ONNX Runtime.

    Args:
        path: the graph.
        decode: a second graph, with the same cache, for calls of one token per row; None leaves them to the first.
        threads: intra-op threads; None lets ONNX Runtime take every core.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.

    Raises:
        DataError: the graph has no cache.
        ExportError: ONNX Runtime refuses the graph.
        MachineError: the provider is not to be had here.
    """

    name = "onnxruntime"

    def __init__(
        self, path: Path, *, decode: Path | None = None, threads: int | None = None, provider: str = "cpu"
    ) -> None:
        self.device, self.threads = provider, threads
        self._session = open_session(path, threads=threads, provider=provider)
        self._single = self._session if decode is None else open_session(decode, threads=threads, provider=provider)
        self._inputs = ports(self._session.get_inputs())
        self._outputs = [item.name for item in self._session.get_outputs()]
        if not any(map(is_past, self._inputs)):
            raise DataError(
                f"{path.name} keeps nothing between its calls",
                expected=f"a decoder with inputs such as {PAST}.0.key and outputs such as present.0.key",
                fix="export it with export.cache: true, which is the default for causal language models",
            )
        self.prunes = prunes_prompts(self._inputs)
        self._present = [name for name in self._outputs if is_present(name)]
        self._logits = next(name for name in self._outputs if not is_present(name))
        self.begin(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def begin(self, rows: int) -> None:
        """See ``Decoder``."""
        self._cache = {}
        for name, (dtype, dims) in self._inputs.items():
            if is_past(name):
                shape = [rows, *(dim if isinstance(dim, int) else 0 for dim in dims[1:])]
                self._cache[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))

    def __call__(self, ids: Array, mask: Array, positions: Array) -> Array:
        """See ``Decoder``."""
        given = {IDS: ids, MASK: mask, POSITIONS: positions}
        feed = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given[name], self._inputs[name][0]))
            for name in given
            if name in self._inputs
        }
        wanted = [self._logits, *self._present]
        session = self._single if ids.shape[1] == 1 else self._session
        logits, *present = session.run_with_ort_values(wanted, {**feed, **self._cache})
        self._cache = {next_past(name): value for name, value in zip(self._present, present, strict=True)}
        return as_float32(logits.numpy())

    def cached(self) -> dict[str, Array]:
        """What the layers hold, by the names of the graph's outputs."""
        return {name: as_float32(self._cache[next_past(name)].numpy()) for name in self._present}
