"""What calibration sees of activation tensors: ranges, channels, and a sample of tokens.

Shape letters: B batch rows, T tokens, K channels of a tensor, R tokens in a sample.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headwise.artifacts import write_atomic
from headwise.calibration.histogram import Histogram
from headwise.calibration.tasks import Batch, Examples
from headwise.errors import DataError, StorageError

Array = NDArray[Any]
Progress = Callable[[int], None]

_SHIFT = np.uint64(20)
_INTERVAL = 30.0
"""Seconds between two writes of what was seen so far, at least."""
_SHARE = 10
"""They are also this many times as long as a write takes."""
_STATE = ("largest", "magnitude", "rows", "keys", "square")


class RunTaps(Protocol):
    """Runs a batch and returns activation tensors by name."""

    def __call__(self, batch: Mapping[str, Array], /) -> Mapping[str, Array]:
        """Run one batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """An activation tensor to look at, channels on its last axis.

    Attributes:
        name: of the tensor.
        dims: names or sizes of its axes; ``batch`` and ``sequence`` say where padding can be.
        heads: the axes are (B, N, T, H), and the channels are those of all heads side by side.
    """

    name: str
    dims: tuple[int | str, ...]
    heads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """One activation tensor over all calibration tokens.

    Attributes:
        tokens: how many were seen.
        largest: (K,) largest magnitude of every channel.
        magnitude: (K,) mean magnitude.
        histogram: of the magnitudes of the whole tensor.
        rows: (R, K) float32, a sample of tokens that does not depend on how they were batched.
        moment: (K, K) float32 mean of ``x x^T``; None where nobody asked.
    """

    tokens: int
    largest: Array
    magnitude: Array
    histogram: Histogram
    rows: Array
    moment: Array | None


def collect_ranges(
    run: RunTaps,
    examples: Examples,
    taps: Sequence[Tap],
    *,
    rows: int = 1024,
    moments: Collection[str] = (),
    padding: bool = False,
    batch_size: int = 32,
    progress: Progress | None = None,
    partial: Path | None = None,
) -> dict[str, Observed]:
    """Run the calibration samples once and look at every tap.

    Args:
        run: the model.
        examples: calibration samples.
        taps: the tensors.
        rows: tokens of each tensor to keep.
        moments: taps whose second moment is wanted.
        padding: count padding as well: a range that is taken anew in every call is one of everything in the batch.
        batch_size: samples per batch; without padding results do not depend on it beyond the rounding of
            ``magnitude`` and ``moment``.
        progress: called with the number of samples of every finished batch.
        partial: file that holds what was seen so far, written twice a minute at most. A run that was killed goes on
            behind it, and sees what it would have seen. Its name has to stand for all other arguments.

    Raises:
        DataError: an activation is not finite.
        StorageError: ``partial`` is damaged, or cannot be written.
    """
    sums = {tap.name: _Sums(tap, rows, moment=tap.name in moments) for tap in taps}
    done = _resume(partial, sums) if partial is not None and partial.exists() else 0
    due = time.monotonic() + _INTERVAL
    for number, batch in enumerate(examples.batches(batch_size)):
        if number < done:
            if progress is not None:
                progress(len(batch.samples))
            continue
        found = run(batch.inputs)
        for name, total in sums.items():
            tokens, keys = _tokens(found[name], total.tap, batch, padding=padding)
            if not np.isfinite(tokens).all():
                raise DataError(
                    f"the activation {name} is not finite on the calibration samples",
                    expected="finite activations on every calibration sample",
                    fix="look for broken samples in the calibration data, or for a model that overflows",
                )
            total.add(tokens, keys)
        if progress is not None:
            progress(len(batch.samples))
        if partial is not None and (now := time.monotonic()) > due:
            _keep(partial, sums, number + 1)
            due = time.monotonic() + max(_INTERVAL, _SHARE * (time.monotonic() - now))
    if partial is not None:
        partial.unlink(missing_ok=True)
    return {name: total.result() for name, total in sums.items()}


@dataclass(slots=True)
class _Sums:
    """Running sums of one tap."""

    tap: Tap
    keep: int
    moment: bool
    tokens: int = 0
    largest: Array = field(default_factory=lambda: np.zeros(1, np.float32))
    magnitude: Array = field(default_factory=lambda: np.zeros(1))
    histogram: Histogram = field(default_factory=Histogram)
    rows: Array | None = None
    keys: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    square: Array = field(default_factory=lambda: np.zeros((1, 1)))

    def add(self, tokens: Array, keys: Array) -> None:
        magnitudes = np.abs(tokens)
        self.tokens += len(tokens)
        self.largest = np.maximum(self.largest, magnitudes.max(axis=0, initial=0.0))
        self.magnitude = self.magnitude + magnitudes.sum(axis=0, dtype=np.float64)
        self.histogram.add(magnitudes)
        if self.moment:
            self.square = self.square + (tokens.T @ tokens).astype(np.float64)
        rows = tokens if self.rows is None else np.concatenate([self.rows, tokens])
        keys = np.concatenate([self.keys, keys])
        kept = np.sort(np.argsort(keys, kind="stable")[: self.keep])
        self.rows, self.keys = rows[kept], keys[kept]

    def result(self) -> Observed:
        assert self.rows is not None, "there is at least one batch"
        return Observed(
            tokens=self.tokens,
            largest=self.largest,
            magnitude=self.magnitude / self.tokens,
            histogram=self.histogram,
            rows=self.rows[np.argsort(self.keys, kind="stable")],
            moment=(self.square / self.tokens).astype(np.float32) if self.moment else None,
        )


def _keep(path: Path, sums: Mapping[str, _Sums], done: int) -> None:
    """Write the sums of the first ``done`` batches."""
    arrays: dict[str, Array] = {"done": np.array(done)}
    for index, total in enumerate(sums.values()):
        histogram = total.histogram
        numbers = np.array([total.tokens, histogram.exponent, histogram.largest])
        state = {name: getattr(total, name) for name in _STATE}
        fields = {**state, "counts": histogram.counts, "numbers": numbers}
        arrays |= {f"{index}.{name}": values for name, values in fields.items() if values is not None}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def _resume(path: Path, sums: Mapping[str, _Sums]) -> int:
    """Fill the sums with what ``_keep`` wrote; the number of batches that they are of."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            for index, total in enumerate(sums.values()):
                for name in _STATE:
                    setattr(total, name, stored[f"{index}.{name}"])
                tokens, exponent, largest = stored[f"{index}.numbers"].tolist()
                total.tokens = int(tokens)
                total.histogram = Histogram(int(exponent), stored[f"{index}.counts"], largest)
            return int(stored["done"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise _damaged(path, error) from error


def pooled(seen: Sequence[Observed]) -> Observed:
    """Several tensors of one width as one: as many sampled tokens as each has, from all of them."""
    if len(seen) == 1:
        return seen[0]
    shares = np.array([observed.tokens for observed in seen]) / sum(observed.tokens for observed in seen)
    histogram = Histogram()
    for observed in seen:
        histogram.merge(observed.histogram)
    moments = [observed.moment for observed in seen if observed.moment is not None]
    return Observed(
        tokens=sum(observed.tokens for observed in seen),
        largest=np.max([observed.largest for observed in seen], axis=0),
        magnitude=np.tensordot(shares, [observed.magnitude for observed in seen], axes=1),
        histogram=histogram,
        rows=np.concatenate([observed.rows[index :: len(seen)] for index, observed in enumerate(seen)]),
        moment=np.tensordot(shares, moments, axes=1) if len(moments) == len(seen) else None,
    )


def _tokens(array: Array, tap: Tap, batch: Batch, *, padding: bool) -> tuple[Array, Array]:
    """(n, K) float32 tokens, and for each a pseudo-random key that only depends on its sample and position."""
    values = np.asarray(array, np.float32)
    if tap.heads:
        values = values.swapaxes(1, 2).reshape(values.shape[0], values.shape[2], -1)
    width, lead = values.shape[-1], values.shape[:-1]
    row = (batch.samples[:, None] * batch.per_sample + np.arange(batch.per_sample)).ravel()
    mask = None if padding else batch.valid()
    swapped = tap.dims[:2] == ("sequence", "batch")
    if mask is not None and swapped and lead == mask.shape[::-1]:
        values, lead = values.swapaxes(0, 1), mask.shape
    if mask is not None and (lead == mask.shape or lead == (mask.size,)):
        position = np.cumsum(mask, axis=1) - 1
        key = (row[:, None].astype(np.uint64) << _SHIFT) + position.astype(np.uint64)
        return values.reshape(-1, width)[mask.ravel()], _scramble(key[mask])
    flat = values.reshape(-1, width)
    per_row = max(1, len(flat) // len(row))
    index = np.arange(len(flat))
    key = (row[np.minimum(index // per_row, len(row) - 1)].astype(np.uint64) << _SHIFT) + (index % per_row).astype(
        np.uint64
    )
    return flat, _scramble(key)


def _scramble(keys: Array) -> Array:
    """SplitMix64: neighbours become unrelated numbers, the same ones on every machine."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def save_ranges(ranges: Mapping[str, Observed], path: Path) -> None:
    """Write what was observed as npz.

    Raises:
        StorageError: the file cannot be written.
    """
    about = []
    arrays: dict[str, Array] = {}
    for index, (name, seen) in enumerate(ranges.items()):
        histogram = seen.histogram
        about.append({"name": name, "tokens": seen.tokens, "exponent": histogram.exponent, "top": histogram.largest})
        fields = {"largest": seen.largest, "magnitude": seen.magnitude, "rows": seen.rows, "counts": histogram.counts}
        arrays |= {f"{index}.{key}": values for key, values in fields.items()}
        if seen.moment is not None:
            arrays[f"{index}.moment"] = seen.moment
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)
    write_atomic(path, buffer.getvalue())


def load_ranges(path: Path) -> dict[str, Observed]:
    """Read what ``save_ranges`` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            return {
                entry["name"]: Observed(
                    tokens=entry["tokens"],
                    histogram=Histogram(entry["exponent"], stored[f"{index}.counts"], entry["top"]),
                    largest=stored[f"{index}.largest"],
                    magnitude=stored[f"{index}.magnitude"],
                    rows=stored[f"{index}.rows"],
                    moment=stored[f"{index}.moment"] if f"{index}.moment" in stored.files else None,
                )
                for index, entry in enumerate(about)
            }
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be read: {error}",
        expected="ranges that headwise wrote",
        fix="delete the file and run the same command again",
    )
