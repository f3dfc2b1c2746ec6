"""The quantize stage: calibrate on the exported graph, decide, and write the quantized graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from headwise.artifacts import write_atomic
from headwise.calibration.formats import restore
from headwise.calibration.products import quantized_input, relative_error
from headwise.calibration.ranges import Observed, collect_ranges, load_ranges, save_ranges
from headwise.export.matrices import TapRunner, find_matrices, find_taps
from headwise.export.quantize import SCALE_DTYPES, write_quantized
from headwise.model.quantization import Codes, Matrix, MatrixPlan
from headwise.passes.quantize import Quantize
from headwise.pipeline.graphs import GRAPH, Graph
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.store import Store, versions
from headwise.pipeline.workspace import Workspace

PLAN = "plan.json"
_RANGES = "ranges.npz"


class Quantizer:
    """Makes quantized graphs from one fp32 graph.

    Args:
        workspace: has the recipe and the calibration samples.
        store: keeps the ranges, which change only with the graph and the samples.
        monitor: receives progress.
        source: the fp32 graph.
    """

    def __init__(self, workspace: Workspace, store: Store, monitor: Monitor, source: Graph) -> None:
        self.workspace = workspace
        self.store = store
        self.monitor = monitor
        self.source = source

    def key(self) -> dict[str, Any]:
        """What the ranges depend on."""
        recipe = self.workspace.recipe
        return {
            "parent": self.source.digest,
            "calibration": self.workspace.calibration_digest,
            "batch_size": recipe.batch_size,
            **versions("onnxruntime"),
        }

    def make(self, options: Quantize, body: Graph, stage: str, folder: Path) -> dict[str, Any]:
        """Fill the folder of the stage; what the report says about it.

        Args:
            options: of the pass.
            body: the graph whose precision everything else has.
            stage: name of the stage's folder.
            folder: to be filled.
        """
        spec = self.workspace.recipe.export
        matrices = find_matrices(self.source.path)
        seen = self._ranges(stage, matrices)
        plan = options.plan(matrices, seen)
        dtype = SCALE_DTYPES[body.precision]
        self.monitor.work("quantize", 0)
        codes = options.codes(plan, matrices, dtype)
        written = write_quantized(
            self.source.path, folder / GRAPH, plan, codes, precision=body.precision, keep_io=spec.keep_io
        )
        write_atomic(folder / PLAN, json.dumps(plan.to_json()))
        return {
            "promises": [asdict(promise) for promise in written.promises],
            "matrices": [
                _row(matrix, entry, seen[matrix.tap], codes.get(matrix.name), dtype)
                for matrix, entry in zip(matrices, plan.matrices, strict=True)
            ],
            "multiplications": written.multiplications,
            "runs_on_cpu": body.precision != "bf16",
        }

    def _ranges(self, stage: str, matrices: Sequence[Matrix]) -> dict[str, Observed]:
        """What calibration saw, from disk where neither the graph nor the samples have changed."""
        workspace = self.workspace
        names = [matrix.tap for matrix in matrices]

        def make(folder: Path) -> dict[str, Any]:
            examples = workspace.calibration
            seen = collect_ranges(
                TapRunner(self.source.path, names),
                examples,
                find_taps(self.source.path, names),
                batch_size=workspace.recipe.batch_size,
                progress=self.monitor.work("ranges", len(examples)),
            )
            save_ranges(seen, folder / _RANGES)
            return {}

        stored, _ = self.store.get(f"{stage}.ranges", "ranges", self.key(), make)
        return load_ranges(stored.path / _RANGES)


def _row(
    matrix: Matrix, entry: MatrixPlan, seen: Observed, codes: Codes | None, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """What became of a matrix, for the report; ``error`` is that of its outputs on calibration tokens."""
    error = 0.0
    if entry.format is not None and codes is not None:
        inputs = quantized_input(seen.rows, entry.format, entry.input_largest, dtype)
        error = relative_error(seen.rows @ matrix.weight, inputs @ restore(codes, entry.block, dtype))
    return {
        "name": matrix.name,
        "inputs": matrix.weight.shape[0],
        "outputs": matrix.weight.shape[1],
        "scheme": entry.scheme,
        "reason": entry.reason,
        "error": error,
        "bytes_before": matrix.weight.size * dtype.itemsize,
        "bytes_after": stored_bytes(matrix, entry, dtype),
    }


def stored_bytes(matrix: Matrix, entry: MatrixPlan, dtype: np.dtype[Any]) -> int:
    """Bytes of a matrix in the graph, with its scales."""
    size, outputs = matrix.weight.size, matrix.weight.shape[1]
    if entry.format is None:
        return size * dtype.itemsize
    bits = {"int8": 8, "fp8": 8, "mxfp8": 8, "int4": 4, "nvfp4": 4}[entry.format]
    scales = outputs if entry.block is None else size // entry.block
    width = 1 if entry.format in ("nvfp4", "mxfp8") else dtype.itemsize
    return size * bits // 8 + scales * width
