"""What the user sees while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

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
    """A progress bar for the step at hand and a line for every finished stage.

    Used as a context manager, it takes its bar away however the block ends.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ""
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Into a file go the lines of the stages alone.
            disable=not console.is_terminal,
        )

    def __enter__(self) -> RichMonitor:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def start(self, stage: str) -> None:
        self.stage = stage
        self.bars.start()
        self.work("", 0)

    def work(self, what: str, total: int) -> Advance:
        self._clear()
        task_id = self.bars.add_task(f"{self.stage}  {what}", total=total or None)
        return lambda samples: self.bars.advance(task_id, samples)

    def log(self, text: str) -> None:
        self.console.print(Text(f"  {text}", style="dim"))

    def finish(self, stage: str, line: str) -> None:
        self._clear()
        # Text, not markup: a reason may hold square brackets.
        self.console.print(Text.assemble((f"{stage:<18} ", "bold"), line))

    def close(self) -> None:
        self._clear()
        self.bars.stop()

    def _clear(self) -> None:
        for task in self.bars.task_ids:
            self.bars.remove_task(task)


class Steps:
    """The progress of a pass, (step, samples), as one bar per step."""

    def __init__(self, monitor: Monitor, total: int) -> None:
        self.monitor = monitor
        self.total = total
        self.step = ""
        self.advance: Advance = lambda _: None

    def __call__(self, step: str, samples: int) -> None:
        if step != self.step:
            self.step, self.advance = step, self.monitor.work(step, self.total)
        self.advance(samples)
