"""What all commands share: exit codes, progress, and how results are printed."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

EXIT_CODES = """
\b
Exit codes: 0 passed, 1 a gate said no, 2 bad recipe or input, 3 a stage failed,
4 this machine cannot do it (missing package, no GPU), 130 interrupted.
"""

CHECKPOINT_HELP = """
CHECKPOINT is a directory (of transformers, or written by headwise), a hub id, or module:factory for a plain PyTorch
model.
"""


def errors_to_exit_codes(command: Callable[..., int | None]) -> Callable[..., None]:
    """End with the exit code of a headwise error, without a traceback; 130 for Ctrl-C.

    Whatever else is raised is a bug: it keeps its traceback, and ends with 3, for 1 means that a gate said no.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from headwise.errors import HeadwiseError

        try:
            sys.exit(command(*args, **kwargs) or 0)
        except HeadwiseError as error:
            click.secho(f"error: {error}", err=True, fg="red")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:
            raise
        except Exception as error:
            click.echo(traceback.format_exc(), err=True)
            click.secho(
                f"error: {type(error).__name__}: {error}\n  expected: this command to end with a result or a reason\n"
                "  do this:  this is a bug in headwise; please report it with the lines above",
                err=True,
                fg="red",
            )
            sys.exit(3)

    return wrapped


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
