"""The quantize stage: calibrate on the exported graph, decide, and write the quantized graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.artifacts import write_atomic
from headwise.calibration.formats import restore
from headwise.calibration.products import dynamic_input, quantized_input, relative_error
from headwise.calibration.ranges import Observed, collect_ranges, load_ranges, save_ranges
from headwise.export.dynamic import write_dynamic
from headwise.export.matrices import TapRunner, find_matrices, find_taps
from headwise.export.precision import Precision
from headwise.export.quantize import SCALE_DTYPES, write_quantized
from headwise.model.quantization import Codes, Matrix, MatrixPlan, QuantPlan
from headwise.passes.quantize import Quantize
from headwise.pipeline.graphs import GRAPH, Graph
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.store import Store, versions
from headwise.pipeline.workspace import Workspace

Array = NDArray[Any]

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

    def key(self, options: Quantize) -> dict[str, Any]:
        """What a quantized graph depends on, whatever the runtime."""
        return {**self._ranges_key(), "options": options.model_dump(mode="json"), **versions("onnx")}

    def _ranges_key(self) -> dict[str, Any]:
        recipe = self.workspace.recipe
        return {
            "parent": self.source.digest,
            "calibration": self.workspace.calibration_digest,
            "batch_size": recipe.batch_size,
            **versions("onnxruntime"),
        }

    def for_tensorrt(self, options: Quantize, precision: Precision, folder: Path) -> dict[str, Any]:
        """Fill the folder of a stage with a graph of Q/DQ nodes; what the manifest remembers.

        Args:
            options: of the pass.
            precision: of what is not quantized.
            folder: to be filled.
        """
        matrices, seen, plan = self._decide(options)
        dtype = SCALE_DTYPES[precision]
        codes = options.codes(plan, matrices, dtype)
        keep_io = self.workspace.recipe.export.keep_io
        written = write_quantized(self.source.path, folder / GRAPH, plan, codes, precision=precision, keep_io=keep_io)
        write_atomic(folder / PLAN, json.dumps(plan.to_json()))
        return {
            "promises": [asdict(promise) for promise in written.promises],
            "matrices": [
                _row(matrix, entry, seen[matrix.tap].rows, codes, quantized_input, dtype)
                for matrix, entry in zip(matrices, plan.matrices, strict=True)
            ],
            "multiplications": written.multiplications,
            "runs_on_cpu": precision != "bf16",
        }

    def for_cpu(self, options: Quantize, folder: Path) -> dict[str, Any]:
        """The same for ONNX Runtime on a CPU: integer products, with input ranges of every call."""
        matrices, seen, plan = self._decide(options)
        dtype = SCALE_DTYPES["fp32"]
        codes = options.codes(plan, matrices, dtype)
        multiplications = write_dynamic(self.source.path, folder / GRAPH, plan, codes)
        write_atomic(folder / PLAN, json.dumps(plan.to_json()))
        return {
            "matrices": [
                _row(matrix, entry, seen[matrix.tap].rows, codes, dynamic_input, dtype)
                for matrix, entry in zip(matrices, plan.matrices, strict=True)
            ],
            "multiplications": multiplications,
        }

    def _decide(self, options: Quantize) -> tuple[Sequence[Matrix], Mapping[str, Observed], QuantPlan]:
        matrices = find_matrices(self.source.path)
        seen = self._ranges(matrices)
        self.monitor.work("quantize", 0)
        return matrices, seen, options.plan(matrices, seen)

    def _ranges(self, matrices: Sequence[Matrix]) -> dict[str, Observed]:
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

        stored, _ = self.store.get(f"{self.source.path.parent.name}.ranges", "ranges", self._ranges_key(), make)
        return load_ranges(stored.path / _RANGES)


def _row(
    matrix: Matrix,
    entry: MatrixPlan,
    rows: Array,
    codes: Mapping[str, Codes],
    read: Callable[[Array, MatrixPlan, np.dtype[Any]], Array],
    dtype: np.dtype[Any],
) -> dict[str, Any]:
    """What became of a matrix, for the report; ``error`` is that of its outputs on calibration tokens."""
    error = 0.0
    if matrix.name in codes:
        found = read(rows, entry, dtype) @ restore(codes[matrix.name], entry.block, dtype)
        error = relative_error(rows @ matrix.weight, found)
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
