"""The latency table of a run, and what a latency budget turned out to be.

The table is measured once and kept with the run: a plan rests on it, so that measuring again would be another plan.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from headwise.artifacts import digest_json, write_atomic
from headwise.calibration.shapes import cost_row
from headwise.calibration.timing import LatencyTable
from headwise.export.decoder import export_model
from headwise.gates.timing import Clock, count_graphs, measure_table, ort_clock
from headwise.model.view import ModelView
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.store import Store
from headwise.pipeline.workspace import Workspace

TABLE = "table.json"


class StoredTable(NamedTuple):
    """A latency table, its digest, and why it was measured; an empty reason where it was on disk."""

    table: LatencyTable
    digest: str
    why: str


class Timing:
    """Measures the graphs of a workspace's models.

    Args:
        workspace: says how models are exported and how long the sample is.
        monitor: receives progress.
    """

    def __init__(self, workspace: Workspace, monitor: Monitor) -> None:
        self.workspace = workspace
        self.monitor = monitor

    def table(self, view: ModelView) -> LatencyTable:
        """What the layers of a model take, see ``gates.timing``."""
        advance = self.monitor.work("latency table", count_graphs(view))
        return measure_table(view, self._write, self._clock(), advance)

    def stored(self, view: ModelView, store: Store, folder: str, key: dict[str, Any]) -> StoredTable:
        """The same from the run's folder, where it was measured before.

        Args:
            view: the model.
            store: of the run.
            folder: name of the artifact.
            key: what the exported graphs depend on. The machine is not part of it: a run that is continued elsewhere
                keeps its plan, and the report names the device.
        """

        def make(made: Path) -> dict[str, Any]:
            table = self.table(view)
            write_atomic(made / TABLE, json.dumps(table.to_json()))
            return {"device": table.device, "threads": table.threads, "method": table.method}

        artifact, why = store.get(folder, "latency", key, make)
        content = json.loads((artifact.path / TABLE).read_text())
        return StoredTable(LatencyTable.from_json(content), digest_json(content), why)

    def outcome(self, table: LatencyTable, before: ModelView, after: ModelView) -> dict[str, Any]:
        """What the table predicted for ``after``, beside what both graphs take in one interleaved run.

        Args:
            table: of ``before``.
            before: the model that the budget was spent on.
            after: what became of it.
        """
        self.monitor.work("latency", 0)
        with tempfile.TemporaryDirectory() as scratch:
            paths = [Path(scratch, name, "model.onnx") for name in ("before", "after")]
            for path, view in zip(paths, (before, after), strict=True):
                path.parent.mkdir()
                self._write(view, path)
            first, second = self._clock()(*paths)
        predicted = table.predict(before.layout, after.layout)
        return {
            "predicted_ms": predicted,
            "predicted_ratio": predicted / table.total,
            "measured_ms": second.median_ms,
            "measured_ratio": second.median_ms / first.median_ms,
            "reference_ms": first.median_ms,
            "device": second.device,
            "threads": second.threads,
            "method": second.method,
        }

    def _write(self, view: ModelView, path: Path) -> None:
        export_model(view, self.workspace.examples, path, self.workspace.recipe.export)

    def _clock(self) -> Clock:
        workspace = self.workspace
        return ort_clock(cost_row(workspace.checkpoint.module, workspace.examples, workspace.sequence))
