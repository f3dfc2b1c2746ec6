"""Measure one artifact on its own: a checkpoint, an ONNX graph or an engine, with the task code of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.errors import DataError
from headwise.export.runners import EngineRunner, OrtRunner, Runner, TorchRunner
from headwise.gates.judge import Outcome, judge_all
from headwise.gates.measure import measure, predict
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.report import read_report
from headwise.pipeline.workspace import Workspace

ENGINES = {".engine", ".plan", ".trt"}


def evaluate_artifact(
    artifact: str, recipe: str, *, reference: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Metrics of one artifact; with a reference also fidelity, verdicts and their exit code.

    Raises:
        DataError: a graph without a reference that does not lie in a run's folder, so that nothing can feed it.
        MachineError: an engine where there is no GPU.
    """
    path = Path(artifact)
    is_graph = path.suffix == ".onnx" or path.suffix in ENGINES
    resolved = load_recipe(recipe, overrides)
    judged = reference is not None
    source = reference or (_checkpoint_of_run(path) if is_graph else artifact)
    workspace = Workspace(load_checkpoint(source), resolved)
    task, examples, size = workspace.task, workspace.examples, resolved.batch_size
    with _runner(path, artifact, is_graph, workspace.checkpoint) as runner:
        candidate = predict(runner, task, examples, batch_size=size)
        name = runner.name
    compared = candidate
    if judged:
        with TorchRunner(workspace.checkpoint.module) as runner:
            compared = predict(runner, task, examples, batch_size=size)
    found = measure(task, examples, compared, candidate)
    gate = resolved.gate.for_stage("evaluate", "evaluate")
    verdicts = judge_all(found, gate, "evaluate") if judged else ()
    metrics = []
    for measurement in found:
        if not judged and not measurement.judged:
            continue
        reference_value, value = measurement.values()
        entry = {"output": measurement.output, "metric": measurement.metric, "unit": measurement.unit, "value": value}
        metrics.append({**entry, "reference": reference_value} if judged else entry)
    return {
        "artifact": artifact,
        "runner": name,
        "reference": reference,
        "samples": len(examples),
        "data": examples.source,
        "metrics": metrics,
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "exit_code": 0 if all(verdict.outcome is Outcome.PASS for verdict in verdicts) else 1,
    }


def _runner(path: Path, artifact: str, is_graph: bool, checkpoint: Checkpoint) -> Runner:
    if not is_graph:
        same = artifact == checkpoint.source
        return TorchRunner(checkpoint.copy().module if same else load_checkpoint(artifact).module)
    if not path.exists():
        raise DataError(f"{path} does not exist", expected="a graph or an engine", fix="check the path")
    if path.suffix == ".onnx":
        return OrtRunner(path)
    return EngineRunner(path)


def _checkpoint_of_run(path: Path) -> str:
    """The untouched checkpoint of the run whose folder the artifact lies in."""
    run = path.resolve().parent.parent
    if not (run / "report.json").exists():
        raise DataError(
            f"{path} does not say which checkpoint it came from",
            expected="a file inside the folder of a run, or --reference",
            fix="add --reference CHECKPOINT: its tokenizer or image processor feeds the graph",
        )
    return str(read_report(run)["checkpoint"]["source"])


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
