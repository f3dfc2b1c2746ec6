"""Bundles of small runs, made once; their engines are graphs, which the GPU of ``fake_gpu`` runs."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import Driver, fake_device
from runs import plain_files, run, story_files

from headwise.artifacts import MANIFEST
from headwise.device.bundle import SEAL, Bundle, manifest_digest
from headwise.errors import MachineError
from headwise.export.tensorrt import EngineInfo
from headwise.pipeline import stages
from headwise.pipeline.bundle.make import make_bundle

TARGETS = "targets=[cpu, sm86, tensorrt/sm87]"
_FILES = {"plain": plain_files, "story": story_files}
_LIGHT = {"plain": (), "story": ("passes=[]",)}
_RUNS: dict[str, Path] = {}
_MADE: dict[str, Path] = {}


def with_engines(kind: str, base: Path) -> Path:
    """The folder of a run with an engine for sm86, and a target that only the device can build for."""
    if kind not in _RUNS:
        folder = _FILES[kind](base / f"{kind}-engines")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "build_engine", engine_of_graph)
            run(folder, TARGETS, *_LIGHT[kind])
        _RUNS[kind] = folder
    return _RUNS[kind]


def run_with_report(kind: str, base: Path, to: Path, **changes: Any) -> Path:
    """A copy of that run's folder whose report is changed: ``recipe__export={...}``."""
    out = Path(shutil.copytree(with_engines(kind, base) / "out", to / "run"))
    report = json.loads((out / "report.json").read_text())
    for path, value in changes.items():
        *outer, last = path.split("__")
        functools.reduce(operator.getitem, outer, report)[last] = value
    (out / "report.json").write_text(json.dumps(report))
    return out


def engine_of_graph(
    graph: Path, out: Path, target: Any, *, profiles: Any, decode: Any = None, **options: Any
) -> EngineInfo:
    """In the place of the builder: the graph itself."""
    if target.runtime == "tensorrt":
        raise MachineError("no GPU of sm87", expected="the device itself", fix="run this step on the device")
    out.write_bytes(graph.read_bytes())
    nothing = dict.fromkeys(("listing", "weights_bytes", "activation_bytes", "scratch_bytes"))
    facts = {"target": target.name, "sm": target.sm, "runtime": target.runtime, "version": "1.7"}
    size = out.stat().st_size
    return EngineInfo(**facts, bytes=size, seconds=0.1, profiles=profiles, decode=decode, **nothing)


def bundled(kind: str, base: Path) -> Path:
    """A bundle. Tests read it; those that change it take a copy."""
    if kind not in _MADE:
        folder = with_engines(kind, base)
        make_bundle(folder / "out", folder / "bundle", triton=True)
        _MADE[kind] = folder / "bundle"
    return _MADE[kind]


def copy_of(kind: str, base: Path, to: Path) -> Path:
    """A copy of that bundle."""
    return Path(shutil.copytree(bundled(kind, base), to / "bundle"))


def manifest(bundle: Path) -> dict[str, Any]:
    """The content of its manifest."""
    found: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return found


def write_manifest(bundle: Path, found: dict[str, Any]) -> None:
    """A changed manifest, as if it had been made like this."""
    (bundle / MANIFEST).write_text(json.dumps({**found, SEAL: manifest_digest(found)}))


def opened(bundle: Path) -> Bundle:
    """The bundle as the device reads it."""
    return Bundle.open(bundle)


def sm86(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """The GPU and the runtime that the engines of these bundles were built for."""
    fake_device(monkeypatch, driver=Driver(sm=86), **options)


def outcomes(checks: Sequence[Any]) -> dict[str, str]:
    """Name of a check -> its outcome; FAIL of several lines with one name."""
    found: dict[str, str] = {}
    for check in checks:
        found[check.name] = "FAIL" if found.get(check.name) == "FAIL" else check.outcome
    return found
