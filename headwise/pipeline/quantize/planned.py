"""A quantization plan with what it rests on, and what the report says about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from headwise.artifacts import write_atomic
from headwise.calibration.formats import GRIDS, restore
from headwise.calibration.products import ReadInput, relative_error
from headwise.calibration.ranges import Observed
from headwise.export.decoder import DECODE
from headwise.export.single import absorbed_names
from headwise.model.quantization import Codes, Matrix, MatrixPlan, QuantPlan
from headwise.passes.budget import Budget, Measure, Offer, left_alone

Array = NDArray[Any]

PLAN = "plan.json"
_KEPT = "left alone by the budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and what it was made on.

    Attributes:
        path: the fp32 graph, scaled.
        matrices: of this graph.
        seen: what calibration saw in it.
        plan: what becomes of it.
        tables: embeddings that the plan has an entry for.
        scales: how many scales were folded and how many are explicit; empty without smoothing.
        kv: what became of keys and values; empty where they stay as they are.
        sweep: drop of every matrix by itself, the metric and the number of samples; empty without a budget.
    """

    path: Path
    matrices: Sequence[Matrix]
    seen: Mapping[str, Observed]
    plan: QuantPlan
    tables: Sequence[Matrix] = ()
    scales: Mapping[str, Any] = field(default_factory=dict)
    kv: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] = field(default_factory=dict)

    @property
    def single(self) -> Path | None:
        """The fp32 graph of single tokens, scaled likewise; None where there is none."""
        path = self.path.with_name(DECODE)
        return path if path.exists() else None

    def absorbed(self) -> tuple[MatrixPlan, ...]:
        """Quantized matrices that the graph of single tokens multiplies with something else, which stays as it is."""
        if self.single is None:
            return ()
        names = absorbed_names(onnx.load(str(self.single)).graph)
        return tuple(replace(entry, input_largest=None) for n, entry in self.plan.quantized().items() if n in names)

    def within(self, budget: Budget, sweep: Mapping[str, Any], measure: Measure, dtype: np.dtype[Any]) -> Planned:
        """The same with what the budget does not allow left as it is.

        Args:
            budget: the limit.
            sweep: see the attribute.
            measure: the drop of a set of quantized matrices.
            dtype: of the graph.
        """
        sizes = {
            matrix.name: (stored_bytes(matrix, replace(entry, format=None), dtype), stored_bytes(matrix, entry, dtype))
            for matrix, entry in zip(self.matrices, self.plan.matrices, strict=True)
        }
        offers = [
            Offer(name=name, drop=drop, saved=sizes[name][0] - sizes[name][1]) for name, drop in sweep["drops"].items()
        ]
        total = sum(after for _, after in sizes.values())
        kept = left_alone(offers, budget, total=total, measure=measure)
        entries = tuple(
            MatrixPlan(name=entry.name, format=None, reason=_KEPT) if entry.name in kept else entry
            for entry in self.plan.matrices
        )
        return replace(self, plan=replace(self.plan, matrices=entries), sweep=sweep)

    def record(self, codes: Mapping[str, Codes], read: ReadInput, dtype: np.dtype[Any], folder: Path) -> dict[str, Any]:
        """Write the plan; what the report says about it.

        Args:
            codes: of every quantized matrix.
            read: what a product of the runtime reads of its input.
            dtype: of the graph.
            folder: of the stage.
        """
        write_atomic(folder / PLAN, json.dumps(self.plan.to_json()))
        rows = [
            self._row(matrix, entry, codes, read, dtype)
            for matrix, entry in zip(
                [*self.matrices, *self.tables], [*self.plan.matrices, *self.plan.tables], strict=True
            )
        ]
        for index, row in enumerate(rows):
            if row["shared"] and any(row["shared"] == other["shared"] for other in rows[:index]):
                row |= {"bytes_before": 0, "bytes_after": 0}  # the first one counts for all
        about = {key: self.sweep[key] for key in ("metric", "samples") if key in self.sweep}
        single = {} if self.single is None else {"absorbed": [entry.name for entry in self.absorbed()]}
        scales, kv = dict(self.scales), dict(self.kv)
        return {"record": {"matrices": rows, "scales": scales, "kv": kv, "sweep": about, "single": single}}

    def _row(
        self, matrix: Matrix, entry: MatrixPlan, codes: Mapping[str, Codes], read: ReadInput, dtype: np.dtype[Any]
    ) -> dict[str, Any]:
        """One matrix; ``error`` is that of its outputs on calibration tokens, and of a table that of its numbers."""
        error = 0.0
        if matrix.name in codes:
            weight = restore(codes[matrix.name], entry.block, dtype)
            if entry in self.plan.tables:
                error = relative_error(matrix.weight, weight)
            else:
                rows = self.seen[matrix.tap].rows
                error = relative_error(rows @ matrix.weight, read(rows, entry, dtype) @ weight)
        return {
            "name": matrix.name,
            "inputs": matrix.weight.shape[0],
            "outputs": matrix.weight.shape[1],
            "scheme": entry.scheme,
            "reason": entry.reason,
            "shared": matrix.constant,
            "error": error,
            "drop": self.sweep.get("drops", {}).get(matrix.name),
            "bytes_before": stored_bytes(matrix, replace(entry, format=None), dtype),
            "bytes_after": stored_bytes(matrix, entry, dtype),
        }


def stored_bytes(matrix: Matrix, entry: MatrixPlan, dtype: np.dtype[Any]) -> int:
    """Bytes of a matrix in the graph, with its scales."""
    size, outputs = matrix.weight.size, matrix.weight.shape[1]
    if entry.format is None:
        return size * dtype.itemsize
    scales = outputs if entry.block is None else size // entry.block
    width = 1 if entry.format in ("nvfp4", "mxfp8") else dtype.itemsize
    return size * GRIDS[entry.format].bits // 8 + scales * width
