"""A bundle on disk: what its manifest says, and what was added to it on this device."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwise.artifacts import MANIFEST, digest_json, write_atomic
from headwise.device.arrays import Array, Arrays, Port, store
from headwise.device.builder import Profiles
from headwise.device.runtimes import ORT
from headwise.errors import BundleError, did_you_mean

SCHEMA = "headwise.bundle/1"
LOCAL = "local.json"
"""Beside the manifest: engines that were built and fingerprints that were taken on this device."""
ONNX = "onnx"
"""Name of the artifact that runs on ONNX Runtime."""
SINGLE = "-decode"
"""Ends the name of what takes the calls with one token per row."""
CACHE = "present."
"""Begins the names of what a decoder caches."""
ARCHIVE = "headwise-verify.pyz"
SEAL = "sha256"
"""Key of the manifest's own digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An engine or a graph of a bundle.

    Attributes:
        name: ``onnx``, or that of the engine's target.
        file: relative to the bundle; ``files`` are all that it needs, itself included.
        runtime: ``onnxruntime``, ``tensorrt-rtx`` or ``tensorrt``.
        version: of the runtime that it was built with, or that its golden outputs were made with.
        precision: ``fp32``, ``fp16`` or ``bf16``, and what is quantized beside it: ``fp16+int8``.
        inputs, outputs: name -> dtype and dims.
        golden: case -> file of its golden outputs.
        tolerance: output -> largest difference, relative to the output's largest golden value.
        profiles: sets of shapes of an engine.
        sm: compute capability that an engine was built for; 0 where there is none.
        workspace_mb: limit of the builder's scratch memory in MiB.
        stage: the stage of the report that it came from.
        single: whether it takes the calls with one token per row only, and another artifact the prompts.
    """

    name: str
    file: str
    files: tuple[str, ...]
    runtime: str
    version: str
    precision: str
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    golden: Mapping[str, str]
    tolerance: Mapping[str, float]
    profiles: Sequence[Profiles] = ()
    sm: int = 0
    workspace_mb: int | None = None
    stage: str = ""
    single: bool = False

    @property
    def is_engine(self) -> bool:
        """Whether a GPU runs it."""
        return self.runtime != ORT

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Artifact:
        """The other way round."""
        plain = dict(values)
        for side in ("inputs", "outputs"):
            plain[side] = {name: Port(dtype, tuple(dims)) for name, (dtype, dims) in plain[side].items()}
        return cls(**{**plain, "files": tuple(plain["files"]), "profiles": tuple(plain["profiles"])})

    def to_json(self) -> dict[str, Any]:
        """Plain types, for the manifest."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A folder with a manifest.

    Attributes:
        folder: where it lies.
        name: of the model.
        artifacts: what can be run, those built on this device included.
        sources: the graphs that engines are built from: none where the run had no engines, two where single tokens have
            one of their own.
        cases: case -> file of its golden inputs.
        files: relative path -> ``sha256`` and ``bytes``.
        fingerprints: see ``SelfTest``.
        local: what was added on this device: ``files``, ``artifacts`` and ``fingerprints``.
    """

    folder: Path
    name: str
    artifacts: tuple[Artifact, ...]
    sources: tuple[Artifact, ...]
    cases: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    fingerprints: Sequence[Mapping[str, Any]]
    local: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest, and what was added on this device.

        Raises:
            BundleError: the folder has no manifest of a bundle, one that cannot be read, or one that was changed.
        """
        manifest, local = _read(folder / MANIFEST), _read_local(folder / LOCAL)
        if manifest.get(SEAL) != manifest_digest(manifest):
            raise _unreadable(folder / MANIFEST, "was changed since the bundle was made")
        try:
            return cls(
                folder=folder,
                name=manifest["name"],
                artifacts=tuple(map(Artifact.from_json, [*manifest["artifacts"], *local["artifacts"]])),
                sources=tuple(map(Artifact.from_json, manifest["sources"])),
                cases=manifest["cases"],
                files={**manifest["files"], **local["files"]},
                fingerprints=[*manifest["fingerprints"], *local["fingerprints"]],
                local=local,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(folder / MANIFEST, f"lacks or cannot use {error}") from error

    @property
    def engines(self) -> tuple[Artifact, ...]:
        """The artifacts for a GPU."""
        return tuple(artifact for artifact in self.artifacts if artifact.is_engine)

    def artifact(self, name: str) -> Artifact:
        """The artifact with this name.

        Raises:
            BundleError: there is none.
        """
        for artifact in self.artifacts:
            if artifact.name == name:
                return artifact
        names = [artifact.name for artifact in self.artifacts]
        raise BundleError(
            f'the bundle has no engine "{name}"', expected="one of: " + ", ".join(names), fix=did_you_mean(name, names)
        )

    def with_single(self, artifact: Artifact) -> tuple[Artifact, ...]:
        """An artifact, and the one that takes its calls with one token per row."""
        single = [other for other in self.artifacts if other.single and other.name == artifact.name + SINGLE]
        return (artifact, *single)

    def feeds(self, artifact: Artifact) -> dict[str, dict[str, Array]]:
        """Case -> its golden inputs, with the bits that the artifact takes."""
        return {
            case: {name: store(found[name], port.dtype) for name, port in artifact.inputs.items()}
            for case, found in ((case, self._arrays(self.cases[case])) for case in artifact.golden)
        }

    def golden(self, artifact: Artifact) -> dict[str, Arrays]:
        """Case -> the outputs that the artifact has to give, half precision as float32."""
        return {case: self._arrays(file) for case, file in artifact.golden.items()}

    def _arrays(self, file: str) -> dict[str, Array]:
        try:
            with np.load(self.folder / file, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BundleError(
                f"{file} cannot be read: {error}",
                expected="an npz file with golden arrays",
                fix="copy the bundle again; verify names every file that is damaged",
            ) from error

    def write_local(self) -> None:
        """Write what was added on this device.

        Raises:
            StorageError: the bundle cannot be written to.
        """
        write_atomic(self.folder / LOCAL, json.dumps({**self.local, "schema": SCHEMA}, indent=2) + "\n")


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its seal: nothing else in a bundle has the hash of that file."""
    return digest_json(json.loads(json.dumps({key: value for key, value in manifest.items() if key != SEAL})))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"{path.parent} has no {path.name}",
            expected="a folder that headwise bundle wrote",
            fix="name that folder; the folder of a run becomes one with headwise bundle RUN --out BUNDLE",
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"cannot be read: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise _unreadable(path, f'has the schema "{schema}"')
    assert isinstance(found, dict)
    return found


def _read_local(path: Path) -> dict[str, Any]:
    nothing: dict[str, Any] = {"files": {}, "artifacts": [], "fingerprints": []}
    if not path.exists():
        return nothing
    found = _read(path)
    lacking = [key for key, empty in nothing.items() if not isinstance(found.get(key), type(empty))]
    if lacking:
        raise _unreadable(path, f"lacks {', '.join(lacking)}")
    return found


def _unreadable(path: Path, why: str) -> BundleError:
    fix = "copy the bundle again, or use the headwise-verify.pyz that lies in it"
    if path.name == LOCAL:
        fix = "delete it: it holds only what was added on this device, engines built here and fingerprints taken here"
    return BundleError(f"{path} {why}", expected=f'a file of a bundle with the schema "{SCHEMA}"', fix=fix)
