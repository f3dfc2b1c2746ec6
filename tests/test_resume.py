"""Resume: a run continues where it was cut off, and a change makes again exactly what depends on it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import copied, finished, plain_files, run

from headwise.artifacts import MANIFEST
from headwise.pipeline import store
from headwise.pipeline.monitor import Silent
from headwise.pipeline.run import Run

TESTS = Path(__file__).parent
EVERYTHING = ["baseline", "prune-heads", "onnx", "fp16"]
needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: no engine can be built"
)


class Log(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run on the plain module."""
    return copied("plain", tmp_path_factory.getbasetemp(), tmp_path)


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That run, which nobody cut off."""
    return finished("plain", tmp_path_factory.getbasetemp())[1]


def made(found: Run) -> list[str]:
    """The stages that were not entirely on disk."""
    return [stage["name"] for stage in found.report["stages"] if not stage["cached"]]


def metrics(found: Run) -> Any:
    return [(stage["name"], stage["status"], stage["metrics"], stage["verdicts"]) for stage in found.report["stages"]]


def artifacts(folder: Path) -> dict[str, Any]:
    """Stage folder -> digests of its files, measurements left out: latencies differ."""
    found = {path.parent.name: json.loads(path.read_text())["files"] for path in folder.glob(f"*/{MANIFEST}")}
    return {name: files for name, files in found.items() if not name.endswith(".measured")}


def test_a_second_run_makes_nothing_and_says_the_same(folder: Path, whole: Run) -> None:
    log = Log()
    found = run(folder, monitor=log)
    assert made(found) == []
    assert log.lines == []
    assert metrics(found) == metrics(whole)
    costs = [[stage["cost"] for stage in report["stages"]] for report in (found.report, whole.report)]
    assert costs[0] == costs[1]


def test_no_resume_makes_everything_and_gets_the_same(tmp_path: Path, whole: Run) -> None:
    folder = plain_files(tmp_path / "f")
    shutil.copytree(whole.folder, folder / "out")
    log = Log()
    found = run(folder, resume=False, monitor=log)
    assert made(found) == EVERYTHING
    assert "00-baseline: made again (--no-resume)" in log.lines
    assert metrics(found) == metrics(whole)
    assert artifacts(found.folder) == artifacts(whole.folder)


CHANGES: dict[str, tuple[tuple[str, ...], list[str], list[str]]] = {
    "gate limits": (("gate.max_drop=3", "gate.confidence=0.9", "gate.seed=3"), [], []),
    "pass option": (("passes.0.ridge=2",), EVERYTHING[1:], ["01-prune-heads: made again (changed: options)"]),
    "calibration samples": (
        ("calibration.seed=3",),
        EVERYTHING[1:],
        ["01-prune-heads: made again (changed: calibration)", "02-onnx: made again (changed: parent)"],
    ),
    # A seed that nothing random reads: the pass is made again, gives the same model, and the rest is kept.
    "seed": (("seed=3",), ["prune-heads"], ["01-prune-heads: made again (changed: seed)"]),
    "export": (("export.keep_io=true",), ["fp16"], ["03-fp16: made again (changed: keep_io)"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_again_what_depends_on_it_and_says_why(folder: Path, change: str) -> None:
    overrides, again, reasons = CHANGES[change]
    log = Log()
    found = run(folder, *overrides, monitor=log)
    assert found.exit_code == 0, found.reason
    assert made(found) == again
    assert [line for line in log.lines if ".measured" not in line][: len(reasons)] == reasons
    if again:
        assert by_stage(found)[again[0]]["why"] in reasons[0]


def rewrite(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    arrays = dict(np.load(path))
    edit(arrays)
    np.savez(path, **arrays)


def test_changed_labels_are_measured_again_and_nothing_else(folder: Path, whole: Run) -> None:
    rewrite(folder / "test.npz", lambda arrays: arrays["digit"].__setitem__(slice(0, 3), 1))
    log = Log()
    found = run(folder, monitor=log)
    assert log.lines[0] == "00-baseline.measured: made again (changed: data)"
    assert all(".measured" in line for line in log.lines)
    assert artifacts(found.folder) == artifacts(whole.folder)
    assert made(found) == EVERYTHING


def test_changed_calibration_labels_matter_to_nobody_who_does_not_read_them(folder: Path) -> None:
    rewrite(folder / "calibration.npz", lambda arrays: arrays["digit"].__setitem__(slice(0, 3), 1))
    assert made(run(folder)) == []


def test_changed_inputs_make_everything_again(folder: Path) -> None:
    rewrite(folder / "test.npz", lambda arrays: arrays["tokens"].__setitem__(0, 0.5))
    log = Log()
    found = run(folder, monitor=log)
    assert made(found) == EVERYTHING
    assert "00-baseline: made again (changed: sample)" in log.lines
    assert not any(line.startswith("01-prune-heads:") for line in log.lines), "a pass never sees the gate's samples"


@pytest.mark.parametrize(
    ("package", "artifacts_made", "reason"),
    [
        ("onnxruntime", ["00-baseline", "02-onnx", "03-fp16"], "(changed: onnxruntime)"),
        ("headwise", ["00-baseline", "01-prune-heads", "02-onnx", "03-fp16"], "(changed: headwise)"),
    ],
)
def test_another_library_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, artifacts_made: list[str], reason: str
) -> None:
    real = store.installed_version
    monkeypatch.setattr(store, "installed_version", lambda name: "9.9" if name == package else real(name))
    log = Log()
    found = run(folder, monitor=log)
    assert found.exit_code == 0
    again = [line.split(":")[0] for line in log.lines if ".measured" not in line]
    assert again == artifacts_made
    assert all(reason in line for line in log.lines if ".measured" not in line)


def test_another_machine_measures_again_but_makes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.pipeline import gatekeeper

    monkeypatch.setattr(gatekeeper, "device_name", lambda: "another machine")
    log = Log()
    run(folder, monitor=log)
    assert log.lines[0] == "00-baseline.measured: made again (changed: device)"
    assert all(".measured" in line for line in log.lines)


@needs_builder
def test_one_more_target_builds_one_more_engine(folder: Path) -> None:
    assert made(run(folder, "targets=[sm86]")) == ["engine-sm86"]
    found = run(folder, "targets=[sm89, sm86]")
    assert made(found) == ["engine-sm89"]
    assert made(run(folder, "targets=[sm86]", "export.batch={min: 1, opt: 1, max: 2}")) == ["engine-sm86"]


@pytest.mark.parametrize("how", ["changed", "removed", "added", "manifest"])
def test_a_damaged_artifact_is_made_again(folder: Path, whole: Run, how: str) -> None:
    stage = folder / "out" / "03-fp16"
    if how == "changed":
        (stage / "model.onnx").write_bytes(b"not a graph")
    elif how == "removed":
        (stage / "model.onnx").unlink()
    elif how == "added":
        (stage / "other").write_text("x")
    else:
        (stage / MANIFEST).write_text("{")
    log = Log()
    found = run(folder, monitor=log)
    reason = "its manifest cannot be read" if how == "manifest" else "its files were changed or damaged"
    assert len(log.lines) == 1
    assert f"03-fp16: made again ({reason}" in log.lines[0]
    assert made(found) == ["fp16"]
    assert by_stage(found)["fp16"]["why"].startswith(reason)
    assert metrics(found) == metrics(whole)


def by_stage(found: Run) -> dict[str, Any]:
    return {stage["name"]: stage for stage in found.report["stages"]}


def test_leftovers_of_a_killed_run_are_taken_away(folder: Path) -> None:
    out = folder / "out"
    shutil.rmtree(out / "03-fp16")
    leftover = out / ".03-fp16.12345.abcdef"
    leftover.mkdir()
    (leftover / "model.onnx").write_bytes(b"half")
    assert run(folder).exit_code == 0
    assert not leftover.exists()


KILL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import runs
from headwise.pipeline import stages, store

# (where, name of the folder that is being written) in the order of a run.
POINTS = [("seal", ".00-baseline.measured"), ("save", ".01-prune-heads"), ("seal", ".01-prune-heads.measured"),
          ("seal", ".02-onnx"), ("seal", ".03-fp16")]

def killing(real, point, folder):
    def wrapped(*arguments, **options):
        at = next(a for a in [*arguments, *options.values()] if isinstance(a, Path))
        result = real(*arguments, **options)
        if any(part.startswith(folder) for part in at.parts):
            (at / MANIFEST).unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

MANIFEST = store.find.__globals__["MANIFEST"]
for point, folder in POINTS:
    child = os.fork()
    if child == 0:
        if point == "seal":
            store.seal = killing(store.seal, point, folder)
        else:
            stages.save_checkpoint = killing(stages.save_checkpoint, point, folder)
        runs.run(Path(sys.argv[2]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    left = sorted(p.name for p in Path(sys.argv[2], "out").iterdir() if p.is_dir())
    print(folder, os.WTERMSIG(status), *left)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes, which this system does not have")
def test_killed_at_every_stage_it_ends_like_a_run_that_was_not(tmp_path: Path, whole: Run) -> None:
    folder = plain_files(tmp_path / "f")
    command = [sys.executable, "-c", KILL, str(TESTS), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, check=True)
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[1] for line in lines] == [str(int(signal.SIGKILL))] * 5, ended.stderr
    kept = [sum(not name.startswith(".") and not name.endswith(".measured") for name in line[2:]) for line in lines]
    assert kept == [0, 1, 2, 2, 3], "every finished stage is kept"
    left = json.loads((folder / "out" / "report.json").read_text())
    assert (left["outcome"], left["exit_code"]) == ("interrupted", 130), (
        "a killed run must not look like one that passed"
    )
    found = run(folder)
    assert made(found) == ["fp16"]
    assert metrics(found) == metrics(whole)
    assert artifacts(found.folder) == artifacts(whole.folder)
    assert not [path for path in found.folder.iterdir() if path.name.startswith(".")]


def test_ctrl_c_ends_with_130_and_leaves_a_report(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    out = folder / "out"
    command = [sys.executable, "-m", "headwise", "compress", str(folder / "checkpoint")]
    command += ["--recipe", str(folder / "recipe.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "00-baseline.measured" / MANIFEST).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    report = json.loads((out / "report.json").read_text())
    assert (report["outcome"], report["exit_code"]) == ("interrupted", 130)
    assert "interrupted" in {stage["status"] for stage in report["stages"]}
    found = run(folder)
    assert found.exit_code == 0
