"""What all commands share: exit codes, progress, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from headwise.device.exits import EXIT_CODES, errors_to_exit_codes

__all__ = ["CHECKPOINT_HELP", "EXIT_CODES", "errors_to_exit_codes", "progress", "show", "show_or_dump"]

CHECKPOINT_HELP = """
CHECKPOINT is a directory (of transformers, or written by headwise), a hub id, or module:factory for a plain PyTorch
model.
"""


@contextmanager
def progress() -> Iterator[Any]:
    """Progress on the error output, so that the standard output holds the result alone; begins before torch loads."""
    from rich.console import Console

    from headwise.pipeline.monitor import RichMonitor

    with RichMonitor(Console(stderr=True)) as monitor:
        monitor.start("load")
        yield monitor


def show(result: Any) -> None:
    """Print for a terminal."""
    from rich.console import Console

    Console().print(result)


def show_or_dump(found: Any, table: Callable[[Any], Any], *, as_json: bool) -> None:
    """Print a table, or the same as JSON."""
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(table(found))
