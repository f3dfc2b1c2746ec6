"""The stage store: atomic, resumable, and honest about why something is made again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from headwise.artifacts import Artifact, Miss, building, digest_json, find, seal, write_atomic
from headwise.errors import StorageError

KEY = {"parent": "abc", "ratio": 0.5}


def make(folder: Path, text: str = "content") -> None:
    with building(folder) as temporary:
        (temporary / "file.txt").write_text(text)
        seal(temporary, kind="pass", key=KEY, info={"note": 1})


def test_a_sealed_folder_is_found_again(tmp_path: Path) -> None:
    make(tmp_path / "stage")
    found = find(tmp_path / "stage", KEY)
    assert isinstance(found, Artifact)
    assert found.info == {"note": 1}
    assert found.kind == "pass"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ({**KEY, "ratio": 0.25}, "changed: ratio"),
        ({**KEY, "seed": 1}, "changed: seed"),
        ({"ratio": 0.5}, "changed: parent"),
        ({"parent": "x", "ratio": 0.25}, "changed: parent, ratio"),
    ],
)
def test_a_changed_key_is_named(key: dict[str, object], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "stage")
    assert find(tmp_path / "stage", key) == Miss(reason=reason)


def test_damage_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    assert find(folder, KEY) == Miss(reason="not there yet")
    make(folder)
    (folder / "file.txt").write_text("other")
    assert find(folder, KEY) == Miss(reason="its files were changed or damaged")
    (folder / "manifest.json").write_text("{")
    found = find(folder, KEY)
    assert isinstance(found, Miss)
    assert "manifest cannot be read" in found.reason


def test_a_failed_build_leaves_the_old_folder_and_no_rubbish(tmp_path: Path) -> None:
    make(tmp_path / "stage", "old")

    def half_way() -> None:
        with building(tmp_path / "stage") as temporary:
            (temporary / "file.txt").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert (tmp_path / "stage" / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_an_interrupted_build_leaves_no_rubbish(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "stage"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("headwise.artifacts.os.fsync", no_space)
    with pytest.raises(StorageError, match="no space left on the device"):
        write_atomic(tmp_path / "report.json", "{}")
    with pytest.raises(StorageError, match="finished stages are kept"):
        make(tmp_path / "stage")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        make(tmp_path / "file" / "stage")


def test_the_digest_of_json_ignores_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})
