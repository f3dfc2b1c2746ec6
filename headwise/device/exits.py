"""How commands end: the exit codes, here and on the device."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from headwise.errors import HeadwiseError

EXIT_CODES = """
\b
Exit codes: 0 passed, 1 a gate said no, 2 bad recipe or input, 3 a stage failed,
4 this machine cannot do it (missing package, no GPU), 130 interrupted.
"""


def errors_to_exit_codes(command: Callable[..., int | None]) -> Callable[..., None]:
    """End with the exit code of a headwise error, without a traceback; 130 for Ctrl-C.

    Whatever else is raised is a bug: it keeps its traceback, and ends with 3, for 1 means that a gate said no.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            sys.exit(command(*args, **kwargs) or 0)
        except HeadwiseError as error:
            click.secho(f"error: {error}", err=True, fg="red")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except (BrokenPipeError, click.ClickException):
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
