"""The graphs and engines of a finished run that go into a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.artifacts import Artifact, reopen
from headwise.errors import GateError, StorageError
from headwise.export.decoder import DECODE
from headwise.export.targets import CPU
from headwise.pipeline.graphs import GRAPH
from headwise.pipeline.report.summary import Report, Stage

_USED = ("passed", "warned", "not-run")
_GRAPHS = ("onnx", "precision", "quantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A graph of a run.

    Attributes:
        stage: its name in the report.
        path: the graph.
        runs: whether ONNX Runtime can run what it judges in its place; bf16 has no kernels for the CPU.
        precision: of everything that is not quantized.
        schemes: of what is quantized.
    """

    stage: str
    path: Path
    runs: bool
    precision: str
    schemes: tuple[str, ...]

    @property
    def single(self) -> Path | None:
        """The graph for calls with one token per row, where there is one."""
        path = self.path.with_name(DECODE)
        return path if path.exists() else None

    @property
    def label(self) -> str:
        """``fp16+int8``."""
        return "+".join([self.precision, *self.schemes])

    @property
    def arithmetic(self) -> str:
        """Which tolerance holds: ``codes`` where activations are quantized, else the precision."""
        plain = all(scheme.endswith(("-weights", "-table")) for scheme in self.schemes)
        return self.precision if plain else "codes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a bundle is made of.

    Attributes:
        onnx: runs on ONNX Runtime.
        source: engines are built from it; None where the run had no GPU among its targets.
        engines: stages of engines whose file is there.
        used: every stage whose result is in the bundle, or led there.
    """

    onnx: Part
    source: Part | None
    engines: tuple[tuple[Stage, Path], ...]
    used: tuple[Stage, ...]


def find_parts(folder: Path, report: Report) -> Parts:
    """Find them, and check that they are whole.

    Raises:
        GateError: the run did not pass, or did not get as far as a graph.
        StorageError: a file of the run was changed or is missing.
    """
    used = [stage for stage in report["stages"] if stage["status"] in _USED]
    _require_passed(report)
    graphs = [stage for stage in used if stage["kind"] in _GRAPHS]
    cpu = [stage for stage in used if stage["name"] == CPU and stage["status"] != "not-run"]
    exported = [stage for stage in graphs if stage["kind"] == "onnx"]
    gpus = [stage for stage in report["stages"] if stage["kind"] == "engine" and stage["name"] != CPU]
    return Parts(
        onnx=_part(folder, cpu or exported),
        source=_part(folder, graphs) if gpus else None,
        engines=tuple((stage, _whole(folder, stage).path) for stage in used if stage["engine"] is not None),
        used=tuple(used),
    )


def _require_passed(report: Report) -> None:
    """``not-run`` is a run whose engines could not be run where it was made."""
    if report.get("tiny"):
        raise GateError(
            "this is a tiny run, whose weights are random",
            expected="a run of the whole model",
            fix="run headwise compress without --tiny",
        )
    before = [stage for stage in report["stages"] if stage["kind"] != "engine"]
    complete = all(stage["status"] in (*_USED, "rolled-back") for stage in before)
    if report["outcome"] not in ("pass", "warn", "not-run") or not complete:
        raise GateError(
            f"the run ended with {report['outcome']}: {report['reason']}",
            expected="a run whose gates passed",
            fix="change the recipe or its limits, and run headwise compress again; the report names the stage",
        )


def _part(folder: Path, stages: list[Stage]) -> Part:
    """The graph of the last of these stages; those before it say what else it is."""
    last = stages[-1]
    made = _whole(folder, last)
    info: Mapping[str, Any] = made.info
    record = info.get("record", {})
    schemes = {row["scheme"] for row in record.get("matrices", ())} - {"float"}
    if record.get("kv"):
        schemes.add(f"{record['kv']['format']}-kv")
    precision = next((stage["name"] for stage in stages if stage["kind"] == "precision"), "fp32")
    return Part(
        stage=last["name"],
        path=made.path / GRAPH,
        runs=bool(info.get("runs_on_cpu", True)),
        precision=precision,
        schemes=tuple(sorted(schemes)),
    )


def _whole(folder: Path, stage: Stage) -> Artifact:
    found = reopen(folder / stage["folder"])
    if isinstance(found, Artifact):
        return found
    raise StorageError(
        f"the stage {stage['name']} of the run cannot be used: {found.reason}",
        expected="the files that the run wrote",
        fix="run headwise compress again: it makes the stage again and keeps the others",
    )
