"""Store and multiply weight matrices in fewer bits: which ones, in which format, with which scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from headwise.calibration.formats import GRIDS, quantize_weight
from headwise.calibration.histogram import RangeMethod, range_of
from headwise.calibration.ranges import Observed
from headwise.errors import PlanError, did_you_mean
from headwise.model.quantization import Codes, Format, Matrix, MatrixPlan, QuantPlan, scheme
from headwise.spec import Spec

_ALWAYS_WEIGHTS_ONLY = frozenset[Format]({"int4", "nvfp4", "mxfp8"})


class Quantize(Spec):
    """Quantize the weight matrices of the exported graph. It decides; ``export/quantize.py`` writes Q/DQ nodes.

    It comes after every pass that changes the model, because its scales are those of the graph that is deployed.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "weights, or weights and activations, in fewer bits; Q/DQ nodes in the graph"
    paper: ClassVar[str] = ""

    format: Format = "int8"
    """Number format of the matrices."""
    weights_only: bool = False
    """Leave the activations in the precision of the graph."""
    matrices: dict[str, Format | Literal["float"]] = Field(default_factory=dict)
    """Pattern of matrix names (``*.attention.*``, ``lm_head``) -> format, or ``float`` to leave them as they are; the
    first pattern that fits decides. Names are those of the modules in the checkpoint."""
    calibration: RangeMethod = "minmax"
    """How the range of an activation is chosen: ``minmax`` clips nothing, ``percentile`` keeps that share of the
    values, ``mse`` has the smallest squared error, ``entropy`` the smallest divergence of the distributions."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of the values, in percent, that ``calibration: percentile`` does not clip."""

    def schemes(self) -> frozenset[str]:
        """What a target must be able to run, see ``scheme``."""
        formats = {self.format, *(entry for entry in self.matrices.values() if entry != "float")}
        return frozenset(scheme(number, weights_only=self._weights_only(number)) for number in formats)

    def plan(self, matrices: Sequence[Matrix], ranges: Mapping[str, Observed]) -> QuantPlan:
        """Decide. The same graph, options and ranges give the same plan.

        Args:
            matrices: of the graph.
            ranges: what calibration saw of the tensor that each of them multiplies.

        Raises:
            PlanError: a pattern fits no matrix.
        """
        self._check_patterns(matrices)
        return QuantPlan(matrices=tuple(self._entry(matrix, ranges[matrix.tap]) for matrix in matrices))

    def codes(self, plan: QuantPlan, matrices: Sequence[Matrix], dtype: np.dtype[Any]) -> dict[str, Codes]:
        """The numbers that the plan asks for, by matrix name; ``dtype`` is that of the scales in the graph."""
        planned = plan.quantized()
        return {
            matrix.name: quantize_weight(
                matrix.weight, planned[matrix.name].format or self.format, block=planned[matrix.name].block, dtype=dtype
            )
            for matrix in matrices
            if matrix.name in planned
        }

    def _weights_only(self, number: Format) -> bool:
        return self.weights_only or number in _ALWAYS_WEIGHTS_ONLY

    def _entry(self, matrix: Matrix, seen: Observed) -> MatrixPlan:
        number = self._format(matrix.name)
        if number == "float":
            return MatrixPlan(name=matrix.name, format=None, reason="as the recipe says")
        largest = None
        if not self._weights_only(number):
            largest = range_of(seen.histogram, self.calibration, number, percentile=self.percentile)
        return MatrixPlan(name=matrix.name, format=number, block=GRIDS[number].block, input_largest=largest)

    def _format(self, name: str) -> Format | Literal["float"]:
        return next((number for pattern, number in self.matrices.items() if fnmatchcase(name, pattern)), self.format)

    def _check_patterns(self, matrices: Sequence[Matrix]) -> None:
        names = [matrix.name for matrix in matrices]
        for pattern in self.matrices:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlanError(
                    f'quantize.matrices: no matrix is called "{pattern}"',
                    expected=f"a pattern that fits one of {len(names)} names such as {names[0]}",
                    fix=did_you_mean(pattern, names),
                )
