"""The whole flow: checkpoint -> passes -> ONNX -> precision or quantization -> engines, each with a gate after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headwise.errors import HeadwiseError, RecipeError
from headwise.model.checkpoint import load_checkpoint
from headwise.model.tiny import tiny_checkpoint
from headwise.pipeline.monitor import Monitor, Silent
from headwise.pipeline.recipe import Recipe, is_cpu, load_recipe
from headwise.pipeline.report.document import write_report
from headwise.pipeline.results import Results, Stopped
from headwise.pipeline.stages import Stages, check_targets
from headwise.pipeline.store import Store
from headwise.pipeline.tiny import CHECKPOINT, FOLDER, shrink
from headwise.pipeline.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a run ended.

    Attributes:
        outcome: ``pass``, ``warn``, ``fail``, ``not-run``, ``error`` or ``interrupted``.
        exit_code: 0 passed, 1 a gate said no, 2 bad recipe or input, 3 a stage failed, 4 this machine cannot do it,
            130 interrupted.
        reason: one line.
        folder: where the stages and the report are.
        report: the content of ``report.json``.
    """

    outcome: str
    exit_code: int
    reason: str
    folder: Path
    report: Mapping[str, Any]


def compress(
    checkpoint: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = True,
    require_engine_run: bool = False,
    tiny: bool = False,
    monitor: Monitor | None = None,
) -> Run:
    """Compress a checkpoint as a recipe says, and judge every stage against the untouched model.

    Args:
        checkpoint: a directory, a hub id, or ``module:factory`` of a plain PyTorch model.
        recipe: a YAML file, its content, or a validated recipe.
        out: folder for the stages, ``report.json``, ``report.html``, ``report.md`` and ``report.xml``.
        overrides: ``key.path=value`` changes to the recipe.
        resume: reuse finished stages whose inputs have not changed.
        require_engine_run: end with exit code 4 when an engine could not be run on this machine.
        tiny: run the recipe on a model of the checkpoint's architecture with two layers and random weights, with few
            samples, into ``out/tiny``: every stage has to work, accuracy is not judged. See docs/ci.md.
        monitor: receives progress.

    Returns:
        The outcome; a failed gate is an outcome, not an exception.

    Raises:
        HeadwiseError: the recipe, the checkpoint or the data cannot be used, so that no stage began.
    """
    folder = Path(out) / FOLDER if tiny else Path(out)
    watcher: Monitor = monitor or Silent()
    start = time.perf_counter()
    try:
        watcher.start("load")
        resolved = _resolve(recipe, overrides)
        if require_engine_run and not resolved.targets:
            raise RecipeError(
                "an engine run is required, but the recipe has no targets",
                expected="at least one target whose engine can be run",
                fix="add targets: [sm86] to the recipe, or do not require it",
            )
        workspace = _tiny(checkpoint, resolved, folder) if tiny else _workspace(checkpoint, resolved)
        results = Results(workspace, folder, watcher, require_engine_run=require_engine_run)
        stages = Stages(workspace, results, Store(folder, watcher, resume=resume), watcher)
        _run_stages(workspace.recipe, stages, results)
        watcher.start("report")
        report = results.report(time.perf_counter() - start)
        write_report(report, folder)
    finally:
        watcher.close()
    return Run(
        outcome=report["outcome"], exit_code=report["exit_code"], reason=report["reason"], folder=folder, report=report
    )


def check(
    checkpoint: str | Path, recipe: str | Path | Mapping[str, Any] | Recipe, *, overrides: Sequence[str] = ()
) -> str:
    """Everything that ``compress`` checks before the first stage, and the recipe with all defaults, as YAML.

    Raises:
        HeadwiseError: what ``compress`` would raise.
    """
    resolved = _resolve(recipe, overrides)
    _workspace(checkpoint, resolved)
    return yaml.safe_dump(resolved.to_json(), sort_keys=False)


def _resolve(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe, with targets that can do what it asks of them."""
    if isinstance(recipe, Recipe):
        resolved = load_recipe(recipe.to_json(), overrides) if overrides else recipe
    else:
        resolved = load_recipe(recipe, overrides)
    check_targets(resolved)
    return resolved


def _workspace(checkpoint: str | Path, recipe: Recipe) -> Workspace:
    """Model and data, with attention layers that can be edited."""
    loaded = load_checkpoint(checkpoint)
    loaded.copy().view()
    return Workspace(loaded, recipe)


def _tiny(checkpoint: str | Path, recipe: Recipe, folder: Path) -> Workspace:
    """The same for a small model of the checkpoint's architecture, which is written to ``folder``."""
    small = tiny_checkpoint(checkpoint, folder / CHECKPOINT)
    return Workspace(small, shrink(recipe, len(small.copy().view().attention)), tiny=True)


def _run_stages(recipe: Recipe, stages: Stages, results: Results) -> None:
    """The flow. Every call ends with a gate; a gate that says stop ends the flow."""
    results.expect(recipe.stage_names())
    try:
        model, dense = stages.baseline()
        for index in range(len(recipe.edits)):
            model = stages.apply_pass(index, model)
        exported = stages.export(model, dense)
        graph = exported
        if recipe.for_tensorrt:
            graph = stages.quantize(exported, stages.convert(exported))
        for target in recipe.targets:
            if is_cpu(target):
                stages.deploy(exported, target)
            else:
                stages.build(graph, target)
        results.end()
    except (Stopped, HeadwiseError, KeyboardInterrupt) as ending:
        results.end(ending)
