"""What the user sees while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int], None]


class Monitor(Protocol):
    """Receives the events of a run."""

    def start(self, stage: str) -> None:
        """A stage begins."""

    def work(self, what: str, total: int) -> Advance:
        """A step of ``total`` samples begins; call the result with the number of samples that were finished."""

    def log(self, text: str) -> None:
        """Something worth a line."""

    def finish(self, stage: str, line: str) -> None:
        """A stage ended; ``line`` says how."""

    def close(self) -> None:
        """The run ended, however it did."""


class Silent:
    """Says nothing: the default of the Python API."""

    def start(self, stage: str) -> None:
        del stage

    def work(self, what: str, total: int) -> Advance:
        del what, total
        return lambda _: None

    def log(self, text: str) -> None:
        del text

    def finish(self, stage: str, line: str) -> None:
        del stage, line

    def close(self) -> None:
        return


class RichMonitor:
    """A progress bar for the step at hand and a line for every finished stage."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ""
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.bars.start()

    def start(self, stage: str) -> None:
        self.stage = stage
        self.work("", 0)

    def work(self, what: str, total: int) -> Advance:
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        task_id = self.bars.add_task(f"{self.stage}  {what}", total=total or None)
        return lambda samples: self.bars.advance(task_id, samples)

    def log(self, text: str) -> None:
        self.console.print(f"  {text}", style="dim", highlight=False)

    def finish(self, stage: str, line: str) -> None:
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self.console.print(f"[bold]{stage:<18}[/bold] {line}", highlight=False)

    def close(self) -> None:
        self.bars.stop()
