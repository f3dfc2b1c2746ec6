"""The command that compares speeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from headwise.cli.common import EXIT_CODES, errors_to_exit_codes, progress, show_or_dump
from headwise.errors import DataError


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
@click.option(
    "--seq",
    "tokens",
    type=click.IntRange(min=1),
    help="Tokens of a row; export.sequence.opt of a run, else 128 or what fits.",
)
@click.option(
    "--past", type=click.IntRange(min=0), help="Tokens in a decoder's cache when it adds one; as many as --seq."
)
@click.option("--vocabulary", type=click.IntRange(min=1), help="Where the models do not say it.")
@click.option("--rounds", type=click.IntRange(min=5), default=60, show_default=True, help="Measured calls of each.")
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    show_default="6, or --rounds",
    help="Times that processes are started anew.",
)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=5, show_default=True, help="Calls of each process before that."
)
@click.option(
    "--confidence",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of intervals.",
)
@click.option("--roofline", is_flag=True, help="Print what --gpu could reach with one graph at best; measures nothing.")
@click.option("--gpu", help="For --roofline: rtx-3060, l4, h100, jetson-orin-nx, ...")
@click.option("--ssh", "host", help="USER@BOARD: copy one bundle there, verify and time it, and bring the result back.")
@click.option("--port", "-p", type=click.IntRange(1, 65535), help="For --ssh.")
@click.option("--identity", "-i", help="For --ssh: a key file.")
@click.option("--python", help="For --ssh: the interpreter there; python3 without it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all times, instead of tables.")
@errors_to_exit_codes
def bench(artifacts: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Time graphs, checkpoints and engines against the first of them.

    An artifact is the folder of a run (its graph), a checkpoint (in PyTorch), a file .onnx or an engine. A single run
    is compared with its untouched model. Of decoders, the prompt and one more token are timed. With --ssh, a bundle.
    """
    bound = {name: options.pop(name) for name in ("roofline", "gpu")}
    board = {name: options.pop(name) for name in ("host", "port", "identity", "python")}
    if board["host"] is not None:
        _refuse_ignored("--ssh", {*board, "rounds"})
    elif bound["roofline"]:
        _refuse_ignored("--roofline", {*bound, "batch", "tokens", "past"})
    if any(given is not None for given in board.values()):
        return _on_board(artifacts, board, options["rounds"], as_json=as_json)
    if bound["roofline"] or bound["gpu"] is not None:
        return _bound(artifacts, bound, options, as_json=as_json)
    with progress() as monitor:
        from headwise.pipeline.bench.rounds import BenchOptions
        from headwise.pipeline.bench.rounds import bench as measure
        from headwise.pipeline.bench.table import bench_table

        found = measure(artifacts, BenchOptions(**options), monitor=monitor)
    show_or_dump(found, bench_table, as_json=as_json)
    return 0


def _refuse_ignored(mode: str, used: set[str]) -> None:
    """Options that say how to measure here mean nothing where nothing is measured here."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in {*used, "artifacts", "as_json"}:
            raise DataError(
                f"{mode} and {parameter.opts[0]}",
                expected="one of them",
                fix=f"leave {parameter.opts[0]} out: with {mode} it would change nothing",
            )


def _bound(artifacts: tuple[str, ...], given: dict[str, Any], options: dict[str, Any], *, as_json: bool) -> int:
    from headwise.pipeline.bench.bounds import bound, bound_table

    if len(artifacts) != 1 or not given["roofline"]:
        raise DataError(
            f"--roofline and {len(artifacts)} artifacts" if given["roofline"] else "--gpu without --roofline",
            expected="bench --roofline GRAPH --gpu NAME",
            fix="name one graph; without --roofline, speeds are measured on this machine",
        )
    sizes = {name: options[name] for name in ("batch", "tokens", "past")}
    show_or_dump(bound(artifacts[0], given["gpu"], **sizes), bound_table, as_json=as_json)
    return 0


def _on_board(artifacts: tuple[str, ...], given: dict[str, Any], rounds: int, *, as_json: bool) -> int:
    from headwise.pipeline.bench.remote import Board, bench_remote, remote_table

    if len(artifacts) != 1 or given["host"] is None:
        raise DataError(
            f"--ssh and {len(artifacts)} artifacts" if given["host"] else "options of --ssh without --ssh",
            expected="bench --ssh USER@BOARD BUNDLE",
            fix="name one bundle and the board",
        )
    board = Board(**{name: value for name, value in given.items() if value is not None})
    with progress() as monitor:
        monitor.work(f"on {board.host}", 0)
        found = bench_remote(board, Path(artifacts[0]), rounds=rounds)
    show_or_dump(found, remote_table, as_json=as_json)
    return int(found["exit_code"])
