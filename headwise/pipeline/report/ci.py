"""What a CI service shows of a result: GitHub's annotations and job summary. Silent everywhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headwise.artifacts import storage_error
from headwise.pipeline.report import summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One line that GitHub shows beside the run.

    Attributes:
        level: how it looks.
        title: what it is about.
        text: in words.
    """

    level: Literal["error", "warning", "notice"]
    title: str
    text: str

    def command(self) -> str:
        """The workflow command that makes it, on one line."""
        title = _escaped(self.title).replace(":", "%3A").replace(",", "%2C")
        return f"::{self.level} title={title}::{_escaped(self.text)}"


def commands(annotations: Iterable[Annotation]) -> list[str]:
    """Lines to print; none where this is no GitHub job."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return []
    return [annotation.command() for annotation in annotations]


def of_report(report: summary.Report) -> list[Annotation]:
    """Everything in a report that did not simply pass; errors where the exit code is not 0."""
    level: Literal["error", "warning", "notice"] = "notice"
    if report["exit_code"]:
        level = "error"
    elif report["outcome"] == "warn":
        level = "warning"
    return [
        Annotation(level=level, title=f"headwise: {stages}", text=reason) for stages, reason in summary.problems(report)
    ]


def add_summary(markdown: str) -> None:
    """Add to the job's summary page, where there is one.

    Raises:
        StorageError: the file that the service names cannot be written.
    """
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if not target:
        return
    try:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        raise storage_error(error, Path(target)) from error


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
