"""One reader per file format. A reader only finds columns; what they mean is decided by who asks for them."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headwise.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from headwise.calibration.data import DataSpec

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
    ".txt": "text",
    ".text": "text",
}
_OPTIONS = {
    "csv": {"delimiter", "header", "quoting", "encoding"},
    "tsv": {"delimiter", "header", "quoting", "encoding"},
    "jsonl": {"encoding"},
    "text": {"separator", "pattern", "encoding"},
    "idx": {"labels"},
    "hub": {"subset", "split"},
}
_ALWAYS = {"path", "hub", "format", "columns", "limit"}
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}

Values = Sequence[Any] | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a file holds: column names, and the values of a column by its index."""

    names: tuple[str, ...]
    column: Callable[[int], Values]
    source: str

    @classmethod
    def of(cls, columns: Mapping[str, Values], source: str) -> Frame:
        """A frame over columns that are in memory."""
        values = list(columns.values())
        return cls(names=tuple(columns), column=values.__getitem__, source=source)


def read_file(spec: DataSpec) -> Frame:
    """Open ``spec.path`` in its format.

    Raises:
        DataError: no such file, an unknown format, an option that the format does not have, or unreadable content.
    """
    path = Path(spec.path or "")
    if not path.exists():
        raise DataError(f"{path} does not exist", expected="a data file or folder", fix="check data.path in the recipe")
    kind = spec.format or _kind(path)
    _refuse_unused(spec, kind)
    try:
        return _READERS[kind](path, spec)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not {error.encoding}: byte {error.object[error.start]:#x} at {error.start}",
            expected="text in the encoding that the recipe names",
            fix="set encoding, for example encoding: latin-1",
        ) from error
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {kind} files needs a package that is not installed: {error}",
            expected="pyarrow for parquet, Pillow for images",
            fix="install it with pip",
        ) from error
    except (OSError, ValueError, csv.Error, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path.name} cannot be read as {kind}: {error}",
            expected=f"a readable {kind} file",
            fix="set format if the suffix is misleading, or write the file again",
        ) from error


def read_hub(spec: DataSpec) -> Frame:
    """Load a split of a hub data set with the package ``datasets``.

    Raises:
        MissingDependencyError: ``datasets`` is not installed.
        DataError: the hub does not have it.
    """
    _refuse_unused(spec, "hub")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            f"data from the hub ({spec.hub}) need the package datasets",
            expected="an installed datasets",
            fix="pip install datasets, or download the data and set path",
        ) from error
    try:
        data = datasets.load_dataset(spec.hub, spec.subset, split=spec.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the hub has no {spec.hub}, {spec.split}: {error}",
            expected="a public data set with that subset and split",
            fix="check hub, subset and split, and that the network is there",
        ) from error
    names = tuple(data.column_names)
    return Frame(
        names=names, column=lambda index: _images_as_arrays(data[names[index]]), source=f"{spec.hub}:{spec.split}"
    )


def _kind(path: Path) -> str:
    if path.is_dir():
        return "images"
    name = path.name.removesuffix(".gz")
    kind = "idx" if re.search(r"[-.]idx\d", name) else _SUFFIXES.get(Path(name).suffix)
    if kind is None:
        raise DataError(
            f"{path.name} has an unknown suffix",
            expected="one of " + ", ".join(_SUFFIXES) + ", an idx file, or a folder of images",
            fix="set format in the recipe's data section",
        )
    return kind


def _refuse_unused(spec: DataSpec, kind: str) -> None:
    defaults = {name: field.get_default(call_default_factory=True) for name, field in type(spec).model_fields.items()}
    given = {name for name, default in defaults.items() if getattr(spec, name) != default}
    unused = sorted(given - _ALWAYS - _OPTIONS.get(kind, set()))
    if unused:
        raise DataError(
            f"{', '.join(unused)} has no meaning for data of the kind {kind}",
            expected="only options of this kind: " + (", ".join(sorted(_OPTIONS.get(kind, set()))) or "none"),
            fix="remove it, or set format",
        )


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def _text(path: Path, spec: DataSpec) -> str:
    return _bytes(path).decode(spec.encoding)


def _lines(text: str) -> list[str]:
    """Lines as files have them; ``str.splitlines`` also splits at characters that occur inside of documents."""
    return text.replace("\r\n", "\n").split("\n")


def _read_csv(path: Path, spec: DataSpec) -> Frame:
    tab = spec.format == "tsv" or path.name.removesuffix(".gz").endswith(".tsv")
    delimiter = spec.delimiter or ("\t" if tab else ",")
    quoted = delimiter != "\t" if spec.quoting is None else spec.quoting
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        io.StringIO(_text(path, spec), newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    lines = [(reader.line_num, row) for row in reader if row]
    header = lines.pop(0)[1] if spec.header and lines else None
    names = tuple(header if header is not None else map(str, range(max((len(row) for _, row in lines), default=0))))

    def column(index: int) -> list[str]:
        for line, row in lines:
            if index >= len(row):
                raise DataError(
                    f"{path.name}, line {line} has {len(row)} fields",
                    expected=f"at least {index + 1}, because column {index} is used",
                    fix="check delimiter and quoting, or repair that line",
                )
        return [row[index] for _, row in lines]

    return Frame(names=names, column=column, source=path.name)


def _read_jsonl(path: Path, spec: DataSpec) -> Frame:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(_text(path, spec)), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Frame.of({name: [row.get(name) for row in rows] for name in names}, path.name)


def _read_parquet(path: Path, _: DataSpec) -> Frame:
    frame = pd.read_parquet(path)
    return Frame.of({str(name): _images_as_arrays(frame[name].tolist()) for name in frame.columns}, path.name)


def _read_npz(path: Path, _: DataSpec) -> Frame:
    with np.load(path, allow_pickle=False) as arrays:
        return Frame.of({name: arrays[name] for name in arrays.files}, path.name)


def _read_idx(path: Path, spec: DataSpec) -> Frame:
    columns: dict[str, Values] = {"image": _idx_array(path)}
    if spec.labels is not None:
        labels = Path(spec.labels)
        if not labels.exists():
            raise DataError(f"{labels} does not exist", expected="an idx label file", fix="check data.labels")
        columns["label"] = _idx_array(labels)
    return Frame.of(columns, path.name)


def _idx_array(path: Path) -> NDArray[Any]:
    """The array of an idx file: two zero bytes, dtype code, number of axes, their sizes, the values; big-endian."""
    raw = _bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        raise ValueError(f"{path.name} does not start with an idx header")
    axes = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=axes, offset=4))
    dtype = np.dtype(_IDX_TYPES[raw[2]])
    values = np.frombuffer(raw, dtype, offset=4 + 4 * axes)
    if len(values) != math.prod(shape):
        raise ValueError(f"{path.name} says {shape} but holds {len(values)} values")
    return values.reshape(shape).astype(dtype.newbyteorder("="))


def _read_text(path: Path, spec: DataSpec) -> Frame:
    text = _text(path, spec)
    pieces = _lines(text) if spec.separator is None else text.split(spec.separator)
    documents = [piece.strip() for piece in pieces if piece.strip()]
    if spec.pattern is None:
        return Frame.of({"text": documents}, path.name)
    pattern = re.compile(spec.pattern, re.DOTALL)
    matches = [(document, pattern.fullmatch(document)) for document in documents]
    strange = next((document for document, match in matches if match is None), None)
    if strange is not None:
        raise ValueError(f"the pattern does not match {strange[:60]!r}")
    return Frame.of({n: [m[n] for _, m in matches if m is not None] for n in pattern.groupindex}, path.name)


def _read_images(path: Path, _: DataSpec) -> Frame:
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)

    def column(index: int) -> Values:
        if index == 1:
            return [file.relative_to(path).parts[0] for file in files]
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]

    labelled = bool(files) and all(len(file.relative_to(path).parts) > 1 for file in files)
    return Frame(names=("image", "label") if labelled else ("image",), column=column, source=path.name)


def _images_as_arrays(cells: Values) -> Values:
    """Decoded images in place of the hub's image cells ({"bytes", "path"}, or objects of Pillow)."""
    first = cells[0] if len(cells) else None
    if isinstance(first, dict) and isinstance(first.get("bytes"), bytes):
        from PIL import Image

        return [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]
    return [np.asarray(cell.convert("RGB")) for cell in cells] if hasattr(first, "convert") else cells


_READERS: dict[str, Callable[[Path, DataSpec], Frame]] = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "npz": _read_npz,
    "idx": _read_idx,
    "text": _read_text,
    "images": _read_images,
}
