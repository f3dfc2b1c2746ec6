"""The command line: parse, call, print, set the exit code. Decisions are made elsewhere.

Heavy modules are imported inside the commands, so that ``headwise --help`` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from headwise.cli.bench import bench
from headwise.cli.bundle import bundle
from headwise.cli.common import (
    CHECKPOINT_HELP,
    EXIT_CODES,
    errors_to_exit_codes,
    progress,
    show,
    show_or_dump,
)
from headwise.cli.convert import convert, to_hf
from headwise.cli.text import cost, generate
from headwise.device.cli import verify
from headwise.errors import RecipeError
from headwise.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="headwise")
def main() -> None:
    """Make a trained multi-head transformer smaller and faster, and measure every step against the untouched model."""


@main.command(epilog=EXIT_CODES)
@click.option("--out", default="headwise-demo", show_default=True, help="Folder for the model, its data and the run.")
@errors_to_exit_codes
def demo(out: str) -> int:
    """Train a small two-headed model and compress it.

    Takes about two minutes on two CPU cores and needs no download. Copy DIR/recipe.yaml as a start for your own.
    """
    with progress() as monitor:
        from headwise.demo.run import run_demo
        from headwise.pipeline.report.document import terminal

        run = run_demo(Path(out), monitor)
    show(terminal(run.report))
    click.echo(f"Your own recipe can start from {Path(out) / 'recipe.yaml'}\nReport: {run.folder / 'report.html'}")
    return run.exit_code


@main.command(epilog=CHECKPOINT_HELP)
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--sequence",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens to count multiply-accumulates for.",
)
@errors_to_exit_codes
def inspect(checkpoint: str, as_json: bool, sequence: int) -> None:
    """Show the attention layers and the cost of a checkpoint."""
    with progress():
        from headwise.pipeline.commands.inspection import inspect_checkpoint, inspection_table

        found = inspect_checkpoint(checkpoint, sequence)
    show_or_dump(found, inspection_table, as_json=as_json)


@main.command(epilog=CHECKPOINT_HELP)
@click.argument("checkpoint")
@click.option("--recipe", required=True, help="YAML recipe.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: passes.0.ratio=0.25")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@errors_to_exit_codes
def plan(checkpoint: str, recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what the passes of a recipe would remove, and why.

    Changes nothing and writes nothing.
    """
    with progress() as monitor:
        from headwise.pipeline.commands.planning import plan_passes, plan_table

        plans = plan_passes(checkpoint, recipe, overrides, monitor=monitor)
    show_or_dump(plans, plan_table, as_json=as_json)


@main.command(epilog=CHECKPOINT_HELP + EXIT_CODES)
@click.argument("checkpoint")
@click.option("--recipe", required=True, help="YAML recipe; `headwise schema` prints what it may hold.")
@click.option("--out", required=True, help="Folder for the stages and the report.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: passes.0.ratio=0.25")
@click.option("--no-resume", is_flag=True, help="Make every stage again, also finished ones.")
@click.option("--dry-run", is_flag=True, help="Check recipe, checkpoint, data and targets, print the recipe, and stop.")
@click.option("--require-engine-run", is_flag=True, help="Exit 4 when an engine cannot be run on this machine.")
@click.option(
    "--tiny",
    is_flag=True,
    help="Try the recipe on two layers of random weights, into OUT/tiny; judges no accuracy.",
)
@errors_to_exit_codes
def compress(
    checkpoint: str,
    recipe: str,
    out: str,
    overrides: tuple[str, ...],
    no_resume: bool,
    dry_run: bool,
    require_engine_run: bool,
    tiny: bool,
) -> int:
    """Run a recipe on a checkpoint, with a gate after every stage.

    The stages are the passes, the ONNX graph, its precision and the engines. The same command continues a run that
    was interrupted, and makes again only what a change to its inputs asks for.
    """
    if tiny and dry_run:
        raise RecipeError(
            "--tiny and --dry-run together",
            expected="one of them: --dry-run checks the real checkpoint, --tiny runs another one",
            fix="leave one out",
        )
    with progress() as monitor:
        from headwise.pipeline.report.document import terminal
        from headwise.pipeline.run import check, compress

        if dry_run:
            resolved = check(checkpoint, recipe, overrides=overrides)
        else:
            run = compress(
                checkpoint,
                recipe,
                out,
                overrides=overrides,
                resume=not no_resume,
                require_engine_run=require_engine_run,
                tiny=tiny,
                monitor=monitor,
            )
    if dry_run:
        click.echo(resolved)
        return 0
    show(terminal(run.report))
    click.echo(f"Report: {run.folder / 'report.html'}")
    _tell_ci(run.report)
    return run.exit_code


@main.command(epilog=EXIT_CODES)
@click.argument("artifact")
@click.option("--recipe", required=True, help="YAML recipe; its task says how to measure.")
@click.option("--reference", help="The untouched checkpoint: adds fidelity and the gate's verdicts, feeds graphs.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: gate.max_drop=0.5")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@errors_to_exit_codes
def evaluate(artifact: str, recipe: str, reference: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Measure a checkpoint, a graph or an engine with a recipe's task.

    A graph or an engine from a run knows its checkpoint; name it with --reference otherwise.
    """
    with progress() as monitor:
        from headwise.pipeline.commands.evaluation import evaluate_artifact, evaluation_table

        found = evaluate_artifact(artifact, recipe, reference=reference, overrides=overrides, monitor=monitor)
    show_or_dump(found, evaluation_table, as_json=as_json)
    return int(found["exit_code"])


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--html", "form", flag_value="html", help="Print the HTML page.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown.")
@click.option("--junit", "form", flag_value="junit", help="Print JUnit XML.")
@errors_to_exit_codes
def report(directory: Path, form: str | None) -> None:
    """Show the report of a run again. DIRECTORY is the --out of `headwise compress`."""
    from headwise.pipeline.report import document
    from headwise.pipeline.report.html import html

    found = document.read_report(directory)
    if form is None:
        show(document.terminal(found))
    else:
        click.echo({"html": html, "markdown": document.markdown, "junit": document.junit}[form](found))


@main.command(epilog=EXIT_CODES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), required=True, help="The baseline, a JSON file beside your code."
)
@click.option("--update", is_flag=True, help="Make this run the baseline, if it passes; the limits stay as they are.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@errors_to_exit_codes
def check(directory: Path, against: Path, update: bool, junit: Path | None, as_json: bool) -> int:
    """Judge a finished run with the limits of a baseline.

    Needs neither the model nor the data nor a GPU: DIRECTORY is the --out of `headwise compress`, of which report.json
    and the *.measured folders are enough. The limits are those of the baseline, so that a changed recipe cannot loosen
    them. In a job of GitHub the result is also an annotation and a part of the job summary.
    """
    from headwise.artifacts import write_atomic
    from headwise.pipeline.regression import texts
    from headwise.pipeline.regression.baseline import Baseline
    from headwise.pipeline.regression.compare import accept, compare
    from headwise.pipeline.report import ci

    found = accept(directory, against) if update else compare(directory, Baseline.read(against))
    show_or_dump(found.to_json() if as_json else found, texts.table, as_json=as_json)
    if junit is not None:
        write_atomic(junit, texts.junit(found))
    ci.add_summary(texts.markdown(found))
    for line in ci.commands(texts.as_annotations(found)):
        click.echo(line, err=as_json)
    if update:
        click.echo(f"{against} was {'not ' if found.exit_code == 1 else ''}written", err=True)
    return found.exit_code


@main.command()
def passes() -> None:
    """List the passes that a recipe can use, with their options."""
    from headwise.pipeline.commands.catalogue import passes_table

    show(passes_table())


@main.command()
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from headwise.pipeline.recipe import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


main.add_command(bench)
main.add_command(bundle)
main.add_command(convert)
main.add_command(cost)
main.add_command(generate)
main.add_command(to_hf)
main.add_command(verify)


def _tell_ci(report: Mapping[str, Any]) -> None:
    """What did not pass as annotations, and the report as a job summary, where a CI service takes them."""
    from headwise.pipeline.report import ci
    from headwise.pipeline.report.document import markdown

    ci.add_summary(markdown(report))
    for line in ci.commands(ci.of_report(report)):
        click.echo(line)
