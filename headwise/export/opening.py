"""Runners of what a gate judges: a graph or an engine that keeps a share of every prompt reads texts in halves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headwise.device.arrays import Arrays, store
from headwise.device.cuda import require_gpu
from headwise.device.engine import EngineSession
from headwise.export.graph import graph_inputs
from headwise.export.halves import read_halves
from headwise.export.ports import IDS, MASK, POSITIONS, first_call
from headwise.export.runners import EngineRunner, OrtRunner, Runner
from headwise.export.stepping import Array, Decoder, OrtDecoder
from headwise.export.tensorrt import engine_runtime
from headwise.export.variants import ENGINES, SINGLE
from headwise.model.cache import is_past, is_present, next_past, prunes_prompts


def open_runner(path: Path, *, single: Path | None = None) -> Runner:
    """What runs whole texts through a graph on ONNX Runtime, or through an engine on the first GPU.

    Args:
        path: the graph or the engine.
        single: the graph of single tokens that goes with it; None: ``decode.onnx`` beside it, where there is one.

    Raises:
        HeadwiseError: see ``OrtRunner`` and ``EngineRunner``.
    """
    if path.suffix in ENGINES:
        # Whether there is a GPU at all comes before what its engine looks like.
        require_gpu()
        session = EngineSession(path, engine_runtime(path))
        prunes = prunes_prompts(session.inputs)
        if not prunes:
            session.close()
            return EngineRunner(path)
        decoder = EngineDecoder(path, session)
        return HalvesRunner(decoder, decoder.device, rows=decoder.largest_batch, close=decoder.close)
    if not prunes_prompts(graph_inputs(path)):
        return OrtRunner(path)
    single = path.with_name(SINGLE) if single is None else single
    graph = OrtDecoder(path, decode=single if single.exists() else None)
    return HalvesRunner(graph, graph.device)


class HalvesRunner:
    """A decoder as a runner: the first half of every text is a prompt.

    Args:
        decoder: reads the texts.
        device: what it runs on.
        rows: most texts in one call; None for any number.
        close: lets the decoder go.
    """

    threads: int | None = None

    def __init__(
        self, decoder: Decoder, device: str, *, rows: int | None = None, close: Callable[[], None] | None = None
    ) -> None:
        self.name, self.device = decoder.name, device
        self._decoder, self._rows, self._close = decoder, rows, close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._close is not None:
            self._close()

    def __call__(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Scores behind all tokens of a batch; those of padding are 0."""
        ids = batch[IDS]
        mask = batch.get(MASK, np.ones_like(ids))
        step = self._rows or len(ids)
        slices = [slice(start, start + step) for start in range(0, len(ids), step)]
        return {"logits": np.concatenate([read_halves(self._decoder, ids[rows], mask[rows]) for rows in slices])}


class EngineDecoder:
    """An engine that keeps its cache between calls, in the memory of the CPU; see ``Decoder``.

    Args:
        path: the engine; ``decode.engine`` beside it, or its second profile, runs calls of one token per row.
        session: the same, opened.
    """

    name = "tensorrt"
    prunes = True

    def __init__(self, path: Path, session: EngineSession) -> None:
        single = path.with_name(Path(SINGLE).stem + path.suffix)
        self._session = session
        self._single = EngineSession(single, engine_runtime(single)) if single.exists() else session
        self.device, self.largest_batch = session.device, session.largest_batch
        self._present = [name for name in session.outputs if is_present(name)]
        self._logits = next(name for name in session.outputs if not is_present(name))
        self._cache: dict[str, Array] = {}

    def begin(self, rows: int) -> None:
        """See ``Decoder``."""
        dims = {name: port.dims for name, port in self._session.inputs.items()}
        first = first_call({IDS: np.zeros((rows, 1), np.int64)}, dims)
        self._cache = {name: array for name, array in first.items() if is_past(name)}

    def __call__(self, ids: Array, mask: Array, positions: Array) -> Array:
        """See ``Decoder``."""
        one = ids.shape[1] == 1
        session = self._single if one else self._session
        given = {IDS: ids, MASK: mask, POSITIONS: positions, **self._cache}
        feed = {name: store(given[name], port.dtype) for name, port in session.inputs.items()}
        found = session.run(feed, profile=1 if one and session is self._session else 0)
        self._cache = {next_past(name): found[name] for name in self._present}
        return found[self._logits]

    def close(self) -> None:
        """Free the engines."""
        for session in {id(s): s for s in (self._session, self._single)}.values():
            session.close()
