"""Golden inputs and outputs of a bundle: a few samples of the task, and what the bundle's own graph makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.calibration.tasks import Examples
from headwise.device.arrays import FP8, Array, Arrays, store
from headwise.device.builder import Profiles
from headwise.device.session import OrtSession
from headwise.errors import BundleError, DataError
from headwise.export.graph import graph_inputs, graph_ports
from headwise.export.ports import IDS, MASK, first_call
from headwise.model.cache import is_past, is_present, next_past

Cases = dict[str, dict[str, NDArray[Any]]]
"""Case -> input -> array."""

STEP = "step"
_CODES = ("int8", "uint8")
_TOKENS = 32  # of a decoder's rows: every token brings scores of the whole vocabulary


def golden_inputs(examples: Examples, graph: Path, profiles: Profiles, samples: int) -> Cases:
    """``batch``: samples of different length in one batch, padded as the task does; ``short``: the shortest ones, where
    lengths vary. A decoder with a cache has no past here; see ``golden_step``.

    Args:
        examples: samples of the task.
        graph: runs on ONNX Runtime; says what a first call takes.
        profiles: shapes that an engine takes, empty without engines; samples that it does not take are left out.
        samples: rows of a case; what the profiles allow goes before it.

    Raises:
        DataError: no sample fits.
    """
    inputs = graph_inputs(graph)
    decoder = any(map(is_past, inputs))
    rows = [_prefix(row) if decoder else row for row in examples.unique_rows()[0].rows]
    fitting = [row for row in rows if _takes(profiles, row)]
    if not fitting:
        raise DataError(
            f"no sample of {examples.source} has a size that the engines take",
            expected="samples within export.sequence",
            fix="set export.sequence to the lengths that occur in the data, and run headwise compress again",
        )
    low, high = _batch_range(profiles)
    count = max(low, min(samples, high))
    order = sorted(fitting, key=_size)
    spread = [order[round(i)] for i in np.linspace(len(order) - 1, 0, count)]
    cases = {"batch": _padded(examples, spread, low)}
    if _size(order[0]) < _size(order[-1]):
        cases["short"] = _padded(examples, order[:count], low)
    return {name: first_call(batch, inputs) for name, batch in cases.items()}


def cache_codes(graph: Path) -> tuple[tuple[str, str], ...] | None:
    """The dtypes of a decoder's cache where they are codes, whose scales only the graph knows; None without a cache.

    Raises:
        BundleError: a cache of fp8, which ONNX Runtime has no code for: nothing here gives its golden outputs.
    """
    pasts = {name: port.dtype for name, port in graph_ports(graph)[0].items() if is_past(name)}
    if FP8 in pasts.values():
        raise BundleError(
            "the keys and values of this run are stored in fp8, which ONNX Runtime cannot join",
            expected="a cache whose golden outputs can be made on this machine",
            fix="set kv: int8 in quantize, or leave kv out, and run headwise compress again",
        )
    return tuple((name, dtype) for name, dtype in pasts.items() if dtype in _CODES) if pasts else None


def golden_step(graph: Path, first: Arrays) -> dict[str, Array] | None:
    """The last token of rows without padding, behind the cache of the others; None for rows of one token.

    Args:
        graph: a decoder with a cache, which it computes itself; runs on ONNX Runtime.
        first: inputs of a first call.
    """
    tokens = int(first[MASK].sum(axis=1).min())
    if tokens < 2:
        return None
    session = OrtSession(graph, threads=1)
    inputs = graph_inputs(graph)
    whole = {name: first[name][:, :tokens] for name in (IDS, MASK)}
    before = {name: array[:, : tokens - 1] for name, array in whole.items()}
    cached = session.run(_feed(session, first_call(before, inputs)))
    past = {next_past(name): array for name, array in cached.items() if is_present(name)}
    return {**first_call({IDS: whole[IDS][:, -1:], MASK: whole[MASK]}, inputs), **past}


def golden_outputs(graph: Path, cases: Mapping[str, Arrays]) -> Cases:
    """What a graph gives on ONNX Runtime, half precision as float32."""
    session = OrtSession(graph, threads=1)
    return {case: session.run(_feed(session, inputs)) for case, inputs in cases.items()}


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write named arrays to an npz file in a folder that need not be there."""
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _feed(session: OrtSession, inputs: Arrays) -> dict[str, Array]:
    return {name: store(inputs[name], port.dtype) for name, port in session.inputs.items()}


def _padded(examples: Examples, rows: list[Any], least: int) -> dict[str, Array]:
    """A batch as the task makes it; rows are repeated where an engine takes no smaller batch."""
    batch = next(replace(examples, rows=tuple(rows), per_sample=1, labels={}).batches(len(rows))).inputs
    have = len(next(iter(batch.values())))
    index = np.arange(max(have, least)) % have
    return {name: array[index] for name, array in batch.items()}


def _prefix(row: Arrays) -> dict[str, Array]:
    return {name: array[:_TOKENS] if array.ndim else array for name, array in row.items()}


def _size(row: Arrays) -> int:
    return sum(array.size for array in row.values())


def _takes(profiles: Profiles, row: Arrays) -> bool:
    shapes = ((profiles[name], array.shape) for name, array in row.items() if name in profiles)
    return all(
        low <= size <= high
        for sizes, shape in shapes
        for low, size, high in zip(sizes["min"][1:], shape, sizes["max"][1:], strict=True)
    )


def _batch_range(profiles: Profiles) -> tuple[int, int]:
    """Fewest and most rows that an engine takes."""
    sizes = [(int(shapes["min"][0]), int(shapes["max"][0])) for shapes in profiles.values()]
    return (max(low for low, _ in sizes), min(high for _, high in sizes)) if sizes else (1, 1 << 30)
