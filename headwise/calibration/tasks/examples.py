"""Encoded samples, and their batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.errors import DataError
from headwise.model.forward import mask_name, real_tokens

Array = NDArray[Any]
Row = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Padded model inputs.

    Attributes:
        inputs: input name -> array with the rows on its first axis.
        samples: indices of the samples in their ``Examples``; row r belongs to ``samples[r // per_sample]``.
        per_sample: rows of one sample.
        facts: see ``Examples``.
    """

    inputs: dict[str, Array]
    samples: Array
    per_sample: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def valid(self, *, decoder: bool = True) -> Array | None:
        """(rows, tokens) bool, True at real tokens; None where nothing is padded.

        Where a model has an encoder and a decoder, of the decoder's tokens, which the outputs are about, or of the
        encoder's.
        """
        return real_tokens(self.inputs, decoder=decoder)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Samples as model inputs.

    Attributes:
        rows: model inputs of one row each, without a batch axis, not padded.
        per_sample: rows per sample, 2 for sentence pairs; those of sample i start at ``rows[i * per_sample]``.
        labels: output -> labels, samples first; empty when there are none.
        padding: input -> the value that fills it up.
        digest: sha256 of the rows, so that equal inputs are recognised whatever their labels.
        source: where they came from, for reports.
        facts: what encoding learned from the checkpoint and the labels, and reading the outputs needs.
    """

    rows: tuple[Row, ...]
    per_sample: int
    labels: Mapping[str, Array]
    padding: Mapping[str, float]
    digest: str
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        *,
        source: str,
        padding: Mapping[str, float] | None = None,
        per_sample: int = 1,
        labels: Mapping[str, Array] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Examples:
        """Examples with the digest of their rows.

        Raises:
            DataError: there is no row.
        """
        if not rows:
            raise DataError(
                f"{source} gives no samples",
                expected="at least one that the model can read",
                fix="check that the texts are not empty or too short",
            )
        digest = hashlib.sha256(b"".join(map(_row_key, rows))).hexdigest()
        return cls(
            rows=tuple(rows),
            per_sample=per_sample,
            labels=labels or {},
            padding=padding or {},
            digest=digest,
            source=source,
            facts=facts or {},
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows) // self.per_sample

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of up to ``size`` samples, longest first, padded to the longest row; the same order every time.

        Rows of different shapes only share a batch where the model gets a mask that says what is padding: of the
        encoder's inputs and of the decoder's, where it has both.
        """
        shapes = [tuple(_shapes(row) for row in self._sample(i)) for i in range(len(self))]
        order = sorted(range(len(self)), key=lambda i: (-_size(shapes[i]), shapes[i], i))
        for _, group in itertools.groupby(order, key=lambda i: tuple(map(_unmasked, self._sample(i)))):
            for chunk in _batched(group, size):
                yield self._batch(chunk)

    def unique_rows(self) -> tuple[Examples, Array]:
        """The distinct rows as samples of their own, and for every row the index of its twin among them."""
        first: dict[bytes, int] = {}
        index = np.array([first.setdefault(_row_key(row), len(first)) for row in self.rows])
        _, positions = np.unique(index, return_index=True)
        rows = tuple(self.rows[i] for i in positions)
        return replace(self, rows=rows, per_sample=1, labels={}), index

    def shared_with(self, other: Examples) -> int:
        """Number of samples that ``other`` has as well."""
        known = {other._key(i) for i in range(len(other))}
        return sum(self._key(i) in known for i in range(len(self)))

    def dynamic_axes(self) -> dict[str, tuple[int, ...]]:
        """Input -> axes that vary, counted with the batch axis 0 in front; token ids and masks vary along axis 1."""
        axes: dict[str, tuple[int, ...]] = {}
        for name, first in self.rows[0].items():
            shapes = {row[name].shape for row in self.rows}
            varying = {axis for axis, sizes in enumerate(zip(*shapes, strict=True), start=1) if len(set(sizes)) > 1}
            if first.ndim == 1 and name.endswith(("_ids", "_mask")):
                varying.add(1)
            axes[name] = (0, *sorted(varying))
        return axes

    def example_batch(self, size: int = 2) -> dict[str, Array]:
        """A real batch of ``size`` rows to trace a model with, the longest and the shortest row among them.

        Where there is a mask, some of the batch is padding: a graph traced without any may lose its mask.
        """
        order = sorted(range(len(self.rows)), key=lambda i: (-_length(self.rows[i]), i))
        order = [i for i in order if _unmasked(self.rows[i]) == _unmasked(self.rows[order[0]])]
        picked = [self.rows[order[round(i)]] for i in np.linspace(0, len(order) - 1, size)]
        for mask in _masks(self.rows[0]):
            tokens = {len(row[mask]) for row in picked}
            if len(tokens) == 1 and max(tokens) > 1 and all(_real(row, mask).all() for row in picked):
                picked[-1] = _shortened(picked[-1], mask)
        return self._pad(picked)

    def _sample(self, index: int) -> tuple[Row, ...]:
        return self.rows[index * self.per_sample : (index + 1) * self.per_sample]

    def _key(self, index: int) -> bytes:
        return b"".join(map(_row_key, self._sample(index)))

    def _batch(self, samples: Sequence[int]) -> Batch:
        rows = [row for i in samples for row in self._sample(i)]
        indices = np.asarray(samples, dtype=np.int64)
        return Batch(inputs=self._pad(rows), samples=indices, per_sample=self.per_sample, facts=self.facts)

    def _pad(self, rows: Sequence[Row]) -> dict[str, Array]:
        inputs: dict[str, Array] = {}
        for name, first in rows[0].items():
            shape = np.max([row[name].shape for row in rows], axis=0).astype(int) if first.ndim else ()
            filled = np.full((len(rows), *shape), self.padding.get(name, 0), dtype=first.dtype)
            for index, row in enumerate(rows):
                filled[index, ...][tuple(slice(size) for size in row[name].shape)] = row[name]
            inputs[name] = filled
        return inputs


def _real(row: Row, mask: str) -> Array:
    real: Array = row[mask] != 0 if mask.endswith("attention_mask") else row[mask] == 0
    return real


def _masks(row: Row) -> tuple[str, ...]:
    """The masks of a row, one per sequence."""
    names = (mask_name(row, decoder=decoder) for decoder in (False, True))
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _unmasked(row: Row) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Shapes of the inputs of which no mask says what is padding."""
    masked = {decoder: mask_name(row, decoder=decoder) is not None for decoder in (False, True)}
    return tuple((name, shape) for name, shape in _shapes(row) if not masked[name.startswith("decoder_")])


def _length(row: Row) -> int:
    """Real tokens of a row, and the number of elements of inputs without a mask."""
    return sum(int(_real(row, mask).sum()) for mask in _masks(row)) + _size((_unmasked(row),))


def _shapes(row: Row) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in row.items())


def _size(shapes: Sequence[tuple[tuple[str, tuple[int, ...]], ...]]) -> int:
    """The longest row's number of elements, which decides how far its batch is padded."""
    return max(sum(int(np.prod(shape)) for _, shape in row) for row in shapes)


def _shortened(row: Row, mask: str) -> Row:
    """The row without its last token but one, in every input that has one value per token of the mask's sequence.

    The last one may end the sequence, and some models look for it.
    """
    of_decoder = mask.startswith("decoder_")
    shorter = dict(row)
    for name, array in row.items():
        if array.ndim and len(array) == len(row[mask]) and name.startswith("decoder_") == of_decoder:
            shorter[name] = np.delete(array, -2, axis=0)
    return shorter


def _row_key(row: Row) -> bytes:
    sha = hashlib.sha256()
    for name in sorted(row):
        array = np.ascontiguousarray(row[name])
        sha.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
        sha.update(array.tobytes())
    return sha.digest()


def _batched(items: Iterator[int], size: int) -> Iterator[tuple[int, ...]]:
    """``itertools.batched`` of Python 3.12."""
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk
