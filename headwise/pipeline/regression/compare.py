"""Judge a finished run again with a baseline's limits: from saved per-sample results, without model, data or GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwise.artifacts import Miss, reopen
from headwise.errors import DataError, StorageError
from headwise.gates.judge import GateSpec, Outcome, Verdict, judge_all
from headwise.gates.measure import SAMPLES, Measurement, load_measurements
from headwise.gates.speed import GATE as SPEED
from headwise.pipeline.regression.baseline import Accepted, AcceptedStage, Baseline, drop
from headwise.pipeline.report.document import read_report
from headwise.pipeline.report.summary import Stage
from headwise.pipeline.speeds import deployed, judge_stage

_MADE = frozenset({"passed", "warned", "failed"})
_SAME = 1e-6
"""Saved samples and report come from one computation; between them lies only the rounding of JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What became of one metric of one output at one stage.

    Attributes:
        stage, output, metric, unit: what; the output and the metric are empty where it is about the whole stage.
        was: drop in the baseline, in the metric's unit; None where the baseline does not have it.
        now: drop in this run; None where it was not measured.
        verdict: under the baseline's limits; None for metrics that no gate judges.
        tolerated: the baseline's gate only warns here.
        required: the baseline has it measured, so that "not run" is no answer.
    """

    stage: str
    output: str = ""
    metric: str = ""
    unit: str = ""
    was: float | None = None
    now: float | None = None
    verdict: Verdict | None = None
    tolerated: bool = False
    required: bool = False

    @property
    def bad(self) -> bool:
        """Whether the verdict is a no."""
        return self.verdict is not None and self.verdict.outcome not in (Outcome.PASS, Outcome.NOT_RUN)

    @property
    def unrun(self) -> bool:
        """Whether a check that the baseline has was not run."""
        return self.required and self.verdict is not None and self.verdict.outcome is Outcome.NOT_RUN

    @property
    def change(self) -> float | None:
        """How much worse than in the baseline; None where one of the two is missing."""
        return None if self.was is None or self.now is None else self.now - self.was

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {name: getattr(self, name) for name in ("stage", "output", "metric", "unit", "was", "now", "change")}
        verdict = None if self.verdict is None else self.verdict.to_json()
        return {**plain, "verdict": verdict, "tolerated": self.tolerated, "required": self.required}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run beside a baseline.

    Attributes:
        folder: of the run.
        findings: in the order of the stages.
    """

    folder: Path
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 passed, 1 a verdict is a no, 4 a check that the baseline has could not run here."""
        if any(finding.bad and not finding.tolerated for finding in self.findings):
            return 1
        return 4 if any(finding.unrun for finding in self.findings) else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        findings = [finding.to_json() for finding in self.findings]
        return {"run": str(self.folder), "exit_code": self.exit_code, "findings": findings}


def compare(folder: Path, baseline: Baseline) -> Comparison:
    """Judge a run's saved results with a baseline's limits, and say what moved.

    Args:
        folder: the ``--out`` of ``headwise compress``; ``report.json`` and the ``*.measured`` folders are enough.
        baseline: limits, and what was accepted.

    Raises:
        DataError: there is no report.
        StorageError: results are missing or damaged.
    """
    report = read_report(folder)
    if report.get("tiny"):
        raise DataError(
            f"{folder} is a tiny run, whose accuracy means nothing",
            expected="a run of the whole model",
            fix="run headwise compress without --tiny; a tiny run is judged by its own exit code",
        )
    found: list[Finding] = []
    accepted = {stage.name: stage for stage in baseline.stages}
    if baseline.samples != report["data"]["task"]["digest"]:
        reason = "judged on other samples than the baseline; where that is meant, accept it with --update"
        found.append(_whole_stage("samples", Outcome.FAIL, reason))
    named = deployed((stage["name"], stage["kind"]) for stage in report["stages"])
    for stage in report["stages"]:
        found += _stage_findings(folder, stage, accepted.get(stage["name"]), baseline.gate)
        if stage["status"] in _MADE or stage["status"] == "not-run":
            limits = baseline.gate.for_stage(stage["name"], stage["kind"])
            found += [_other(verdict, limits) for verdict in judge_stage(stage, baseline.gate, named)]
    names = {stage["name"] for stage in report["stages"]}
    for name in accepted:
        if name not in names:
            found.append(_whole_stage(name, Outcome.FAIL, "the run has no such stage, the baseline has"))
    return Comparison(folder=folder, findings=tuple(found))


def accept(folder: Path, path: Path) -> Comparison:
    """Make a run the baseline, under the limits that the baseline has, or the recipe's where there is none yet.

    Nothing is written where the run does not pass under these limits.

    Raises:
        DataError: there is no report, or ``path`` is no baseline.
        StorageError: results are missing or damaged, or ``path`` cannot be written.
    """
    report = read_report(folder)
    gate = Baseline.read(path).gate if path.exists() else GateSpec.model_validate(report["recipe"]["gate"])
    baseline = Baseline.of(report, gate)
    comparison = compare(folder, baseline)
    if comparison.exit_code != 1:
        baseline.write(path)
    return comparison


def _stage_findings(folder: Path, stage: Stage, was: AcceptedStage | None, gate: GateSpec) -> Iterator[Finding]:
    name, status = stage["name"], stage["status"]
    limits = gate.for_stage(name, stage["kind"])
    before = {(m.output, m.metric): m for m in was.metrics} if was else {}
    if status in _MADE:
        yield from _judged(folder, stage, before, limits)
    elif status == "rolled-back":
        undone = was is not None and was.status != "rolled-back"
        reason = f"rolled back, {'but not' if undone else 'as'} in the baseline" if was else "rolled back"
        yield _whole_stage(name, Outcome.FAIL if undone else Outcome.NOT_RUN, f"{reason}: {stage['reason']}")
    elif status == "not-run":
        yield replace(_whole_stage(name, Outcome.NOT_RUN, stage["reason"]), required=bool(before))
    else:
        yield _whole_stage(name, Outcome.FAIL, f"{status}: {stage['reason'] or 'the run ended before it'}")
    for verdict in map(Verdict.from_json, stage["verdicts"]):
        # Not about samples, so that there is nothing to judge again.
        if verdict.gate not in ("accuracy", SPEED):
            yield _other(verdict, limits)


def _other(verdict: Verdict, limits: GateSpec) -> Finding:
    return Finding(
        stage=verdict.stage,
        output=verdict.output,
        metric=verdict.metric,
        verdict=verdict,
        tolerated=limits.on_fail == "warn",
    )


def _judged(folder: Path, stage: Stage, before: dict[tuple[str, str], Accepted], limits: GateSpec) -> Iterator[Finding]:
    name = stage["name"]
    metrics = {(metric["output"], metric["metric"]): metric for metric in stage["metrics"]}
    if stage["kind"] == "baseline":
        # The untouched model compared with itself has no per-sample results of its own.
        verdicts: Sequence[Verdict] = [Verdict.from_json(verdict) for verdict in stage["verdicts"]]
    else:
        verdicts = judge_all(_measurements(folder, stage), limits, name)
    decided = {(verdict.output, verdict.metric): verdict for verdict in verdicts if verdict.gate == "accuracy"}
    tolerated = limits.on_fail == "warn"
    for key in dict.fromkeys((*metrics, *decided, *before)):
        old, new, verdict = before.get(key), metrics.get(key), decided.get(key)
        if verdict is None and new is None:
            verdict = _failure(name, *key, "the run does not measure it, the baseline does")
        yield Finding(
            stage=name,
            output=key[0],
            metric=key[1],
            unit=new["unit"] if new else old.unit if old else "",
            was=old.drop if old else None,
            now=drop(new) if new else None,
            verdict=verdict,
            tolerated=tolerated,
        )


def _measurements(folder: Path, stage: Stage) -> Sequence[Measurement]:
    """Saved per-sample results of a stage, which are those that the report was written from."""
    measured = folder / f"{stage['folder']}.measured"
    stored = reopen(measured)
    if isinstance(stored, Miss):
        raise StorageError(
            f"{measured}: {stored.reason}",
            expected="the per-sample results of the stage, as headwise compress wrote them",
            fix="keep the *.measured folders together with report.json, or run headwise compress again",
        )
    found = load_measurements(measured / SAMPLES)
    written = {(metric["output"], metric["metric"]): metric["value"] for metric in stage["metrics"]}
    for measurement in found:
        value = written.get((measurement.output, measurement.metric))
        _, again = measurement.values()
        if not _agree(value, again):
            raise StorageError(
                f"{measured} and the report do not belong together: {measurement.output} {measurement.metric} is "
                f"{again:.4g} in one and {value} in the other",
                expected="the results that the report was written from",
                fix="run headwise compress again: finished stages are kept, and the report is written anew",
            )
    return found


def _agree(written: float | None, again: float) -> bool:
    if written is None or math.isnan(again):
        return written is None and math.isnan(again)
    return math.isclose(written, again, rel_tol=_SAME, abs_tol=_SAME)


def _whole_stage(stage: str, outcome: Outcome, reason: str) -> Finding:
    return Finding(stage=stage, verdict=replace(_failure(stage, "", "", reason), outcome=outcome))


def _failure(stage: str, output: str, metric: str, reason: str) -> Verdict:
    return Verdict(
        stage=stage, output=output, metric=metric, outcome=Outcome.FAIL, limit=math.nan, samples=0, reason=reason
    )
