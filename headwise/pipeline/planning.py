"""What the passes of a recipe would do to a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.model.checkpoint import load_checkpoint
from headwise.passes.base import make_plan, run_pass
from headwise.pipeline.monitor import Monitor, Silent, Steps
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.workspace import Workspace


def plan_passes(
    checkpoint: str, recipe: str, overrides: Sequence[str] = (), *, monitor: Monitor | None = None
) -> list[dict[str, Any]]:
    """One entry per pass: its options, its plan with scores, and the layout before and after.

    A later pass is planned on the result of the earlier ones, which are made in memory only.
    """
    watcher: Monitor = monitor or Silent()
    resolved = load_recipe(recipe, overrides)
    workspace = Workspace(load_checkpoint(checkpoint), resolved)
    edited = workspace.checkpoint.copy().view()
    teacher = workspace.checkpoint.copy().view()
    plans = []
    for index, pass_ in enumerate(resolved.passes):
        before = edited.layout
        watcher.start(resolved.stage_names()[1 + index][0])
        shared: dict[str, Any] = {
            "seed": resolved.seed,
            "batch_size": resolved.batch_size,
            "progress": Steps(watcher, len(workspace.calibration)),
        }
        plan, _ = make_plan(pass_, edited, workspace.task, workspace.calibration, **shared)
        plans.append(
            {
                "pass": pass_.name,
                "options": pass_.model_dump(mode="json"),
                "plan": plan.to_json(),
                "before": before.to_json(),
                "after": plan.predict(before).to_json(),
            }
        )
        if index + 1 < len(resolved.passes):
            run_pass(pass_, edited, teacher, workspace.task, workspace.calibration, **shared)
    return plans


def plan_table(plans: Sequence[dict[str, Any]]) -> RenderableType:
    """The same for a terminal: per layer the counts before and after, and what would become of which head."""
    parts: list[RenderableType] = [] if plans else [Text("the recipe has no passes")]
    for entry in plans:
        table = Table("layer", "query heads", "kv heads", _heading(entry["plan"]))
        for layer, (before, after) in enumerate(_layers(entry)):
            counts = (f"{len(before[key])} -> {len(after[key])}" for key in ("query", "kv"))
            table.add_row(str(layer), *counts, _heads(entry["plan"], layer, before, after))
        parts += [Text(_title(entry), style="bold"), table]
    return Group(*parts)


def _title(entry: dict[str, Any]) -> str:
    gone = {key: sum(len(b[key]) - len(a[key]) for b, a in _layers(entry)) for key in ("query", "kv")}
    totals = {key: sum(len(before[key]) for before, _ in _layers(entry)) for key in ("query", "kv")}
    counts = ", ".join(f"{gone[key]} of {totals[key]} {key} heads" for key in ("query", "kv") if gone[key])
    return f"{entry['pass']}: {counts or 'no heads'} would go"


def _layers(entry: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every attention layer before and after the pass."""
    return list(zip(entry["before"]["attention"], entry["after"]["attention"], strict=True))


def _heading(plan: dict[str, Any]) -> str:
    if plan["scores"] is None:
        return "kv heads that become one"
    return f"{plan['scores']['name']} score of every head, removed ones crossed out"


def _heads(plan: dict[str, Any], layer: int, before: dict[str, Any], after: dict[str, Any]) -> Text:
    if plan["scores"] is None:
        groups = [group for edit in plan["edits"] if edit["layer"] == layer for group in edit.get("groups", ())]
        return Text("  ".join("+".join(map(str, group)) for group in groups) or "unchanged")
    cells = Text()
    for head in before["query"]:
        gone = head not in after["query"]
        cells.append(f"{head}:{plan['scores']['layers'][layer][str(head)]:.3g}", style="strike red" if gone else "")
        cells.append("  ")
    return cells
