"""What quantizing single matrices costs on calibration samples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from headwise.calibration.tasks import Examples
from headwise.export.runners import OrtRunner
from headwise.gates.drift import drift
from headwise.gates.measure import Predictions, predict
from headwise.model.quantization import QuantPlan
from headwise.pipeline.workspace import Workspace

Write = Callable[[Path, QuantPlan], Path]
"""Writes a graph into a folder as a plan says, and returns what ONNX Runtime can run."""


class Sweep:
    """Measures sets of quantized matrices against the graph that has none.

    Args:
        workspace: has the task and the calibration samples.
        graph: the fp32 graph that was planned on.
        plan: what becomes of each matrix.
        write: see ``Write``.
        samples: how many of the calibration samples to use.
    """

    def __init__(self, workspace: Workspace, graph: Path, plan: QuantPlan, write: Write, samples: int) -> None:
        self.workspace = workspace
        self.plan = plan
        self.write = write
        whole = workspace.calibration
        rows = whole.rows[: samples * whole.per_sample]
        self.examples: Examples = replace(whole, rows=rows, labels={})
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
        with OrtRunner(graph) as runner:
            recipe = self.workspace.recipe
            return predict(runner, self.workspace.task, self.examples, batch_size=recipe.batch_size)
