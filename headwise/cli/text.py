"""Commands about decoders: text, and the memory that it takes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click

from headwise.cli.common import EXIT_CODES, errors_to_exit_codes, progress, show_or_dump


@click.command(epilog=EXIT_CODES)
@click.argument("artifact")
@click.option("--prompt", "prompts", multiple=True, help="What to continue; can be given several times.")
@click.option("--prompts-file", type=click.Path(path_type=Path), help="A file with one prompt per line.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts continued together.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Above 0, tokens are drawn; at 0 the likeliest one is taken.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from so many likeliest tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--runtime", type=click.Choice(["ort", "torch"]), help="By default, ort for graphs, torch for checkpoints."
)
@click.option("--tokenizer", help="Directory or hub id; by default that of the checkpoint behind the artifact.")
@click.option("--json", "as_json", is_flag=True, help="Print tokens and speed as JSON.")
@errors_to_exit_codes
def generate(artifact: str, prompts: tuple[str, ...], prompts_file: Path | None, as_json: bool, **options: Any) -> None:
    """Continue texts with a run, a graph or a checkpoint.

    A decoder's graph is exported with its cache, so that a token costs one call with one token.
    """
    with progress():
        from headwise.pipeline.commands.generation import Sampling, continue_prompts, open_writer, read_prompts

        texts = [*prompts, *([] if prompts_file is None else read_prompts(prompts_file))]
        sampling = Sampling(**{name: options[name] for name in ("temperature", "top_k", "seed")})
        writer = open_writer(artifact, runtime=options["runtime"], tokenizer=options["tokenizer"])
    live = not as_json and len(texts) == 1
    if live:
        click.echo(texts[0], nl=False)
    found = continue_prompts(
        writer,
        texts,
        new_tokens=options["max_new_tokens"],
        batch=options["batch"],
        sampling=sampling,
        say=functools.partial(click.echo, nl=False) if live else None,
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("" if live else "\n\n".join(text["prompt"] + text["text"] for text in found["texts"]))


@click.command()
@click.argument("artifact")
@click.option("--memory", help="How many tokens fit beside the weights in so much memory: 8GiB, 500MB.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Texts in memory together.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp16",
    show_default=True,
    help="Of weights and cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@errors_to_exit_codes
def cost(artifact: str, memory: str | None, as_json: bool, **options: Any) -> None:
    """Show what weights and cache take, before and after a run.

    ARTIFACT is the folder of a run, or a checkpoint.
    """
    with progress():
        from headwise.pipeline.commands.memory import memory_cost, memory_table, parse_size

        size = None if memory is None else parse_size(memory)
        found = memory_cost(artifact, memory=size, **options)
    show_or_dump(found, memory_table, as_json=as_json)
