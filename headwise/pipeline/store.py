"""The stage store of a run: an artifact is made once, and made again only when something that it depends on changed."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from headwise.artifacts import Artifact, Miss, building, digest_file, digest_json, find, seal
from headwise.errors import StorageError
from headwise.pipeline.monitor import Monitor
from headwise.version import __version__

Make = Callable[[Path], Mapping[str, Any]]
"""Fills an empty folder and returns what the manifest shall remember."""

_BACKENDS = {
    "torch": ("torch", "transformers"),
    "onnx": ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt-rtx", "tensorrt"),
}


class Store:
    """Artifacts below one folder.

    Attributes:
        folder: the run's folder.
        resume: False makes everything again.
    """

    def __init__(self, folder: Path, monitor: Monitor, *, resume: bool) -> None:
        self.folder = folder
        self.monitor = monitor
        self.resume = resume

    def get(self, name: str, kind: str, key: Mapping[str, Any], make: Make) -> tuple[Artifact, str]:
        """The artifact ``name``, and why it was made now; an empty reason when it was on disk.

        Args:
            name: folder name.
            kind: see ``Artifact``.
            key: everything that the result depends on; the version and the source of headwise are added.
            make: makes it.

        Raises:
            StorageError: it cannot be written, or not be read back.
        """
        folder, full = self.folder / name, self._full(key)
        found = find(folder, full) if self.resume else Miss(reason="--no-resume")
        if isinstance(found, Artifact):
            return found, ""
        if folder.exists():
            self.monitor.log(f"{name}: made again ({found.reason})")
        for leftover in self.folder.glob(f".{name}.*"):
            # Of a run that was killed while it wrote.
            shutil.rmtree(leftover, ignore_errors=True)
        with building(folder) as temporary:
            info = make(temporary)
            seal(temporary, kind=kind, key=full, info=info)
        made = find(folder, full)
        if isinstance(made, Miss):
            raise StorageError(
                f"{folder} cannot be read back: {made.reason}",
                expected="the artifact that was just written",
                fix="check the disk, and that no other run uses the same --out",
            )
        return made, found.reason

    def partial(self, name: str, key: Mapping[str, Any]) -> Path:
        """A file for what the artifact ``name`` is made of while it is being made; its name stands for the key."""
        path = self.folder / f"{name}.{digest_json(self._full(key))[:12]}.partial"
        if not self.resume:
            path.unlink(missing_ok=True)
        return path

    def _full(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return {**key, "headwise": f"{installed_version('headwise')} {source_digest()[:12]}"}


@cache
def source_digest() -> str:
    """Digest of headwise's own code: between two releases the version alone says nothing about it."""
    package = Path(__file__).parents[1]
    return digest_json({path.relative_to(package).as_posix(): digest_file(path) for path in package.rglob("*.py")})


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None; headwise's own is that of this code."""
    if package == "headwise":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(backend: str) -> dict[str, str | None]:
    """Versions of the libraries that a result of ``torch``, ``onnx``, ``onnxruntime`` or ``tensorrt`` depends on."""
    return {package: installed_version(package) for package in _BACKENDS[backend]}
