"""``headwise bench --ssh``: copy a bundle to a board, verify and measure it there, and bring the result back."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.errors import DataError, HeadwiseError, MachineError, MissingDependencyError

VERIFY = "headwise-verify.pyz"
_UNREACHABLE, _NO_COMMAND = 255, 127
_FOLDER = re.compile(r"/[\w./-]+")
_MODULE = re.compile(r"No module named '?([\w.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Where to run.

    Attributes:
        host: ``user@board``, or a name of the ssh configuration.
        port: of its ssh; None for the configured one.
        identity: a key file; None for the configured ones.
        python: the interpreter there.
    """

    host: str
    port: int | None = None
    identity: str | None = None
    python: str = "python3"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the board's shell.

        Raises:
            MachineError: the board cannot be reached.
        """
        return self._call(["ssh", *self._options("-p"), self.host, command])

    def copy(self, folder: Path, to: str) -> None:
        """Copy a folder to the board.

        Raises:
            MachineError: the board cannot be reached, or takes no file.
        """
        found = self._call(["scp", "-r", "-q", *self._options("-P"), str(folder), f"{self.host}:{to}"])
        if found.returncode:
            raise MachineError(
                f"{folder} cannot be copied to {self.host}: {found.stderr.strip()}",
                expected="room for the bundle on the board",
                fix="free some space there",
            )

    def _options(self, port: str) -> list[str]:
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        options += [] if self.port is None else [port, str(self.port)]
        return options if self.identity is None else [*options, "-i", self.identity]

    def _call(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            found = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise MissingDependencyError(
                f"there is no {command[0]} on this machine", expected="the OpenSSH client", fix="install it"
            ) from error
        if found.returncode == _UNREACHABLE:
            raise MachineError(
                f"{self.host} cannot be reached: {found.stderr.strip()}",
                expected="a board that ssh reaches without asking for anything",
                fix=f"try `ssh {self.host} true`; add -p PORT or -i KEY, or accept the key of the host once",
            )
        return found


def bench_remote(board: Board, bundle: Path, *, rounds: int) -> dict[str, Any]:
    """Copy a bundle to a folder of its own on the board, verify and time it, and remove the folder.

    Args:
        board: where.
        bundle: folder that ``headwise bundle`` wrote.
        rounds: measured calls.

    Returns:
        Host, exit code and result of ``headwise-verify.pyz verify`` there.

    Raises:
        DataError: this is no bundle, or no host.
        MachineError: the board cannot be reached.
        MissingDependencyError: Python or a package is missing there.
        HeadwiseError: it gave no result.
    """
    if not (bundle / VERIFY).exists():
        raise DataError(
            f"{bundle} holds no {VERIFY}", expected="a folder that headwise bundle wrote", fix="make the bundle first"
        )
    if not board.host or board.host.startswith("-"):
        raise DataError(f'"{board.host}" is no host', expected="user@board", fix="name the board to --ssh")
    folder = board.run("mktemp -d").stdout.strip()
    if not _FOLDER.fullmatch(folder):
        raise HeadwiseError(
            f'{board.host} made no folder: "{folder}"', expected="a shell with mktemp", fix="log in and try `mktemp -d`"
        )
    try:
        board.copy(bundle, f"{folder}/bundle")
        command = f"cd {folder}/bundle && {shlex.quote(board.python)} {VERIFY} verify . --json --rounds {rounds}"
        found = board.run(command)
    finally:
        board.run(f"rm -rf {folder}")
    return {"host": board.host, "exit_code": found.returncode, "verify": _result(board, found)}


def _result(board: Board, found: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(found.stdout)
        return result
    except ValueError as error:
        said = found.stderr.strip()
        if found.returncode == _NO_COMMAND:
            raise MissingDependencyError(
                f"{board.host} has no {board.python}", expected="Python 3.10 or newer there", fix="add --python PATH"
            ) from error
        missing = _MODULE.search(said)
        if missing:
            raise MissingDependencyError(
                f"{board.python} on {board.host} has no {missing[1]}",
                expected="numpy and click there, and the runtime of the engine",
                fix=f"pip install {missing[1]} on the board, or name another interpreter with --python",
            ) from error
        raise HeadwiseError(
            f"{board.host} gave no result (exit code {found.returncode}): {said or found.stdout.strip()}",
            expected="the JSON of headwise-verify.pyz",
            fix="log in and run it in the folder of a bundle",
        ) from error


def remote_table(found: dict[str, Any]) -> RenderableType:
    """The checks for a terminal."""
    result = found["verify"]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title=f"{result.get('artifact')} on {found['host']}")
    for heading in ("Check", "Outcome", "Found"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "Found")
    for check in result.get("checks", ()):
        table.add_row(*(Text(str(check.get(key, ""))) for key in ("name", "outcome", "found")))
        for label, key in (("expected", "expected"), ("do this", "fix")):
            if check.get(key):
                table.add_row("", "", Text(f"{label}: {check[key]}"))
    note = [Text(result["note"], style="yellow")] if result.get("note") else []
    return Group(table, *note, Text(f"exit code {found['exit_code']}", style="dim"))
