"""Whole runs on tiny models: stages, gates and their policies, engines, bad input, and what the report says of it."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from conftest import HEADS, LAYERS
from runs import PLAIN, copied, finished, plain_files, run, write_recipe
from safetensors.torch import load_file, save_file

import headwise
from headwise.artifacts import digest_file
from headwise.device.cuda import Gpu
from headwise.errors import (
    CheckpointError,
    DataError,
    HeadwiseError,
    RecipeError,
    TargetError,
    UnsupportedModelError,
)
from headwise.export.runners import OrtRunner
from headwise.export.tensorrt import EngineInfo
from headwise.gates.measure import Predictions, predict
from headwise.model.checkpoint import load_checkpoint
from headwise.pipeline import exporting, gatekeeper, stages
from headwise.pipeline.commands import planning
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.run import Run, check, compress
from headwise.pipeline.workspace import Workspace

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: no engine can be built"
)
GOLDEN = Path(__file__).with_name("golden") / "plan.json"
NO_GATE = "gate.stages={pass: {max_drop: 100}, onnx: {max_drop: 100}, precision: {max_drop: 100}}"


@pytest.fixture(params=["plain", "text"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A finished run of each kind: a plain module with two outputs on arrays, and a BERT on text."""
    return finished(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run on the plain module."""
    return copied("plain", tmp_path_factory.getbasetemp(), tmp_path)


def by_name(found: Run) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in found.report["stages"]}


def statuses(found: Run) -> dict[str, str]:
    return {name: stage["status"] for name, stage in by_name(found).items()}


def on_disk(found: Run) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((found.folder / "report.json").read_text())
    return report


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(exporting if hasattr(exporting, where) else stages, where, broken)


# ---------------------------------------------------------------------------------------------- the run that works


def test_stages_and_statuses(done: tuple[Path, Run]) -> None:
    _, found = done
    assert (found.outcome, found.exit_code) == ("pass", 0)
    assert statuses(found) == dict.fromkeys(("baseline", "prune-heads", "onnx", "fp16"), "passed")
    kinds = {name: stage["kind"] for name, stage in by_name(found).items()}
    assert kinds == {"baseline": "baseline", "prune-heads": "pass", "onnx": "onnx", "fp16": "precision"}


def test_report_has_what_is_promised(done: tuple[Path, Run]) -> None:
    folder, found = done
    report = on_disk(found)
    assert report["schema"] == "headwise.report/1"
    assert (report["outcome"], report["exit_code"]) == ("pass", 0)
    assert report["checkpoint"]["source"] == str(folder / "checkpoint")
    assert report["recipe"] == load_recipe(folder / "recipe.yaml").to_json()
    assert report["data"]["task"]["samples"] == 60
    assert report["data"]["calibration"]["shared_with_task"] == 0
    assert report["environment"]["packages"]["torch"] == torch.__version__
    outputs = {"digit", "parity"} if folder.name == "plain" else {"embedding"}
    for stage in report["stages"]:
        assert stage["seconds"] > 0
        assert not stage["cached"]
        judged = [metric for metric in stage["metrics"] if metric["judged"]]
        assert {metric["output"] for metric in judged} == {v["output"] for v in stage["verdicts"]} == outputs
        for metric in stage["metrics"]:
            assert {"metric", "reference", "value", "unit"} <= set(metric)
        for verdict in stage["verdicts"]:
            assert verdict["outcome"] == "PASS"
            assert verdict["stage"] == stage["name"]
            assert verdict["interval"][0] <= verdict["difference"] <= verdict["interval"][1] <= verdict["limit"] == 2
            assert verdict["samples"] == 60
    assert json.dumps(report, allow_nan=False)


def test_every_form_of_the_report_is_written(done: tuple[Path, Run]) -> None:
    folder = done[1].folder
    assert "<html" in (folder / "report.html").read_text()
    assert "prune-heads" in (folder / "report.md").read_text()
    suites = ElementTree.parse(folder / "report.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["baseline", "prune-heads", "onnx", "fp16"]


def test_artifacts_are_listed_with_their_digests(done: tuple[Path, Run]) -> None:
    folder = done[1].folder
    for stage in done[1].report["stages"]:
        assert stage["artifacts"]
        for artifact in stage["artifacts"]:
            path = folder / artifact["path"]
            assert path.stat().st_size == artifact["bytes"]
            assert digest_file(path) == artifact["sha256"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "temporary folders are left behind"


def test_costs_of_graph_and_module_agree_and_fall_in_proportion(done: tuple[Path, Run]) -> None:
    costs = {name: stage["cost"] for name, stage in by_name(done[1]).items()}
    base, pruned = costs["baseline"], costs["prune-heads"]
    assert pruned["attention_macs"] == 0.75 * base["attention_macs"]
    assert base["macs"] - pruned["macs"] == base["attention_macs"] - pruned["attention_macs"]
    assert pruned["parameters"] < base["parameters"]
    for name in ("onnx", "fp16"):
        assert (costs[name]["macs"], costs[name]["attention_macs"]) == (pruned["macs"], pruned["attention_macs"])
        assert costs[name]["latency"]["device"]
        assert costs[name]["latency"]["median_ms"] > 0
    assert costs["fp16"]["file_bytes"] < costs["onnx"]["file_bytes"]


def test_macs_of_the_graph_are_those_of_torch_at_the_baseline(done: tuple[Path, Run]) -> None:
    """Counted in two ways that share no code: operators while torch runs, and shapes in the exported graph."""
    folder = done[1].folder
    graph = json.loads((folder / "00-baseline" / "manifest.json").read_text())["info"]["graph"]
    module = json.loads((folder / "00-baseline.measured" / "manifest.json").read_text())["info"]["cost"]
    assert (graph["macs"], graph["attention_macs"]) == (module["macs"], module["attention_macs"])


def test_the_right_heads_go_and_the_record_says_which(done: tuple[Path, Run]) -> None:
    folder, found = done
    record = by_name(found)["prune-heads"]["record"]
    layers = LAYERS if folder.name == "plain" else 2
    assert record["plan"]["edits"] == [
        {"type": "drop-heads", "layer": layer, "query": [HEADS - 1]} for layer in range(layers)
    ]
    assert [len(scores) for scores in record["plan"]["scores"]["layers"]] == [HEADS] * layers
    assert [entry["query"] for entry in record["after"]["attention"]] == [[0, 1, 2]] * layers
    assert record["twin_error"] < 1e-4


def test_the_saved_checkpoint_predicts_what_the_stage_measured(done: tuple[Path, Run]) -> None:
    folder, found = done
    workspace = Workspace(load_checkpoint(folder / "checkpoint"), load_recipe(folder / "recipe.yaml"))
    reloaded = headwise.load(str(found.folder / "01-prune-heads" / "model"))
    with stages.TorchRunner(reloaded.module) as runner:
        again = predict(runner, workspace.task, workspace.examples)
    reference = Predictions.load(found.folder / "00-baseline.measured" / "predictions.npz")
    fresh = gatekeeper.measure(workspace.task, workspace.examples, reference, again)
    stored = gatekeeper.load_measurements(found.folder / "01-prune-heads.measured" / "samples.npz")
    assert [m.metric for m in fresh] == [m.metric for m in stored]
    for left, right in zip(fresh, stored, strict=True):
        np.testing.assert_array_equal(left.candidate, right.candidate)
    assert [m["value"] for m in by_name(found)["prune-heads"]["metrics"]] == [m.values()[1] for m in stored]


def test_graphs_are_valid_and_name_no_path_of_this_machine(done: tuple[Path, Run]) -> None:
    folder, found = done
    for name in ("00-baseline", "02-onnx", "03-fp16"):
        path = found.folder / name / "model.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        assert str(folder).encode() not in path.read_bytes()
        assert str(Path(headwise.__file__).parent).encode() not in path.read_bytes()


def test_fidelity_needs_no_labels(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    data = {"columns": {"tokens": "tokens"}}
    recipe = {
        **PLAIN,
        "task": {"data": {"path": "test.npz", **data}},
        "calibration": {"data": {"path": "calibration.npz", **data}},
        "export": {"precision": "fp32"},
    }
    write_recipe(folder, recipe)
    found = run(folder, NO_GATE, "gate.outputs.parity.max_drop=50")
    assert found.exit_code == 0, found.reason
    judged = [m for m in by_name(found)["onnx"]["metrics"] if m["judged"]]
    assert {(m["output"], m["metric"]) for m in judged} >= {("digit", "fidelity"), ("parity", "fidelity")}
    limits = {v["output"]: v["limit"] for v in by_name(found)["onnx"]["verdicts"]}
    assert (limits["digit"], limits["parity"]) == (100, 50)


def test_the_python_api_takes_recipes_in_every_form(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    forms: tuple[Any, ...] = (recipe, recipe.to_json(), str(folder / "recipe.yaml"))
    for form in forms:
        found = headwise.compress(folder / "checkpoint", form, folder / "out", overrides=["batch_size=32"])
        assert all(stage["cached"] for stage in found.report["stages"])
    changed = headwise.compress(folder / "checkpoint", recipe, folder / "out", overrides=["gate.max_drop=3"])
    assert changed.report["recipe"]["gate"]["max_drop"] == 3


# ---------------------------------------------------------------------------------------------- gates


def test_a_gate_that_fails_stops_the_run_and_keeps_the_artifacts(folder: Path) -> None:
    found = run(folder, "passes.0.ratio=0.75", "passes.0.refit=false", "gate.max_drop=0.5")
    assert (found.outcome, found.exit_code) == ("fail", 1)
    assert statuses(found) == {"baseline": "passed", "prune-heads": "failed", "onnx": "skipped", "fp16": "skipped"}
    assert "the gate after prune-heads said no" in found.reason
    assert "FAIL" in found.reason
    assert on_disk(found)["reason"] == found.reason
    assert by_name(found)["prune-heads"]["reason"] in found.reason
    assert headwise.load(str(found.folder / "01-prune-heads" / "model"))
    failures = ElementTree.parse(found.folder / "report.xml").getroot().findall(".//failure")
    assert failures
    assert "prune-heads" in (found.folder / "report.md").read_text()


def test_rollback_goes_on_with_the_model_before_the_pass(folder: Path) -> None:
    found = run(folder, "passes.0.ratio=0.75", "passes.0.refit=false", "gate={max_drop: 0.5, on_fail: rollback}")
    assert (found.outcome, found.exit_code) == ("pass", 0)
    assert statuses(found) == {"baseline": "passed", "prune-heads": "rolled-back", "onnx": "passed", "fp16": "passed"}
    costs = {name: stage["cost"] for name, stage in by_name(found).items()}
    assert costs["onnx"]["macs"] == costs["baseline"]["macs"] > costs["prune-heads"]["macs"]
    assert "without prune-heads, rolled back" in found.reason


def test_warn_goes_on_with_the_pruned_model(folder: Path) -> None:
    found = run(folder, "passes.0.ratio=0.75", "passes.0.refit=false", "gate={max_drop: 0.5, on_fail: warn}")
    assert (found.outcome, found.exit_code) == ("warn", 0)
    assert statuses(found) == {"baseline": "passed", **dict.fromkeys(("prune-heads", "onnx", "fp16"), "warned")}
    costs = {name: stage["cost"] for name, stage in by_name(found).items()}
    assert costs["onnx"]["macs"] == costs["prune-heads"]["macs"] < costs["baseline"]["macs"]


def test_nothing_to_roll_back_to_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(folder, "gate={min_samples: 61, on_fail: rollback}")
    assert statuses(found)["baseline"] == "failed"
    assert found.exit_code == 1
    assert "60 samples are fewer than the 61" in found.reason


def test_inconclusive_and_anomalous_are_a_no(folder: Path) -> None:
    halved = ("passes.0.ratio=0.5", "passes.0.refit=false")
    found = run(folder, *halved, "gate.max_drop=22", "gate.outputs.digit.max_drop=100")
    verdict = next(v for v in by_name(found)["prune-heads"]["verdicts"] if v["output"] == "parity")
    assert (found.exit_code, verdict["outcome"]) == (1, "INCONCLUSIVE")
    assert "INCONCLUSIVE, 60 samples cannot separate" in found.reason
    labels = np.load(folder / "test.npz")
    # Labels that only the pruned model gets right: a gain that nobody would believe.
    pruned = headwise.load(str(folder / "out" / "01-prune-heads" / "model")).module
    answers = pruned(torch.from_numpy(labels["tokens"]))["parity"].argmax(1).numpy()
    dense = headwise.load(str(folder / "checkpoint")).module(torch.from_numpy(labels["tokens"]))["parity"].argmax(1)
    differ = answers != dense.numpy()
    assert differ.any()
    np.savez(folder / "test.npz", **{**labels, "parity": answers})
    found = run(folder, *halved, "gate.max_drop=100", "gate.outputs.parity.max_gain=0.1")
    verdict = next(v for v in by_name(found)["prune-heads"]["verdicts"] if v["output"] == "parity")
    assert (found.exit_code, verdict["outcome"]) == (1, "ANOMALOUS")
    assert "ANOMALOUS, better by" in found.reason


def test_limits_per_stage_and_output(folder: Path) -> None:
    overrides = (
        "gate.stages.pass.max_drop=7",
        "gate.stages.prune-heads.max_drop=6",
        "gate.stages.onnx={max_drop: 5, on_fail: warn}",
        "gate.outputs.parity.max_drop=4",
        "gate.metrics.fidelity.max_drop=3",
    )
    found = run(folder, *overrides)
    limits = {
        (stage["name"], verdict["output"], verdict["metric"]): verdict["limit"]
        for stage in found.report["stages"]
        for verdict in stage["verdicts"]
    }
    assert limits["baseline", "digit", "accuracy"] == 2
    assert limits["prune-heads", "digit", "accuracy"] == 6
    assert limits["onnx", "digit", "accuracy"] == 5
    assert limits["onnx", "parity", "f1"] == 4
    assert limits["prune-heads", "digit", "fidelity"] == 3
    assert all(stage["cached"] for stage in found.report["stages"]), "limits change no artifact"


def test_two_passes_of_one_kind_keep_the_original_head_ids(folder: Path) -> None:
    recipe = {**PLAIN, "passes": [{"prune-heads": {"ratio": 0.25}}, {"prune-heads": {"ratio": 0.34}}]}
    write_recipe(folder, recipe)
    found = run(folder, "gate.stages.pass.max_drop=100", "gate.stages.onnx={max_drop: 100, on_fail: warn}")
    assert list(by_name(found))[:4] == ["baseline", "prune-heads", "prune-heads-2", "onnx"]
    first, second = (by_name(found)[name]["record"] for name in ("prune-heads", "prune-heads-2"))
    assert second["before"] == first["after"]
    removed = {(edit["layer"], head) for edit in second["plan"]["edits"] for head in edit["query"]}
    assert len(removed) == 3
    assert all(head < HEADS - 1 for _, head in removed)
    for before, after, layer in zip(
        second["before"]["attention"], second["after"]["attention"], range(LAYERS), strict=True
    ):
        assert set(before["query"]) - set(after["query"]) == {head for where, head in removed if where == layer}


def test_after_a_rollback_the_next_pass_starts_from_the_untouched_model(folder: Path) -> None:
    write_recipe(
        folder,
        {**PLAIN, "passes": [{"prune-heads": {"ratio": 0.75, "refit": False}}, {"prune-heads": {"ratio": 0.25}}]},
    )
    found = run(folder, "gate.stages.prune-heads={max_drop: 0.5, on_fail: rollback}")
    assert found.exit_code == 0, found.reason
    assert statuses(found)["prune-heads"] == "rolled-back"
    assert statuses(found)["prune-heads-2"] == "passed"
    assert by_name(found)["prune-heads-2"]["record"]["before"] == by_name(found)["prune-heads"]["record"]["before"]


# ---------------------------------------------------------------------------------------------- engines


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A builder that only copies the graph; returns the targets that it was asked for."""
    built: list[str] = []

    def build(
        graph: Path, out: Path, target: Any, *, profiles: Mapping[str, Any], workspace_mb: int | None, **_: Any
    ) -> Any:
        del workspace_mb
        built.append(target.name)
        out.write_bytes(graph.read_bytes())
        nothing = dict.fromkeys(("listing", "weights_bytes", "activation_bytes", "scratch_bytes"))
        facts = {"target": target.name, "sm": target.sm, "runtime": target.runtime, "version": "0"}
        return EngineInfo(**facts, bytes=out.stat().st_size, seconds=0.1, profiles=profiles, **nothing)

    monkeypatch.setattr(stages, "build_engine", build)
    monkeypatch.setattr(stages, "gpu", lambda: None)
    return built


def test_an_engine_without_a_gpu_is_not_run_and_that_is_said(folder: Path, builder: list[str]) -> None:
    found = run(folder, "targets=[sm86]")
    assert builder == ["sm86"]
    assert (found.outcome, found.exit_code) == ("pass", 0)
    stage = by_name(found)["engine-sm86"]
    assert stage["status"] == "not-run"
    assert [(v["output"], v["outcome"], v["reason"]) for v in stage["verdicts"]] == [
        ("digit", "NOT RUN", "no GPU"),
        ("parity", "NOT RUN", "no GPU"),
    ]
    assert stage["cost"]["file_bytes"] > 0
    assert "not run here: engine-sm86" in found.reason


def test_an_engine_that_has_to_be_run_ends_with_4(folder: Path, builder: list[str]) -> None:
    found = run(folder, "targets=[sm86]", require_engine_run=True)
    assert (found.outcome, found.exit_code) == ("not-run", 4)
    assert found.reason == "engine-sm86 was not run: no GPU"
    with pytest.raises(RecipeError, match="an engine run is required, but the recipe has no targets"):
        run(folder, require_engine_run=True)


def test_an_engine_on_its_gpu_is_judged(folder: Path, builder: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "gpu", lambda: Gpu(name="NVIDIA A10", sm=86))
    monkeypatch.setattr(stages, "open_runner", OrtRunner)
    found = run(folder, "targets=[sm86, sm89]", require_engine_run=True)
    assert statuses(found)["engine-sm86"] == "passed"
    assert [v["outcome"] for v in by_name(found)["engine-sm86"]["verdicts"]] == ["PASS", "PASS"]
    assert by_name(found)["engine-sm89"]["reason"] == "NVIDIA A10 is sm86, the engine is for sm89"
    assert found.exit_code == 4


def test_a_device_that_builds_its_own_engine_is_told_so(folder: Path) -> None:
    found = run(folder, "targets=[jetson-orin]")
    assert (found.outcome, found.exit_code) == ("pass", 0)
    reason = by_name(found)["engine-jetson-orin"]["reason"]
    assert "sm87" in reason
    assert "run this step on the device; the ONNX graph of this run is all that it needs" in reason


def test_a_missing_builder_ends_with_4(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.device import runtimes

    monkeypatch.setitem(runtimes.MODULES, "tensorrt-rtx", "no_such_builder")
    found = run(folder, "targets=[sm86, sm89]")
    assert (found.outcome, found.exit_code) == ("not-run", 4)
    assert "pip install no_such_builder" in found.reason
    assert statuses(found) == {
        **dict.fromkeys(("baseline", "prune-heads", "onnx", "fp16"), "passed"),
        "engine-sm86": "error",
        "engine-sm89": "skipped",
    }


@needs_builder
def test_a_real_engine(folder: Path) -> None:
    found = run(folder, "targets=[sm86]", "export.batch={min: 1, opt: 2, max: 4}")
    stage = by_name(found)["engine-sm86"]
    assert found.exit_code == 0, found.reason
    assert stage["engine"]["sm"] == 86
    assert stage["engine"]["profiles"]["tokens"]["max"] == [4, 5, 32]
    assert stage["engine"]["listing"]["gemms"]
    assert (found.folder / "04-engine-sm86" / "model.engine").stat().st_size == stage["cost"]["file_bytes"]


def test_bf16_is_judged_nowhere_on_a_cpu(folder: Path) -> None:
    found = run(folder, "export.precision=bf16")
    assert found.exit_code == 0, found.reason
    assert statuses(found)["bf16"] == "not-run"
    assert "no bf16 kernels" in by_name(found)["bf16"]["reason"]


# ---------------------------------------------------------------------------------------------- things that go wrong


def test_a_stage_that_raises_ends_with_3_and_keeps_the_earlier_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "convert_precision", ZeroDivisionError("by [zero] [/x]"))
        shutil.rmtree(folder / "out" / "03-fp16")
        found = run(folder)
    assert (found.outcome, found.exit_code) == ("error", 3)
    assert statuses(found)["onnx"] == "passed"
    assert statuses(found)["fp16"] == "error"
    assert "stage fp16 failed: ZeroDivisionError: by [zero] [/x]" in found.reason
    assert "error.log" in found.reason
    assert "Traceback" in (found.folder / "error.log").read_text()
    found = run(folder)
    assert [stage["cached"] for stage in found.report["stages"]] == [True, True, True, False]
    assert found.exit_code == 0


def test_an_interrupt_ends_with_130_and_the_same_command_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "run_pass", KeyboardInterrupt())
        shutil.rmtree(folder / "out" / "01-prune-heads")
        found = run(folder)
    assert (found.outcome, found.exit_code) == ("interrupted", 130)
    assert statuses(found) == {
        "baseline": "passed",
        "prune-heads": "interrupted",
        "onnx": "skipped",
        "fp16": "skipped",
    }
    assert "the same command continues" in on_disk(found)["reason"]
    assert run(folder).exit_code == 0


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full from the ``after``-th synchronised file on."""
    left = [after]
    real = os.fsync

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(("after", "kept"), [(0, 0), (5, 1), (9, 2)])
def test_a_full_disk_says_so_and_finished_stages_stay(tmp_path: Path, after: int, kept: int) -> None:
    folder = plain_files(tmp_path / "f")
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, after)
        with pytest.raises(HeadwiseError, match="no space left on the device while writing") as caught:
            run(folder)
    assert caught.value.exit_code == 3
    assert "free some space and run the same command again: finished stages are kept" in caught.value.fix
    found = run(folder)
    assert found.exit_code == 0
    assert sum(stage["cached"] for stage in found.report["stages"]) == kept


def test_a_full_disk_inside_a_library_is_a_reason_not_a_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, 0)
    fail_at(monkeypatch, "convert_precision", RuntimeError("I/O error: No space left on device"))
    shutil.rmtree(folder / "out" / "03-fp16")
    with pytest.raises(HeadwiseError, match="no space left on the device") as caught:
        run(folder)
    assert caught.value.exit_code == 3


def test_a_graph_that_onnxruntime_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Path, out: Path, precision: str, *, keep_io: bool) -> Any:
        info = convert(graph, out, precision, keep_io=keep_io)
        model = onnx.load(str(out))
        model.graph.node[0].op_type = "NoSuchOperator"
        onnx.save(model, str(out))
        return info

    convert = exporting.convert_precision
    monkeypatch.setattr(exporting, "convert_precision", broken)
    found = run(folder, resume=False)
    assert (found.outcome, found.exit_code) == ("error", 3)
    assert statuses(found)["fp16"] == "error"
    assert "NoSuchOperator" in found.reason
    assert statuses(found)["onnx"] == "passed"


def test_a_ratio_that_would_empty_a_layer(folder: Path) -> None:
    found = run(folder, "passes.0.ratio=0.95")
    assert (found.outcome, found.exit_code) == ("error", 2)
    assert statuses(found)["prune-heads"] == "error"
    assert "only 9 can" in found.reason
    assert "at least 1 query head(s) left in each of the 3 layers" in found.reason
    assert statuses(found)["baseline"] == "passed"


REFUSED: Mapping[str, tuple[Callable[[Path], Any] | None, tuple[str, ...], type[HeadwiseError], str]] = {
    "calibration data are gate data": (
        None,
        ("calibration.data.path=test.npz",),
        DataError,
        r"60 samples are also calibration samples(.*\n)*.*training split",
    ),
    "some calibration data are gate data": (
        None,
        ("calibration.data.path=test.npz", "calibration.samples=10"),
        DataError,
        "10 of the gate's 60 samples are also calibration samples",
    ),
    "bf16 on a device without it": (
        None,
        ("export.precision=bf16", "targets=[sm75]"),
        TargetError,
        r"target sm75 \(sm75\) cannot run bf16: Turing has no bf16 arithmetic",
    ),
    "fp32 on a device without it": (
        None,
        ("export.precision=fp32", "targets=[t4]"),
        TargetError,
        r"target t4 \(sm75\) cannot run fp32",
    ),
    "no such file": (None, ("task.data.path=nothing.npz",), DataError, "nothing.npz"),
    "a column that is not there": (
        None,
        ("task.data.columns={tokens: tokens, digit: digits, parity: parity}",),
        DataError,
        r"no column 'digits' for the role \"digit\"(.*\n)*.*did you mean \"digit\"",
    ),
    "an empty file": (
        lambda folder: np.savez(folder / "test.npz", tokens=np.zeros((0, 5, 32), np.float32), digit=[], parity=[]),
        (),
        DataError,
        "has no rows",
    ),
    "an empty text file": (
        lambda folder: (folder / "empty.csv").write_text(""),
        ("task.data.path=empty.csv",),
        DataError,
        "empty.csv has no rows",
    ),
    "an input that the model does not have": (
        None,
        ("task.data.columns={pixels: tokens, digit: digit, parity: parity}",),
        DataError,
        "pixels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_with_2_before_the_first_stage(tmp_path: Path, case: str) -> None:
    prepare, overrides, kind, text = REFUSED[case]
    folder = plain_files(tmp_path / "f")
    if prepare is not None:
        prepare(folder)
    with pytest.raises(kind, match=text) as caught:
        run(folder, *overrides)
    assert caught.value.exit_code == 2
    assert not (folder / "out" / "00-baseline").exists()


def test_labels_of_an_output_that_is_not_there(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    found = run(folder, "task.outputs.colour={type: classification, column: digit}")
    assert (found.outcome, found.exit_code) == ("error", 2)
    assert 'no output called "colour"' in found.reason
    assert "digit, parity" in found.reason
    assert not list(folder.rglob("*.onnx")), "found out before the export"


def test_class_ids_beyond_the_logits(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    arrays = dict(np.load(folder / "test.npz"))
    np.savez(folder / "test.npz", **{**arrays, "parity": arrays["digit"] + 5})
    found = run(folder)
    assert (found.outcome, found.exit_code) == ("error", 2)
    assert 'output "parity" has 2 classes, but the labels go up to 7' in found.reason


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    path = folder / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["digit.weight"][1, 2] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"digit\.weight holds NaN or infinite values") as caught:
        run(folder)
    assert caught.value.exit_code == 2


class NoAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.digit = torch.nn.Linear(32, 3)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.digit(tokens.mean(1))
        return {"digit": scores, "parity": scores[:, :2]}


def test_a_model_type_that_nobody_knows(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    for refuse in (compress, lambda c, r, _: check(c, r)):
        with pytest.raises(UnsupportedModelError) as caught:
            refuse("test_pipeline:NoAttention", folder / "recipe.yaml", folder / "out")
        assert caught.value.exit_code == 2
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(CheckpointError, match="no-such-type"):
        compress(folder / "unknown", folder / "recipe.yaml", folder / "out")


@pytest.mark.parametrize("checkpoint", ["nothing/here", "no_such_module:factory", "conftest:no_such_factory", "."])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, checkpoint: str) -> None:
    folder = plain_files(tmp_path / "f")
    with pytest.raises(CheckpointError) as caught:
        compress(checkpoint, folder / "recipe.yaml", folder / "out")
    assert caught.value.exit_code == 2


def test_text_without_a_tokenizer(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = copied("text", tmp_path_factory.getbasetemp(), tmp_path)
    for path in (folder / "checkpoint").glob("*token*"):
        path.unlink()
    with pytest.raises(DataError, match="no tokenizer in"):
        run(folder)


# ---------------------------------------------------------------------------------------------- plan


def test_plan_says_what_compress_does_and_writes_nothing(done: tuple[Path, Run]) -> None:
    folder, found = done
    before = sorted(folder.rglob("*"))
    (plan,) = planning.plan_passes(str(folder / "checkpoint"), str(folder / "recipe.yaml"))
    assert sorted(folder.rglob("*")) == before
    record = by_name(found)["prune-heads"]["record"]
    assert (plan["plan"], plan["before"], plan["after"]) == (record["plan"], record["before"], record["after"])


def test_a_later_pass_is_planned_on_the_result_of_the_earlier_one(folder: Path) -> None:
    write_recipe(
        folder, {**PLAIN, "passes": [{"prune-heads": {"ratio": 0.25}}, {"prune-heads": {"ratio": 0.34}}], "gate": {}}
    )
    planned = planning.plan_passes(str(folder / "checkpoint"), str(folder / "recipe.yaml"))
    found = run(folder, "gate={on_fail: warn}")
    for plan, name in zip(planned, ("prune-heads", "prune-heads-2"), strict=True):
        record = by_name(found)[name]["record"]
        assert plan["before"] == record["before"]
        assert plan["plan"]["edits"] == record["plan"]["edits"]


def test_golden_plan(tmp_path: Path) -> None:
    """A fixed model and fixed data give exactly the stored heads.

    After a change that is meant to change plans, write the file again and look at its difference:
    ``HEADWISE_WRITE_GOLDEN=1 pytest tests/test_pipeline.py -k golden``.
    """
    folder = plain_files(tmp_path / "f")
    found = {}
    for score in ("contribution", "gauss-newton", "weight-norm", "random"):
        overrides = (f"passes.0.score={score}", "passes.0.ratio=0.5")
        (plan,) = planning.plan_passes(str(folder / "checkpoint"), str(folder / "recipe.yaml"), overrides)
        layers = plan["plan"]["scores"]["layers"]
        scores = [{head: float(f"{value:.4g}") for head, value in layer.items()} for layer in layers]
        found[score] = {"edits": plan["plan"]["edits"], "scores": scores}
    if os.environ.get("HEADWISE_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert {name: entry["edits"] for name, entry in found.items()} == {n: e["edits"] for n, e in golden.items()}
    for name, entry in golden.items():
        for fresh, stored in zip(found[name]["scores"], entry["scores"], strict=True):
            assert fresh == pytest.approx(stored, rel=1e-2, abs=1e-9), name


def test_a_checkpoint_pruned_by_a_run_can_be_pruned_again(folder: Path) -> None:
    pruned = folder / "out" / "01-prune-heads" / "model"
    found = compress(pruned, folder / "recipe.yaml", folder / "again", overrides=[NO_GATE, "passes.0.ratio=0.34"])
    assert found.exit_code == 0, found.reason
    record = by_name(found)["prune-heads"]["record"]
    assert [entry["query"] for entry in record["before"]["attention"]] == [[0, 1, 2]] * LAYERS
    assert sum(len(entry["query"]) for entry in record["after"]["attention"]) == 6


def test_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    before = sorted(folder.rglob("*"))
    text = check(folder / "checkpoint", folder / "recipe.yaml", overrides=["passes.0.ratio=0.5"])
    assert "ratio: 0.5" in text
    assert load_recipe(_loaded(text)).to_json()["passes"][0]["prune-heads"]["ratio"] == 0.5
    with pytest.raises(TargetError):
        check(folder / "checkpoint", folder / "recipe.yaml", overrides=["export.precision=bf16", "targets=[sm75]"])
    assert sorted(folder.rglob("*")) == before


def _loaded(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)
