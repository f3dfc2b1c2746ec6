"""``headwise bundle``: everything that the device needs of a finished run, in one folder."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.artifacts import MANIFEST, building, digest_file
from headwise.device.arrays import Port
from headwise.device.bundle import ARCHIVE, ONNX, SCHEMA, SEAL, SINGLE, Artifact, Bundle, manifest_digest
from headwise.device.checks import PASS
from headwise.device.fingerprints import take
from headwise.device.runtimes import ORT
from headwise.device.verify import Wanted, verify
from headwise.errors import BundleError, ExportError
from headwise.export.graph import copy_graph, graph_ports
from headwise.export.profiles import engine_shapes
from headwise.export.targets import resolve_target
from headwise.export.widen import widen
from headwise.model.checkpoint import load_checkpoint
from headwise.pipeline.bundle.evidence import evidence
from headwise.pipeline.bundle.files import copy_processor, write_archive
from headwise.pipeline.bundle.golden import (
    STEP,
    Cases,
    cache_codes,
    golden_inputs,
    golden_outputs,
    golden_step,
    save_arrays,
)
from headwise.pipeline.bundle.parts import Part, Parts, find_parts
from headwise.pipeline.bundle.readme import readme
from headwise.pipeline.bundle.triton import write_repository
from headwise.pipeline.folders import compressed_model, untouched_model
from headwise.pipeline.graphs import GRAPH, judged
from headwise.pipeline.monitor import Monitor, Silent
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.report.document import read_report
from headwise.pipeline.results import PACKAGES
from headwise.pipeline.shapes import sequence_limit
from headwise.pipeline.stages import DECODE_ENGINE, ENGINE
from headwise.pipeline.store import installed_version
from headwise.pipeline.workspace import Workspace
from headwise.tolerances import GOLDEN

SAMPLES = 4


def make_bundle(
    run: Path, out: Path, *, samples: int = SAMPLES, triton: bool = False, monitor: Monitor | None = None
) -> dict[str, Any]:
    """Make a bundle of a finished run; the content of its manifest.

    Args:
        run: the ``--out`` of ``headwise compress``, whose checkpoint and data are still where they were.
        out: the folder; a bundle that lies there is replaced.
        samples: rows of a golden input.
        triton: also write a model repository of Triton Inference Server.
        monitor: hears of the progress.

    Raises:
        GateError: the run did not pass.
        BundleError: ``out`` holds something else.
        StorageError: a file of the run is damaged, or the bundle cannot be written.
        ExportError: the bundle does not give its own golden outputs.
    """
    watcher: Monitor = monitor or Silent()
    report = read_report(run)
    parts = find_parts(run, report)
    _refuse_other_content(out)
    watcher.work("load", 0)
    # Nothing is compressed or judged here: calibration data need not even be on this machine.
    recipe = load_recipe({**report["recipe"], "passes": [], "calibration": None, "gate": {}})
    workspace = Workspace(load_checkpoint(untouched_model(report)), recipe)
    with building(out) as folder:
        watcher.work("golden outputs", 0)
        manifest = _Maker(folder, workspace, parts).manifest(out.resolve().name, samples)
        manifest["evidence"] = evidence(report, parts)
        model = compressed_model(run, report)
        copy_processor(parts.onnx.path.parent, folder / "processor")
        manifest["layout"] = load_checkpoint(model).view().layout.to_json()
        if triton:
            manifest["triton"] = write_repository(folder, manifest)
        (folder / "README.md").write_text(readme(manifest), encoding="utf-8")
        write_archive(folder / ARCHIVE)
        _seal(folder, manifest)
    return manifest


class _Maker:
    """Fills a folder with graphs, engines and golden arrays, and describes them."""

    def __init__(self, folder: Path, workspace: Workspace, parts: Parts) -> None:
        self.folder, self.workspace, self.parts = folder, workspace, parts
        self.recipe = workspace.recipe
        self.cases: Cases = {}
        self.steps: dict[Any, str] = {}  # codes in a cache -> the case that has them in its past
        limits = sequence_limit(workspace.checkpoint)
        source = parts.source
        self.shapes = {} if source is None else engine_shapes(source.path, self.recipe.export, limits)

    def manifest(self, name: str, samples: int) -> dict[str, Any]:
        """Everything but the evidence, the layout, and the sizes and hashes of the files."""
        given = self.workspace.examples, self.parts.onnx.path, self.shapes.get("profiles", {})
        self.cases = golden_inputs(*given, samples)
        artifacts = self._graphs(ONNX, self.parts.onnx)
        sources = self._sources(artifacts)
        artifacts += [self._engine(source, stage, path) for stage, path in self.parts.engines for source in sources]
        packages = {package: version for package in PACKAGES if (version := installed_version(package))}
        return {
            "schema": SCHEMA,
            "name": name,
            "task": self.recipe.task.type,
            "made": {"python": platform.python_version(), "packages": packages},
            "artifacts": artifacts,
            "sources": sources,
            "targets": [target for target in self.recipe.targets if resolve_target(target).runtime != ORT],
            "cases": {case: self._write(f"golden/{case}.npz", arrays) for case, arrays in self.cases.items()},
            "fingerprints": [],
        }

    def _sources(self, onnx: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The graphs that engines are built from, which may be those that ONNX Runtime runs."""
        part = self.parts.source
        if part is None:
            return []
        graphs = onnx if part.path == self.parts.onnx.path else self._graphs("engine", part)
        tolerances = _tolerances(graph_ports(part.path)[1], "tf32" if part.arithmetic == "fp32" else part.arithmetic)
        shapes = [shapes for shapes in self.shapes.values() if shapes]
        # An engine has both sets of shapes, or there are two with one each.
        profiles = [shapes] if len(graphs) == 1 else [[entry] for entry in shapes]
        more = {"tolerance": tolerances, "workspace_mb": self.recipe.export.workspace_mb}
        return [{**graph, **more, "profiles": entry} for graph, entry in zip(graphs, profiles, strict=True)]

    def _graphs(self, name: str, part: Part) -> list[dict[str, Any]]:
        """Copy a graph, and beside it the one for single tokens; their golden outputs are those that were judged."""
        steps = self._steps(name, part)
        first = [case for case in self.cases if case not in self.steps.values()]
        made = [self._graph(name, part, part.path, (*first, *steps))]
        if part.single is not None and steps:
            made.append(self._graph(name, part, part.single, steps))
        return made

    def _steps(self, name: str, part: Part) -> tuple[str, ...]:
        """The case with a past, of a decoder. Graphs whose caches hold codes of one kind share it."""
        codes = cache_codes(part.path)
        if codes is None:
            return ()
        if codes not in self.steps:
            with _runnable(part, part.path) as graph:
                step = golden_step(graph, self.cases["batch"])
            if step is None:
                return ()
            case = f"{STEP}-{name}" if self.steps else STEP
            self.steps[codes], self.cases[case] = case, step
        return (self.steps[codes],)

    def _graph(self, folder: str, part: Part, source: Path, cases: Sequence[str]) -> dict[str, Any]:
        is_single = source == part.single
        path = self.folder / "graphs" / folder / source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        copy_graph(source, path)
        with _runnable(part, source) as graph:
            golden = golden_outputs(graph, {case: self.cases[case] for case in cases})
        name = folder + (SINGLE if is_single else "")
        inputs, outputs = graph_ports(path)
        files = (path, path.with_name(f"{path.name}.data"))
        return Artifact(
            name=name,
            file=self._relative(path),
            files=tuple(self._relative(file) for file in files if file.exists()),
            runtime=ORT,
            version=str(installed_version("onnxruntime") or installed_version("onnxruntime-gpu")),
            precision=part.label,
            inputs=inputs,
            outputs=outputs,
            golden={case: self._write(f"golden/{name}-{case}.npz", arrays) for case, arrays in golden.items()},
            tolerance=_tolerances(outputs, part.arithmetic),
            stage=part.stage,
            single=is_single,
        ).to_json()

    def _engine(self, source: Mapping[str, Any], stage: Mapping[str, Any], built: Path) -> dict[str, Any]:
        single = source["single"]
        name = str(stage["name"]).removeprefix("engine-") + (SINGLE if single else "")
        path = self.folder / "engines" / f"{name}.engine"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(built / (DECODE_ENGINE if single else ENGINE), path)
        engine = {key: stage["engine"][key] for key in ("sm", "runtime", "version")}
        file = self._relative(path)
        return {**source, **engine, "name": name, "stage": stage["name"], "file": file, "files": [file]}

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _write(self, file: str, arrays: Mapping[str, Any]) -> str:
        save_arrays(self.folder / file, arrays)
        return file


@contextmanager
def _runnable(part: Part, graph: Path) -> Iterator[Path]:
    """What ONNX Runtime runs of a graph of a part."""
    if part.runs:
        yield judged(graph)
        return
    with tempfile.TemporaryDirectory() as scratch:
        widen(judged(graph), (wide := Path(scratch, GRAPH)))
        yield wide


def _tolerances(outputs: Mapping[str, Port], arithmetic: str) -> dict[str, float]:
    """Of every output: classes and masks are exact, a cache may be stored in int8."""
    limits = {"int8": GOLDEN["codes"], "uint8": GOLDEN["codes"], "int32": 0.0, "int64": 0.0, "bool": 0.0}
    return {name: limits.get(port.dtype, GOLDEN[arithmetic]) for name, port in outputs.items()}


def _refuse_other_content(out: Path) -> None:
    """What lies at ``out`` is replaced, so it has to be a bundle."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        Bundle.open(out)
    except BundleError as error:
        raise BundleError(
            f"{out} cannot be replaced: {error.found}",
            expected="a new folder, or a whole bundle",
            fix="choose another --out, or delete it yourself",
        ) from error


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, and see that the bundle gives its own golden outputs."""
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": digest_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    _write_manifest(folder, manifest)
    opened = Bundle.open(folder)
    failed = [check for check in verify(opened, Wanted(artifact=ONNX, rounds=0)).checks if check.outcome != PASS]
    if failed:
        raise ExportError(
            f"the bundle does not give its own golden outputs: {failed[0].found}",
            expected="finite outputs that come out the same twice",
            fix="look at the values of this output with headwise evaluate; padding may make NaN of it",
        )
    manifest["fingerprints"] = [take(opened, opened.artifact(ONNX))]
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest[SEAL] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
