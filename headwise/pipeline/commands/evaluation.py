"""Measure one artifact on its own: a checkpoint, an ONNX graph or an engine, with the task code of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.calibration.tasks import make_task
from headwise.errors import DataError
from headwise.export.opening import open_runner
from headwise.export.runners import Runner, TorchRunner
from headwise.export.variants import ENGINES
from headwise.gates.judge import Outcome, judge_all
from headwise.gates.measure import Measurement, Predictions, measure, predict
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.pipeline.folders import is_run, untouched_model
from headwise.pipeline.monitor import Monitor, Silent
from headwise.pipeline.recipe import Recipe, load_recipe
from headwise.pipeline.report.document import read_report
from headwise.pipeline.workspace import Workspace


def evaluate_artifact(
    artifact: str,
    recipe: str,
    *,
    reference: str | None = None,
    overrides: Sequence[str] = (),
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Metrics of one artifact; with a reference also fidelity, verdicts and their exit code.

    Raises:
        DataError: a graph without a reference that does not lie in a run's folder, so that nothing can feed it, or a
            task that compares with the untouched model and no reference.
        MachineError: an engine where there is no GPU.
    """
    watcher: Monitor = monitor or Silent()
    path = Path(artifact)
    is_graph = path.suffix == ".onnx" or path.suffix in ENGINES
    # Nothing is compressed here: calibration data need not even be on this machine.
    resolved = load_recipe(recipe, overrides).model_copy(update={"passes": (), "calibration": None})
    if is_graph and not path.exists():
        raise DataError(f"{path} does not exist", expected="a graph or an engine", fix="check the path")
    if reference is None:
        _require_metrics(resolved)
    workspace = Workspace(load_checkpoint(reference or _source(path, artifact, is_graph)), resolved)

    def run(runner: Runner) -> tuple[Predictions, str]:
        with runner:
            advance = watcher.work(f"{len(workspace.examples)} samples on {runner.name}", len(workspace.examples))
            found = predict(
                runner, workspace.task, workspace.examples, batch_size=resolved.batch_size, progress=advance
            )
            return found, runner.name

    candidate, name = run(_runner(path, artifact, is_graph, workspace.checkpoint))
    compared = candidate if reference is None else run(TorchRunner(workspace.checkpoint.module))[0]
    found = measure(workspace.task, workspace.examples, compared, candidate)
    verdicts = () if reference is None else judge_all(found, resolved.gate, "evaluate")
    return {
        "artifact": artifact,
        "runner": name,
        "reference": reference,
        "samples": len(workspace.examples),
        "data": workspace.examples.source,
        "metrics": _metrics(found, judged=reference is not None),
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "exit_code": 0 if all(verdict.outcome is Outcome.PASS for verdict in verdicts) else 1,
    }


def _require_metrics(recipe: Recipe) -> None:
    if not make_task(recipe.task).metrics():
        raise DataError(
            f"the task {recipe.task.type} measures the distance to the untouched model, and none was named",
            expected="something to compare with",
            fix="add --reference CHECKPOINT, or give the task labels and a metric",
        )


def _metrics(found: Sequence[Measurement], *, judged: bool) -> list[dict[str, Any]]:
    """Values, and references where there is one: without it, fidelity would be that of a model to itself."""
    metrics = []
    for measurement in found:
        reference, value = measurement.values()
        entry = {"output": measurement.output, "metric": measurement.metric, "unit": measurement.unit, "value": value}
        if judged:
            metrics.append({**entry, "reference": reference})
        elif measurement.judged:
            metrics.append(entry)
    return metrics


def _runner(path: Path, artifact: str, is_graph: bool, checkpoint: Checkpoint) -> Runner:
    if not is_graph:
        same = artifact == checkpoint.source
        return TorchRunner(checkpoint.copy().module if same else load_checkpoint(artifact).module)
    return open_runner(path)


def _source(path: Path, artifact: str, is_graph: bool) -> str:
    """The checkpoint that feeds the artifact: itself, or the untouched one of the run whose folder it lies in."""
    if not is_graph:
        return artifact
    run = path.resolve().parent.parent
    if not is_run(run):
        raise DataError(
            f"{path} does not say which checkpoint it came from",
            expected="a file inside the folder of a run, or --reference",
            fix="add --reference CHECKPOINT: its tokenizer or image processor feeds the graph",
        )
    return untouched_model(read_report(run))


def evaluation_table(found: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    table = Table("output", "metric", "value", *(["reference", "verdict"] if found["reference"] else []))
    verdicts = {(v["output"], v["metric"]): v for v in found["verdicts"]}
    for entry in found["metrics"]:
        cells = [entry["output"], entry["metric"], f"{entry['value']:.4f} {entry['unit']}"]
        if found["reference"]:
            verdict = verdicts.get((entry["output"], entry["metric"]))
            cells += [f"{entry['reference']:.4f}", verdict["outcome"] if verdict else "not judged"]
        table.add_row(*cells)
    return Group(Text(f"{found['artifact']} on {found['runner']}: {found['samples']} samples"), table)
