"""Artifacts on disk: content digests, atomic writes, and the stage store that makes a killed run resumable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import StorageError

MANIFEST = "manifest.json"


def digest_bytes(data: bytes) -> str:
    """sha256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of the canonical JSON form of ``value``."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode())


def digest_file(path: Path) -> str:
    """sha256 of a file's content, read in blocks."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def digest_tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below ``folder``, in sorted order, without the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in files}


def storage_error(error: OSError, path: Path) -> StorageError:
    """The reason an artifact could not be written, with what to do about it."""
    if error.errno == errno.ENOSPC:
        return StorageError(
            f"no space left on the device while writing {path}",
            expected="room for the artifact",
            fix="free some space and run the same command again: finished stages are kept",
        )
    return StorageError(
        f"cannot write {path}: {error.strerror or error}",
        expected="a writable folder",
        fix="name another place, or make this one writable; what was finished before is kept",
    )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it, so that no reader ever sees half of it.

    Raises:
        StorageError: the disk is full or the folder is not writable; nothing is left behind.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(error, path) from error


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder`` that takes its place when the block ends without an error.

    Raises:
        StorageError: writing failed; the previous content of ``folder`` is untouched.
    """
    try:
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One finished stage on disk.

    Attributes:
        kind: ``baseline``, ``pass``, ``onnx``, ``precision``, ``engine`` or ``measure``.
        path: the folder.
        digest: digest of all files in it.
        key: what went into the key, by name; the artifact is reused while all of it is unchanged.
        info: what the stage wants to remember beside its files.
    """

    kind: str
    path: Path
    digest: str
    key: Mapping[str, Any]
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why a stored artifact cannot be reused."""

    reason: str


def find(folder: Path, key: Mapping[str, Any]) -> Artifact | Miss:
    """The stored artifact of ``folder``, if it was made from exactly ``key`` and its files are whole."""
    stored = _manifest(folder)
    if isinstance(stored, Miss):
        return stored
    fresh, old = json.loads(json.dumps(key, default=str)), stored["key"]
    changed = sorted(name for name in {*old, *fresh} if old.get(name) != fresh.get(name))
    if changed:
        return Miss(reason="changed: " + ", ".join(changed))
    return _whole(folder, stored)


def reopen(folder: Path) -> Artifact | Miss:
    """The stored artifact of ``folder``, whatever it was made from, if its files are whole."""
    stored = _manifest(folder)
    return stored if isinstance(stored, Miss) else _whole(folder, stored)


def _manifest(folder: Path) -> dict[str, Any] | Miss:
    manifest = folder / MANIFEST
    if not manifest.exists():
        return Miss(reason="not there yet")
    try:
        stored = json.loads(manifest.read_text())
        return {name: stored[name] for name in ("kind", "files", "key", "info")}
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Miss(reason=f"its manifest cannot be read ({error})")


def _whole(folder: Path, stored: Mapping[str, Any]) -> Artifact | Miss:
    files = stored["files"]
    if digest_tree(folder) != files:
        return Miss(reason="its files were changed or damaged")
    return Artifact(kind=stored["kind"], path=folder, digest=digest_json(files), key=stored["key"], info=stored["info"])


def seal(folder: Path, *, kind: str, key: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose files are complete. Call it last, inside ``building``."""
    manifest = {"schema": 1, "kind": kind, "key": key, "info": info, "files": digest_tree(folder)}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True, default=str))
