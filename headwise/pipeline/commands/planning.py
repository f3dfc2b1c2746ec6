"""What the passes of a recipe would do to a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.model.checkpoint import load_checkpoint
from headwise.model.layout import Layout
from headwise.passes.base import make_plan, run_pass
from headwise.pipeline.monitor import Monitor, Silent, Steps
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.report.head_maps import describe
from headwise.pipeline.report.neuron_tables import PLANNED, neuron_rows, removes_neurons
from headwise.pipeline.timing import Timing
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
    for index, pass_ in enumerate(resolved.edits):
        before = edited.layout
        watcher.start(resolved.stage_names()[1 + index][0])
        shared: dict[str, Any] = {
            "seed": resolved.seed,
            "batch_size": resolved.batch_size,
            "sequence": workspace.sequence,
            "latency": Timing(workspace, watcher).table(edited) if pass_.timed else None,
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
        if index + 1 < len(resolved.edits):
            run_pass(pass_, edited, teacher, workspace.task, workspace.calibration, **shared)
    return plans


def plan_table(plans: Sequence[dict[str, Any]]) -> RenderableType:
    """The same for a terminal: per layer the counts before and after, and what would become of which head."""
    parts: list[RenderableType] = [] if plans else [Text("the recipe has no passes")]
    for entry in plans:
        parts.append(Text(_title(entry), style="bold"))
        if entry["plan"]["summary"]:
            parts.append(Text(entry["plan"]["summary"]))
        if entry["before"]["attention"] != entry["after"]["attention"] or not removes_neurons(entry["plan"]):
            parts.append(_head_table(entry))
        if removes_neurons(entry["plan"]):
            table = Table(*PLANNED)
            for row in neuron_rows(entry):
                table.add_row(*row)
            parts.append(table)
    return Group(*parts)


def _head_table(entry: dict[str, Any]) -> Table:
    table = Table("layer", "query heads", "kv heads", _heading(entry["plan"]))
    for layer, (before, after) in enumerate(_layers(entry)):
        counts = (f"{len(before[key])} -> {len(after[key])}" for key in ("query", "kv"))
        table.add_row(str(layer), *counts, _heads(entry["plan"], layer, before, after))
    return table


def _title(entry: dict[str, Any]) -> str:
    before, after = (_counts(entry[when]) for when in ("before", "after"))
    gone = {name: had - after[name] for name, had in before.items() if had > after[name]}
    if "query heads" in gone or "kv heads" in gone:
        # Queries, keys and numbers went with their heads.
        gone = {name: count for name, count in gone.items() if name.endswith(("heads", "neurons"))}
    counts = ", ".join(f"{count} of {before[name]} {name}" for name, count in gone.items())
    return f"{entry['pass']}: {counts or 'nothing'} would go"


def _counts(layout: dict[str, Any]) -> dict[str, int]:
    """What all layers have together; a clustered layer has fewer queries and keys than heads."""
    found = Layout.from_json(layout)
    layouts = found.attention
    return {
        "query heads": sum(len(entry.query) for entry in layouts),
        "kv heads": sum(len(entry.kv) for entry in layouts),
        "queries": sum(len(entry.scoring) for entry in layouts),
        "keys": sum(len(entry.keyed) for entry in layouts),
        "kv numbers per token": sum(entry.kv_width for entry in layouts),
        "neurons": sum(len(mlp.neurons) for mlp in found.mlp),
    }


def _layers(entry: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every attention layer before and after the pass."""
    return list(zip(entry["before"]["attention"], entry["after"]["attention"], strict=True))


def _heading(plan: dict[str, Any]) -> str:
    if plan["scores"] is None:
        return "change"
    return f"{plan['scores']['name']} score of every head, removed ones crossed out"


def _heads(plan: dict[str, Any], layer: int, before: dict[str, Any], after: dict[str, Any]) -> Text:
    if plan["scores"] is None:
        return Text(describe(plan, layer))
    cells = Text()
    for head in before["query"]:
        gone = head not in after["query"]
        cells.append(f"{head}:{plan['scores']['layers'][layer][str(head)]:.3g}", style="strike red" if gone else "")
        cells.append("  ")
    return cells
