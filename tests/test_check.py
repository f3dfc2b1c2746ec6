"""`headwise check`: a finished run against the limits of a baseline, from what the run left on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from runs import copied, run

from headwise.cli import main
from headwise.pipeline.regression.baseline import Baseline

Report = dict[str, Any]
PASS_STAGE = "prune-heads"


@pytest.fixture(autouse=True)
def not_in_a_ci_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def out(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run that passed."""
    return copied("plain", tmp_path_factory.getbasetemp(), tmp_path) / "out"


@pytest.fixture
def baseline(out: Path) -> Path:
    """That run, accepted."""
    path = out.parent / "baseline.json"
    assert check(out, path, "--update").exit_code == 0
    return path


def check(out: Path, against: Path, *options: str, **env: str) -> Result:
    arguments = ["check", str(out), "--against", str(against), *options]
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", **env}).invoke(main, arguments)


def findings(out: Path, against: Path) -> dict[tuple[str, str, str], Report]:
    found = json.loads(check(out, against, "--json").stdout)["findings"]
    return {(entry["stage"], entry["output"], entry["metric"]): entry for entry in found}


def edit(path: Path, change: Callable[[Report], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def stage(report: Report, name: str) -> Report:
    return next(entry for entry in report["stages"] if entry["name"] == name)


def alone(out: Path) -> None:
    """Leave what a CI job keeps of a run: no model, no graph, no data."""
    for path in [*out.iterdir(), *out.parent.iterdir()]:
        if path.is_dir() and path != out and not path.name.endswith(".measured"):
            shutil.rmtree(path)
        elif path.suffix in (".npz", ".yaml", ".html"):
            path.unlink()


def test_the_same_run_passes_from_its_saved_results_alone(out: Path, baseline: Path) -> None:
    alone(out)
    result = check(out, baseline)
    assert result.exit_code == 0, result.output
    assert "within the limits of the baseline" in result.output
    moved = {key: entry["change"] for key, entry in findings(out, baseline).items()}
    assert set(moved.values()) == {0.0}
    for name in ("baseline", PASS_STAGE, "onnx"):
        assert {("digit", "accuracy"), ("parity", "f1")} <= {key[1:] for key in moved if key[0] == name}


def test_a_recipe_that_loses_points_is_red_and_names_stage_and_output(out: Path, baseline: Path) -> None:
    # The recipe loosens its own limits as well, which must not help it.
    loose = run(out.parent, "passes.0.ratio=0.75", "passes.0.refit=false", "gate.max_drop=100")
    assert loose.exit_code == 0, "the run itself has no objection"
    result = check(out, baseline)
    assert result.exit_code == 1
    assert f"{PASS_STAGE} digit accuracy" in result.output
    assert "the drop was" in result.output
    entry = findings(out, baseline)[PASS_STAGE, "digit", "accuracy"]
    assert entry["change"] > 1.0
    assert entry["verdict"]["outcome"] in ("FAIL", "INCONCLUSIVE")
    assert entry["verdict"]["limit"] == 2.0


def test_limits_are_edited_in_the_baseline_and_survive_an_update(out: Path, baseline: Path) -> None:
    edit(baseline, lambda values: values["gate"].update(max_drop=90.0))
    loose = run(out.parent, "passes.0.ratio=0.75", "passes.0.refit=false", "gate.max_drop=100")
    assert loose.exit_code == 0
    assert check(out, baseline).exit_code == 0
    assert check(out, baseline, "--update").exit_code == 0
    assert Baseline.read(baseline).gate.max_drop == 90.0
    assert {entry["change"] for entry in findings(out, baseline).values()} == {0.0}


def test_a_run_that_does_not_pass_is_no_baseline(out: Path, baseline: Path) -> None:
    accepted = baseline.read_bytes()
    run(out.parent, "passes.0.ratio=0.75", "passes.0.refit=false", "gate.max_drop=100")
    result = check(out, baseline, "--update")
    assert result.exit_code == 1
    assert "not written" in result.stderr
    assert baseline.read_bytes() == accepted


def test_a_gate_that_only_warns_stays_green(out: Path, baseline: Path) -> None:
    edit(baseline, lambda values: values["gate"].update(on_fail="warn"))
    run(out.parent, "passes.0.ratio=0.75", "passes.0.refit=false", "gate.max_drop=100")
    result = check(out, baseline)
    assert result.exit_code == 0
    assert "(warned)" in result.output


def test_a_stage_that_is_gone_is_red(out: Path, baseline: Path) -> None:
    edit(out / "report.json", lambda report: report["stages"].remove(stage(report, PASS_STAGE)))
    result = check(out, baseline)
    assert result.exit_code == 1
    assert f"{PASS_STAGE}: FAIL, the run has no such stage" in result.output


def test_an_output_that_is_gone_is_red(out: Path, baseline: Path) -> None:
    def add(values: Report) -> None:
        metrics = stage(values, "onnx")["metrics"]
        metrics.append({**metrics[0], "output": "size"})

    edit(baseline, add)
    result = check(out, baseline)
    assert result.exit_code == 1
    assert "onnx size accuracy: FAIL, the run does not measure it" in result.output


def test_a_new_stage_is_judged_with_the_same_limits(out: Path, baseline: Path) -> None:
    edit(baseline, lambda values: values["stages"].remove(stage(values, PASS_STAGE)))
    entry = findings(out, baseline)[PASS_STAGE, "digit", "accuracy"]
    assert entry["was"] is None
    assert entry["verdict"]["outcome"] == "PASS"


@pytest.mark.parametrize("status", ["skipped", "error", "interrupted"])
def test_a_run_that_did_not_finish_is_red(out: Path, baseline: Path, status: str) -> None:
    edit(out / "report.json", lambda report: stage(report, "onnx").update(status=status, reason=""))
    result = check(out, baseline)
    assert result.exit_code == 1
    assert f"onnx: FAIL, {status}: the run ended before it" in result.output


def test_a_pass_that_is_rolled_back_now_is_red_and_one_that_was_is_not(out: Path, baseline: Path) -> None:
    edit(out / "report.json", lambda report: stage(report, PASS_STAGE).update(status="rolled-back", reason="too much"))
    result = check(out, baseline)
    assert result.exit_code == 1
    assert "rolled back, but not in the baseline: too much" in result.output
    edit(baseline, lambda values: stage(values, PASS_STAGE).update(status="rolled-back"))
    assert check(out, baseline).exit_code == 0


def test_what_the_baseline_measured_has_to_be_run(out: Path, baseline: Path) -> None:
    edit(out / "report.json", lambda report: stage(report, "onnx").update(status="not-run", reason="no GPU"))
    result = check(out, baseline)
    assert result.exit_code == 4
    assert "could not be run here, and is in the baseline: onnx" in result.output
    edit(baseline, lambda values: stage(values, "onnx").update(status="not-run", metrics=[]))
    assert check(out, baseline).exit_code == 0


def test_other_samples_are_red_until_they_are_accepted(out: Path, baseline: Path) -> None:
    edit(baseline, lambda values: values.update(samples="0" * 64))
    result = check(out, baseline)
    assert result.exit_code == 1
    assert "other samples than the baseline" in result.output
    assert check(out, baseline, "--update").exit_code == 0
    assert check(out, baseline).exit_code == 0


def test_kernels_that_were_promised_and_are_not_there_stay_red(out: Path, baseline: Path) -> None:
    def broken(report: Report) -> None:
        verdicts = stage(report, "onnx")["verdicts"]
        verdicts.append({**verdicts[0], "gate": "kernels", "output": "INT8", "outcome": "FAIL", "reason": "3 of 4"})

    edit(out / "report.json", broken)
    result = check(out, baseline)
    assert result.exit_code == 1
    assert "3 of 4" in result.output


def test_damaged_results_are_refused(out: Path, baseline: Path) -> None:
    measured = next(out.glob(f"*-{PASS_STAGE}.measured"))
    samples = measured / "samples.npz"
    samples.write_bytes(samples.read_bytes()[:-1])
    result = check(out, baseline)
    assert result.exit_code == 3
    assert "changed or damaged" in result.output
    shutil.rmtree(measured)
    result = check(out, baseline)
    assert result.exit_code == 3
    assert "keep the *.measured folders" in result.output


def test_a_report_of_another_run_is_refused(out: Path, baseline: Path) -> None:
    def other(report: Report) -> None:
        stage(report, PASS_STAGE)["metrics"][0]["value"] += 0.5

    edit(out / "report.json", other)
    result = check(out, baseline)
    assert result.exit_code == 3
    assert "do not belong together" in result.output


def test_a_baseline_that_cannot_be_read(out: Path, baseline: Path) -> None:
    missing = check(out, out / "nothing.json")
    assert missing.exit_code == 2
    assert "--update" in missing.output
    baseline.write_text("{")
    assert "is not JSON" in check(out, baseline).output
    baseline.write_text('{"gate": {"max_dorp": 1}, "samples": "", "stages": []}')
    misspelt = check(out, baseline)
    assert misspelt.exit_code == 2
    assert 'did you mean "max_drop"?' in misspelt.output
    for content, message in (("[]", '"baseline" is a list'), ("{}", "add it to the baseline")):
        baseline.write_text(content)
        other = check(out, baseline, "--update")
        assert other.exit_code == 2
        assert message in other.output
    baseline.write_text("{")
    assert "or delete it" in check(out, baseline, "--update").output, "limits of an unreadable file cannot be kept"
    folder = check(out, out)
    assert folder.exit_code == 2
    assert "cannot be read: Is a directory" in folder.output


def test_what_is_only_warned_of_is_said_in_the_last_line(out: Path, baseline: Path) -> None:
    edit(baseline, lambda values: values["gate"].update(min_samples=1000, on_fail="warn"))
    result = check(out, baseline)
    assert result.exit_code == 0
    last = " ".join(result.output.split("\n\n")[-1].split())
    assert "the gate of the baseline only warns" in last
    assert "within the limits" not in last


def test_junit_is_red_exactly_when_the_exit_code_is(out: Path, baseline: Path) -> None:
    path = out / "check.xml"
    check(out, baseline, "--junit", str(path))
    green = ElementTree.parse(path)
    assert not list(green.iter("failure"))
    assert len(list(green.iter("testcase"))) >= 6
    edit(baseline, lambda values: values["gate"].update(max_drop=0.0, min_samples=1000))
    assert check(out, baseline, "--junit", str(path)).exit_code == 1
    red = ElementTree.parse(path)
    suites = {suite.get("name"): int(suite.get("failures", "")) for suite in red.iter("testsuite")}
    assert suites[PASS_STAGE] == 2
    assert sum(suites.values()) == len(list(red.iter("failure")))


def test_github_gets_annotations_and_a_summary(out: Path, baseline: Path, tmp_path: Path) -> None:
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)}
    assert "::" not in check(out, baseline, **github).output
    edit(baseline, lambda values: values["gate"].update(min_samples=1000))
    result = check(out, baseline, **github)
    assert f"::error title=headwise check%3A {PASS_STAGE} digit accuracy::FAIL, 60 samples are fewer" in result.output
    written = page.read_text()
    assert written.startswith("before\n# headwise check: passed")
    assert "# headwise check: failed" in written
    assert f"| {PASS_STAGE} | digit | accuracy |" in written
    assert "::error" not in check(out, baseline).output


def test_compress_tells_github_what_failed(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "summary.md"
    env = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page), "COLUMNS": "200", "TERM": "dumb"}
    folder = out.parent
    arguments = ["compress", str(folder / "checkpoint"), "--recipe", str(folder / "recipe.yaml"), "--out", str(out)]
    result = CliRunner(env=env).invoke(main, [*arguments, "--set", "gate.min_samples=1000"])
    assert result.exit_code == 1
    assert "::error title=headwise%3A baseline::" in result.output
    assert page.read_text().startswith("# headwise: fail")
