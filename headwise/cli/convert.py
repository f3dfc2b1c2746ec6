"""The command for models that do not fit in memory."""

from __future__ import annotations

import click

from headwise.cli.common import EXIT_CODES, errors_to_exit_codes, progress, show_or_dump


@click.command(epilog=EXIT_CODES)
@click.argument("checkpoint")
@click.option("--recipe", required=True, help="YAML recipe; its passes and calibration are used.")
@click.option("--out", required=True, help="Folder for the converted checkpoint.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: passes.0.rank=256")
@click.option("--no-resume", is_flag=True, help="Begin with the first layer, also where some are done.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@errors_to_exit_codes
def convert(checkpoint: str, recipe: str, out: str, overrides: tuple[str, ...], no_resume: bool, as_json: bool) -> None:
    """Convert a decoder with one layer in memory.

    The passes of the recipe are share-kv or latent-kv. CHECKPOINT is a directory with safetensors files, and so is the
    result. Memory does not grow with the number of layers. The same command continues a conversion that was
    interrupted. Nothing is judged: `headwise evaluate` measures the result where it fits in memory.
    """
    with progress() as monitor:
        from headwise.pipeline.commands.convert import conversion_table
        from headwise.pipeline.commands.convert import convert as run

        report = run(checkpoint, recipe, out, overrides=overrides, resume=not no_resume, monitor=monitor)
    show_or_dump(report, conversion_table, as_json=as_json)
    loader = "plain transformers" if report["stock"] else "headwise.load"
    click.echo(f"{report['bytes'] / 1e9:.2f} GB in {out}, which loads with {loader}", err=True)


@click.command("to-hf", epilog=EXIT_CODES)
@click.argument("artifact")
@click.option("--out", required=True, help="Folder for the checkpoint.")
@errors_to_exit_codes
def to_hf(artifact: str, out: str) -> None:
    """Save a result of latent-kv as a DeepSeek-V3.

    ARTIFACT is the folder of a run or a conversion, or a checkpoint. The result has no experts, and transformers loads
    it without headwise. It is written after its logits were compared; what that class cannot express is refused with
    the reason.
    """
    with progress():
        from headwise.pipeline.commands.plain import to_hf as save

        found = save(artifact, out)
    click.echo(f"{found['folder']} is a {found['model_type']}; logits differ by {found['difference']:.1e}")
