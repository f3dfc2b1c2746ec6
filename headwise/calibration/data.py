"""Data sets from files or the hub: named columns of equal length with a digest of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from headwise.calibration.readers import Frame, read_file, read_hub
from headwise.errors import DataError, did_you_mean
from headwise.spec import Spec

Column = NDArray[Any] | list[str]


class DataSpec(Spec):
    """Where samples come from, and which of their columns play which role."""

    path: str | None = None
    """File or folder, relative to the recipe."""
    hub: str | None = None
    """Id of a data set on the Hugging Face hub, instead of ``path``; needs the package ``datasets``."""
    subset: str | None = None
    """Configuration of the hub data set."""
    split: str | None = None
    """Split of the hub data set, such as ``test``."""
    format: Literal["csv", "tsv", "jsonl", "parquet", "npz", "idx", "text", "images"] | None = None
    """Format of ``path``; by default the suffix decides, and a trailing ``.gz`` is looked through."""
    columns: dict[str, str | int] = Field(default_factory=dict)
    """Role -> column name or index from 0. Without it, every column of the file is a role of its own name."""
    delimiter: str | None = None
    """csv: the character between two fields; a comma, and a tab for ``tsv``, by default."""
    header: bool = True
    """csv and tsv: whether the first line names the columns."""
    quoting: bool | None = None
    """csv and tsv: whether ``"`` encloses fields; by default only where the delimiter is not a tab."""
    encoding: str = "utf-8-sig"
    """Encoding of text files; the default is UTF-8 with or without a byte order mark."""
    labels: str | None = None
    """idx: the label file that belongs to the image file in ``path``."""
    separator: str | None = None
    """text: what stands between two documents; each line is a document by default."""
    pattern: str | None = None
    """text: regular expression that every document matches; its named groups become the columns."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows, this many."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path (a file) or hub (a data set id)")
        if self.hub is not None and self.split is None:
            raise ValueError("a hub data set needs split, for example split: test")
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Columns of equal length.

    Attributes:
        columns: role -> values; text is a list of str, everything else an array with the rows on its first axis
            (an object array of arrays where rows differ in shape).
        digest: sha256 of the content of these columns, in order.
        source: where it came from, for reports.
    """

    columns: Mapping[str, Column]
    digest: str
    source: str

    @classmethod
    def of(cls, columns: Mapping[str, Column], source: str) -> Table:
        """A table with the digest of its columns.

        Raises:
            DataError: the columns differ in length, or there are no rows.
        """
        lengths = {role: len(values) for role, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{source}: columns of different lengths: " + ", ".join(f"{r} {n}" for r, n in lengths.items()),
                expected="one value per row in every column",
                fix="check that the files or arrays belong together",
            )
        if not any(lengths.values()):
            raise _empty(source)
        return cls(columns=columns, digest=_digest(columns), source=source)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def select(self, indices: Sequence[int] | NDArray[Any]) -> Table:
        """The rows of ``indices``, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        picked: dict[str, Column] = {
            role: [values[i] for i in rows] if isinstance(values, list) else values[rows]
            for role, values in self.columns.items()
        }
        return Table.of(picked, self.source)


def load_table(spec: DataSpec, roles: Sequence[str] = ()) -> Table:
    """Read the columns that a recipe names.

    Args:
        spec: the data section of a recipe, its paths absolute or relative to the working folder.
        roles: roles that must be there; one that ``spec.columns`` does not map is the column of the same name.

    Raises:
        DataError: a file or column is missing, the file is empty or unreadable, or a selected column has holes.
        MissingDependencyError: the format or the hub needs a package that is not installed.
    """
    frame = read_file(spec) if spec.path is not None else read_hub(spec)
    if not frame.names:
        raise _empty(frame.source)
    columns = dict(spec.columns) or {name: name for name in frame.names}
    columns |= {role: role for role in roles if role not in columns}
    picked = {role: frame.column(_index(frame, role, key))[: spec.limit] for role, key in columns.items()}
    return Table.of({role: _tidy(role, values, frame.source) for role, values in picked.items()}, frame.source)


def sample(table: Table, n: int, seed: int) -> Table:
    """``n`` random rows without replacement, in the table's order; the whole table where it has no more."""
    if n >= len(table):
        return table
    return table.select(np.sort(np.random.default_rng(seed).choice(len(table), size=n, replace=False)))


def _index(frame: Frame, role: str, key: str | int) -> int:
    if isinstance(key, int) and 0 <= key < len(frame.names):
        return key
    if isinstance(key, str) and key in frame.names:
        return frame.names.index(key)
    found = ", ".join(frame.names)
    raise DataError(
        f'{frame.source} has no column {key!r} for the role "{role}"',
        expected=f"one of its {len(frame.names)} columns: {found}",
        fix=did_you_mean(str(key), frame.names) + f"  Map it with columns: {{{role}: ...}}",
    )


def _tidy(role: str, values: Sequence[Any] | NDArray[Any], source: str) -> Column:
    """Text as a list, numbers as an array; nothing missing."""
    if not isinstance(values, np.ndarray) or values.dtype.kind in "OUS":
        cells = list(values)
        hole = next((row for row, cell in enumerate(cells) if _missing(cell)), None)
        if hole is not None:
            raise _hole(role, hole, source)
        if all(isinstance(cell, str) for cell in cells):
            return [str(cell) for cell in cells]
        values = _array(cells)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise _hole(role, int(np.argwhere(~np.isfinite(values))[0][0]), source)
    return values


def _empty(source: str) -> DataError:
    return DataError(f"{source} has no rows", expected="at least one row", fix="check the file and its format")


def _missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ == "NAType" or (isinstance(cell, float) and not np.isfinite(cell))


def _hole(role: str, row: int, source: str) -> DataError:
    return DataError(
        f'{source}: row {row} has no usable value in the column for "{role}" (missing, NaN or infinite)',
        expected="a value in every row",
        fix="remove or repair that row, or map another column",
    )


def _array(cells: list[Any]) -> NDArray[Any]:
    arrays = [np.asarray(cell) for cell in cells]
    if len({array.shape for array in arrays}) == 1 and arrays[0].dtype != object:
        return np.stack(arrays)
    ragged = np.empty(len(arrays), dtype=object)
    ragged[:] = arrays
    return ragged


def _digest(columns: Mapping[str, Column]) -> str:
    sha = hashlib.sha256()
    for role in sorted(columns):
        values = columns[role]
        sha.update(f"{role}\0{len(values)}\0".encode())
        cells: list[Any] = list(values) if isinstance(values, list) or values.dtype == object else [values]
        for cell in cells:
            raw = cell.encode(errors="surrogatepass") if isinstance(cell, str) else np.ascontiguousarray(cell).tobytes()
            shape = "str" if isinstance(cell, str) else f"{cell.dtype.str}{cell.shape}"
            sha.update(f"{shape}\0{len(raw)}\0".encode())
            sha.update(raw)
    return sha.hexdigest()
