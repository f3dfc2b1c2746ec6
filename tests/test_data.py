"""Reading data sets: every format, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from headwise.calibration.data import DataSpec, Table, load_table, sample
from headwise.errors import DataError, MissingDependencyError


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def idx(path: Path, array: np.ndarray, code: int) -> str:
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(array.dtype.newbyteorder(">")).tobytes()))
    return str(path)


def test_tab_files_are_unquoted_and_may_have_longer_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "sts.csv", 'g\t1.5\t"No, he said\tNo.\textra\textra\ng\t5\t\'a" b\tB\n')
    spec = DataSpec(path=path, delimiter="\t", header=False, columns={"first": 2, "second": 3, "score": 1})
    table = load_table(spec, ("first", "second", "score"))
    assert table.columns == {"first": ['"No, he said', "'a\" b"], "second": ["No.", "B"], "score": ["1.5", "5"]}
    assert len(table) == 2
    assert table.source == "sts.csv"


def test_comma_files_are_quoted_and_named_by_their_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufefftext,label\n"a, b\nc",1\n\nd,0\n')
    assert load_table(DataSpec(path=path)).columns == {"text": ["a, b\nc", "d"], "label": ["1", "0"]}
    renamed = load_table(DataSpec(path=path, columns={"label": "text"}), ("label",))
    assert renamed.columns == {"label": ["a, b\nc", "d"]}


def test_tsv_jsonl_and_parquet_give_the_same_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b\u2028c", "label": 0}]
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(lines).read_bytes()))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    tables = [load_table(DataSpec(path=str(path))) for path in (lines, packed, tmp_path / "a.parquet")]
    assert len({table.digest for table in tables}) == 1
    assert tables[0].columns["text"] == ["a", "b\u2028c"]
    assert tables[0].columns["label"].tolist() == [1, 0]  # type: ignore[union-attr]
    tsv = load_table(DataSpec(path=write(tmp_path / "a.tsv", "text\tlabel\na\t1\n")))
    assert tsv.columns == {"text": ["a"], "label": ["1"]}


def test_rows_of_different_shapes_stay_arrays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"ids": [1, 2]}\n{"ids": [3]}\n')
    ids = load_table(DataSpec(path=path)).columns["ids"]
    assert [row.tolist() for row in ids] == [[1, 2], [3]]  # type: ignore[union-attr]


def test_npz_and_its_limit(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(12.0).reshape(4, 3), y=np.arange(4))
    table = load_table(DataSpec(path=str(tmp_path / "a.npz"), limit=2))
    assert table.columns["x"].shape == (2, 3)  # type: ignore[union-attr]
    assert len(table) == 2


def test_idx_images_with_their_labels(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    path = idx(tmp_path / "t10k-images-idx3-ubyte.gz", images, 0x08)
    labels = idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([7, -2], dtype=np.int16), 0x0B)
    table = load_table(DataSpec(path=path, labels=labels), ("label",))
    assert np.array_equal(table.columns["image"], images)
    assert table.columns["label"].tolist() == [7, -2]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_table(DataSpec(path=path, labels="nowhere"))
    Path(path).write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"))
    with pytest.raises(DataError, match="holds 3 values"):
        load_table(DataSpec(path=path))


def test_text_by_line_by_separator_and_by_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo <end> three\n")
    assert load_table(DataSpec(path=path)).columns == {"text": ["one", "two <end> three"]}
    assert load_table(DataSpec(path=path, separator="<end>")).columns == {"text": ["one\ntwo", "three"]}
    labels = write(tmp_path / "trec.label", "NUM:dist How far?\nLOC:city Wh\u00f0re?\n", "latin-1")
    pattern = r"(?P<coarse>\w+):(?P<fine>\w+) (?P<text>.*)"
    table = load_table(DataSpec(path=labels, format="text", encoding="latin-1", pattern=pattern))
    assert table.columns == {"coarse": ["NUM", "LOC"], "fine": ["dist", "city"], "text": ["How far?", "Wh\u00f0re?"]}
    with pytest.raises(DataError, match="the pattern does not match 'one'"):
        load_table(DataSpec(path=path, pattern=pattern))
    with pytest.raises(DataError, match="set encoding"):
        load_table(DataSpec(path=labels, format="text"))


def test_a_folder_of_images_is_labelled_by_its_folders(tmp_path: Path) -> None:
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 2), value).save(tmp_path / name / "1.png")
    table = load_table(DataSpec(path=str(tmp_path)), ("image", "label"))
    assert table.columns["label"] == ["cat", "dog"]
    assert table.columns["image"].shape == (2, 2, 4, 3)  # type: ignore[union-attr]
    assert table.columns["image"][1].max() == 200  # type: ignore[union-attr]


def test_hub_data_need_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec(hub="org/name", subset="small", split="test", columns={"text": "sentence"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="need the package datasets"):
        load_table(spec)

    class Split(dict[str, list[Any]]):
        column_names = ("sentence", "image")

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str, *, split: str) -> Split:
        asked.append((name, subset, split))
        if split == "test":
            return Split(sentence=["a", "b"], image=[Image.new("RGB", (2, 2))] * 2)
        raise ValueError('Unknown split "tset"')

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_table(spec).columns == {"text": ["a", "b"]}
    assert asked == [("org/name", "small", "test")]
    whole = load_table(spec.model_copy(update={"columns": {}}))
    assert whole.columns["image"].shape == (2, 2, 2, 3)  # type: ignore[union-attr]
    with pytest.raises(DataError, match='Unknown split "tset"'):
        load_table(spec.model_copy(update={"split": "tset"}))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.csv", None, {}, "missing.csv does not exist"),
        ("empty.csv", "", {}, "empty.csv has no rows"),
        ("header.csv", "text,label\n", {}, "header.csv has no rows"),
        ("empty.jsonl", "\n", {}, "empty.jsonl has no rows"),
        (
            "a.csv",
            "text,label\na,1\n",
            {"columns": {"label": "lable"}},
            "no column 'lable'.*\n.*text, label\n.*\"label\"",
        ),
        ("a.csv", "a,b\n1,2\n", {"columns": {"label": 2}}, "no column 2 for the role"),
        ("a.csv", "a,b\n1,2\n3\n", {"columns": {"label": "b"}}, "line 3 has 1 fields"),
        ("a.jsonl", '{"x": 1}\n{"y": 2}\n', {"columns": {"label": "x"}}, "row 1 has no usable value"),
        ("a.jsonl", '{"label": 1}\n{"label": NaN}\n', {}, "row 1 has no usable value"),
        ("a.jsonl", "[1]\n", {}, "line 1 is not a JSON object"),
        ("a.jsonl", "{", {}, "cannot be read as jsonl"),
        ("a.npz", "no archive", {}, "cannot be read as npz"),
        ("a.parquet", "no parquet", {}, "cannot be read as parquet"),
        ("a.json", "{}", {}, "unknown suffix"),
        ("a.jsonl", "{}", {"delimiter": ";"}, "delimiter has no meaning for data of the kind jsonl"),
        ("a.csv", "a\n1\n", {"labels": "b"}, "labels has no meaning for data of the kind csv"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str | None, options: dict[str, Any], message: str) -> None:
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        load_table(DataSpec(path=str(path), **options), ("label",))


def test_nan_in_arrays_is_refused_with_its_row(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[0.0], [1.0], [np.nan]]))
    with pytest.raises(DataError, match="row 2 has no usable value"):
        load_table(DataSpec(path=str(tmp_path / "a.npz")))


def test_columns_of_different_lengths(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(2))
    with pytest.raises(DataError, match="x 3, y 2"):
        load_table(DataSpec(path=str(tmp_path / "a.npz")))


def test_one_source() -> None:
    with pytest.raises(ValidationError, match="either path"):
        DataSpec()
    with pytest.raises(ValidationError, match="either path"):
        DataSpec(path="a", hub="b")
    with pytest.raises(ValidationError, match="needs split"):
        DataSpec(hub="b")


def test_the_digest_follows_content_and_order() -> None:
    def digest(**columns: Any) -> str:
        return Table.of(columns, "x").digest

    base = digest(a=["x", "y"], b=np.array([1, 2]))
    assert base == digest(b=np.array([1, 2]), a=["x", "y"])
    assert len({base, digest(a=["y", "x"], b=np.array([1, 2])), digest(a=["xy", ""], b=np.array([1, 2]))}) == 3
    assert digest(a=np.array([1.0])) != digest(a=np.array([1.0], dtype=np.float32))


def test_select_and_sample() -> None:
    table = Table.of({"text": list("abcdef"), "x": np.arange(6)}, "x")
    picked = table.select([4, 0])
    assert picked.columns["text"] == ["e", "a"]
    assert picked.columns["x"].tolist() == [4, 0]  # type: ignore[union-attr]
    assert picked.digest != table.digest
    drawn = sample(table, 3, seed=1)
    assert len(drawn) == len(set(drawn.columns["text"])) == 3
    assert drawn.digest == sample(table, 3, seed=1).digest
    assert len({sample(table, 3, seed=seed).digest for seed in range(10)}) > 1
    assert sample(table, 6, seed=0) is table
