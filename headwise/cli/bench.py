"""The command that compares speeds."""

from __future__ import annotations

from typing import Any

import click

from headwise.cli.common import EXIT_CODES, errors_to_exit_codes, progress, show_or_dump


@click.command(epilog=EXIT_CODES)
@click.argument("artifacts", nargs=-1, required=True)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Of graphs and checkpoints; engines run on the GPU.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of each, as in reports."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of a call.")
@click.option("--seq", "tokens", type=click.IntRange(min=1), help="Tokens of a row; 128, or what the models can take.")
@click.option(
    "--past", type=click.IntRange(min=0), help="Tokens in a decoder's cache when it adds one; as many as --seq."
)
@click.option("--vocabulary", type=click.IntRange(min=1), help="Where the models do not say it.")
@click.option("--rounds", type=click.IntRange(min=5), default=50, show_default=True, help="Measured calls of each.")
@click.option("--warmup", type=click.IntRange(min=0), default=5, show_default=True, help="Calls of each before that.")
@click.option(
    "--confidence",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of intervals.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all times, instead of tables.")
@errors_to_exit_codes
def bench(artifacts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Time graphs, checkpoints and engines against the first of them.

    An artifact is the folder of a run (its graph), a checkpoint (in PyTorch), a file .onnx or an engine. A single run
    is compared with its untouched model. Of decoders, the prompt and one more token are timed.
    """
    with progress() as monitor:
        from headwise.pipeline.bench import BenchOptions
        from headwise.pipeline.bench import bench as measure
        from headwise.pipeline.bench_table import bench_table

        found = measure(artifacts, BenchOptions(**options), monitor=monitor)
    show_or_dump(found, bench_table, as_json=as_json)
