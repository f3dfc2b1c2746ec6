"""What quantizing single matrices costs on calibration samples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from headwise.calibration.tasks import Examples
from headwise.errors import PlanError
from headwise.export.opening import open_runner
from headwise.gates.drift import drift
from headwise.gates.measure import Predictions, predict
from headwise.model.quantization import QuantPlan
from headwise.pipeline.workspace import Workspace

_LEAST = 8
"""Samples that ranges and roundings are fitted to."""
Write = Callable[[Path, QuantPlan], Path]
"""Writes a graph into a folder as a plan says, and returns what ONNX Runtime can run."""


def set_aside(examples: Examples, samples: int) -> tuple[Examples, Examples]:
    """Calibration samples to fit to, and the last ones, which only judge.

    Raises:
        PlanError: too few are left.
    """
    count = len(examples) - samples
    if samples and count < _LEAST:
        raise PlanError(
            f"quantize.budget sets {samples} of {len(examples)} calibration samples aside",
            expected=f"at least {_LEAST} that are left to fit to",
            fix="raise calibration.samples, or lower quantize.budget.samples",
        )
    cut = count * examples.per_sample
    first, last = (replace(examples, rows=rows, labels={}) for rows in (examples.rows[:cut], examples.rows[cut:]))
    return first, last


class Sweep:
    """Measures sets of quantized matrices against the graph that has none.

    Args:
        workspace: has the task and the calibration samples.
        graph: the fp32 graph that was planned on.
        plan: what becomes of each matrix.
        write: see ``Write``.
        examples: calibration samples that nothing was fitted to.
    """

    def __init__(self, workspace: Workspace, graph: Path, plan: QuantPlan, write: Write, examples: Examples) -> None:
        self.workspace = workspace
        self.plan = plan
        self.write = write
        self.examples = examples
        self.metric = ""
        self.reference = self._predict(graph)

    def drop(self, names: Collection[str]) -> float:
        """How much worse the model is with just these matrices quantized."""
        entries = tuple(
            entry if entry.name in names else replace(entry, format=None, block=None, input_largest=None)
            for entry in self.plan.matrices
        )
        with tempfile.TemporaryDirectory() as folder:
            candidate = self._predict(self.write(Path(folder), replace(self.plan, matrices=entries)))
        found, self.metric = drift(self.workspace.task, self.examples, self.reference, candidate)
        return found

    def _predict(self, graph: Path) -> Predictions:
        with open_runner(graph) as runner:
            recipe = self.workspace.recipe
            return predict(runner, self.workspace.task, self.examples, batch_size=recipe.batch_size)
