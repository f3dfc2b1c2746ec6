"""Store and multiply weight matrices in fewer bits: which ones, in which format, with which scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from headwise.calibration.formats import GRIDS, quantize_weight, restore
from headwise.calibration.histogram import RangeMethod, range_of
from headwise.calibration.products import ReadInput
from headwise.calibration.ranges import Observed, pooled
from headwise.errors import PlanError, did_you_mean
from headwise.model.quantization import Codes, Format, Matrix, MatrixPlan, QuantPlan, scheme
from headwise.passes.budget import Budget
from headwise.passes.rounding import best_shrink, gptq
from headwise.passes.smooth import Exponents, best_exponents, exponents
from headwise.spec import Spec

Array = NDArray[Any]
_T = TypeVar("_T")

CacheFormat = Literal["int8", "fp8"]

_ALWAYS_WEIGHTS_ONLY = frozenset[Format]({"int4", "mxfp8"})


class Quantize(Spec):
    """Quantize the weight matrices of the exported graph. It decides; ``export/quantize.py`` writes Q/DQ nodes.

    It comes after every pass that changes the model, because its scales are those of the graph that is deployed.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "weights, or weights and activations, in fewer bits; Q/DQ nodes in the graph"
    paper: ClassVar[str] = "arXiv 2211.10438, 2306.00978, 2210.17323"

    format: Format = "int8"
    """Number format of the matrices."""
    weights_only: bool = False
    """Leave the activations in the precision of the graph."""
    block: Literal[16, 32, 64, 128] = 32
    """Inputs that share a scale in int4. In nvfp4 they are 16 and in mxfp8 32; int8 and fp8 have a scale per output."""
    matrices: dict[str, Format | Literal["float"]] = Field(default_factory=dict)
    """Pattern of matrix names (``*.attention.*``, ``lm_head``) -> format, or ``float`` to leave them as they are; the
    first pattern that fits decides. Names are those of the modules in the checkpoint."""
    calibration: RangeMethod = "minmax"
    """How the range of an activation is chosen: ``minmax`` clips nothing, ``percentile`` keeps that share of the
    values, ``mse`` has the smallest squared error, ``entropy`` the smallest divergence of the distributions."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of the values, in percent, that ``calibration: percentile`` does not clip."""
    smooth: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] | None = "auto"
    """Scale the channels of activations, and the weights behind them by the inverse: SmoothQuant for weights and
    activations, AWQ for weights only. A strength from 0 to 1 for every tensor, ``auto`` for the best one of each by the
    error of its products, null for none. A scale that does not fold into earlier weights costs a multiplication."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """How weights become codes: to the nearest one, or with ``gptq``, which lets the weights of later inputs make good
    what rounding those of earlier ones did to the product."""
    clip: bool = True
    """Clip the largest weights of a scale where that makes the product better on calibration tokens."""
    bias_correction: bool = True
    """Take the mean error of a product on calibration tokens off its bias, where it has one."""

    kv: CacheFormat | dict[str, CacheFormat | Literal["float"]] | None = None
    """Format of what a decoder caches, or of the keys and values of other models: one for all of them, or pattern of
    names (``*.self_attn.value``, ``model.layers.0.*``) -> format or ``float``, the first that fits; what fits none
    stays as it is. One scale per channel, which goes into the projections around them where the graph allows it."""

    embeddings: Literal["int8", "int4"] | None = None
    """Format of large embedding tables: int8 with a scale per row, int4 with one per ``block`` of a row."""

    budget: Budget | None = None
    """A limit on drop or size; what does not fit into it stays as it is. It measures one matrix at a time."""

    def schemes(self) -> frozenset[str]:
        """What a target must be able to run, see ``scheme``."""
        chosen = [*self.matrices.values(), *([] if "*" in self.matrices else [self.format])]
        formats = {entry for entry in chosen if entry != "float"}
        found = {scheme(number, weights_only=self._weights_only(number)) for number in formats}
        found |= {f"{number}-kv" for number in self._kv_patterns().values() if number != "float"}
        return frozenset(found | ({f"{self.embeddings}-table"} if self.embeddings else set()))

    def smoothing(
        self, matrices: Sequence[Matrix], ranges: Mapping[str, Observed], read: ReadInput
    ) -> dict[str, Exponents]:
        """Activation tensor -> exponents of its channels. Everything else is decided on the scaled graph.

        Args:
            matrices: of the graph.
            ranges: what calibration saw of the tensor that each of them multiplies.
            read: what a product of the runtime reads of its input.

        Raises:
            PlanError: a pattern fits no matrix.
        """
        self._check_patterns(matrices)
        if self.smooth is None:
            return {}
        found: dict[str, Exponents] = {}
        for tap in dict.fromkeys(matrix.tap for matrix in matrices):
            seen = ranges[tap]
            planned = [(matrix, self._entry(matrix, seen)) for matrix in matrices if matrix.tap == tap]
            members = [matrix for matrix, plan in planned if plan.format is not None]
            plans = [plan for _, plan in planned if plan.format is not None]
            if not members or any(matrix.constant for matrix in members):
                continue  # weights that several layers share would no longer be shared
            if self.smooth == "auto":
                chosen = best_exponents(members, plans, seen, read)
            else:
                weights_only = all(plan.input_largest is None for plan in plans)
                chosen = exponents(members, seen, self.smooth, weights_only=weights_only)
            if chosen is not None and any(chosen):
                found[tap] = chosen
        return found

    def plan(
        self,
        matrices: Sequence[Matrix],
        ranges: Mapping[str, Observed],
        smooth: Mapping[str, Exponents] | None = None,
    ) -> QuantPlan:
        """Decide. The same graph, options and ranges give the same plan.

        Args:
            matrices: of the graph, scaled as ``smooth`` says.
            ranges: what calibration saw of the tensor that each of them multiplies.
            smooth: what ``smoothing`` decided.

        Raises:
            PlanError: a pattern fits no matrix.
        """
        self._check_patterns(matrices)
        entries = tuple(self._entry(matrix, ranges[matrix.tap]) for matrix in matrices)
        return QuantPlan(matrices=entries, smooth=dict(smooth or {}))

    def kv_formats(self, labels: Sequence[str]) -> dict[str, CacheFormat]:
        """Which cached tensors become codes, by the names that the recipe calls them by.

        Raises:
            PlanError: a pattern fits none of them.
        """
        patterns = self._kv_patterns()
        _require_fit("kv", "cached tensor", patterns, labels)
        found = {label: _first_fit(label, patterns, "float") for label in labels}
        return {label: number for label, number in found.items() if number != "float"}

    def _kv_patterns(self) -> Mapping[str, CacheFormat | Literal["float"]]:
        return self.kv if isinstance(self.kv, dict) else {"*": self.kv} if self.kv else {}

    def plan_tables(self, tables: Sequence[Matrix]) -> tuple[MatrixPlan, ...]:
        """What becomes of embedding tables, each given as (width, rows)."""
        number = self.embeddings
        if number is None:
            return ()
        block = self.block if number == "int4" else None
        return tuple(self._blocked(table, number, block) for table in tables)

    def table_codes(
        self, plans: Sequence[MatrixPlan], tables: Sequence[Matrix], dtype: np.dtype[Any]
    ) -> dict[str, Codes]:
        """The numbers that ``plan_tables`` asks for, by name; for ``dtype`` see ``codes``."""
        return {
            table.name: quantize_weight(table.weight, plan.format, block=plan.block, dtype=dtype)
            for table, plan in zip(tables, plans, strict=True)
            if plan.format is not None
        }

    def moments(self) -> bool:
        """Whether ``codes`` needs the second moment of every activation."""
        return self.rounding == "gptq"

    def codes(
        self,
        plan: QuantPlan,
        matrices: Sequence[Matrix],
        ranges: Mapping[str, Observed],
        read: ReadInput,
        dtype: np.dtype[Any],
    ) -> dict[str, Codes]:
        """The numbers that the plan asks for, by matrix name.

        Args:
            plan: what ``plan`` decided on these matrices and ranges.
            matrices: of the graph.
            ranges: what calibration saw.
            read: what a product of the runtime reads of its input.
            dtype: of the scales in the graph.
        """
        planned = plan.quantized()
        members = [matrix for matrix in matrices if matrix.name in planned]
        made: dict[tuple[str, Format | None, int | None], Codes] = {}
        found: dict[str, Codes] = {}
        for matrix in members:
            entry = planned[matrix.name]
            key = (matrix.constant or matrix.name, entry.format, entry.block)
            if key not in made:
                readers = [other.tap for other in members if matrix.constant and other.constant == matrix.constant]
                seen = pooled([ranges[tap] for tap in dict.fromkeys(readers or [matrix.tap])])
                made[key] = self._codes(matrix, entry, seen, dtype)
            found[matrix.name] = self._corrected(made[key], matrix, entry, ranges[matrix.tap].rows, read, dtype)
        return found

    def _codes(self, matrix: Matrix, plan: MatrixPlan, seen: Observed, dtype: np.dtype[Any]) -> Codes:
        number, weight = plan.format, matrix.weight
        assert number is not None, "only quantized matrices have codes"
        shrink: Array | float = 1.0
        if self.clip:
            shrink = best_shrink(weight, seen.rows, number, block=plan.block, dtype=dtype)
        if self.rounding == "gptq":
            assert seen.moment is not None, "moments() asked for it"
            return gptq(weight, seen.moment, number, block=plan.block, dtype=dtype, shrink=shrink)
        return quantize_weight(weight, number, block=plan.block, dtype=dtype, shrink=shrink)

    def _corrected(
        self, codes: Codes, matrix: Matrix, plan: MatrixPlan, rows: Array, read: ReadInput, dtype: np.dtype[Any]
    ) -> Codes:
        if not (self.bias_correction and matrix.biased):
            return codes
        found = read(rows, plan, dtype) @ restore(codes, plan.block, dtype)
        return replace(codes, bias_delta=(rows @ matrix.weight - found).mean(axis=0))

    def _weights_only(self, number: Format) -> bool:
        return self.weights_only or number in _ALWAYS_WEIGHTS_ONLY

    def _entry(self, matrix: Matrix, seen: Observed) -> MatrixPlan:
        number = self._format(matrix.name)
        if number == "float":
            return MatrixPlan(name=matrix.name, format=None, reason="as the recipe says")
        plan = self._blocked(matrix, number, self.block if number == "int4" else GRIDS[number].block)
        if plan.format is None or self._weights_only(number):
            return plan
        # Blocks of nvfp4 have ranges of their own; what is calibrated is the largest of their scales.
        method = "minmax" if number == "nvfp4" else self.calibration
        return replace(plan, input_largest=range_of(seen.histogram, method, number, percentile=self.percentile))

    @staticmethod
    def _blocked(matrix: Matrix, number: Format, block: int | None) -> MatrixPlan:
        inputs = len(matrix.weight)
        if block is not None and inputs % block:
            return MatrixPlan(name=matrix.name, format=None, reason=f"{inputs} inputs are no multiple of {block}")
        return MatrixPlan(name=matrix.name, format=number, block=block)

    def _format(self, name: str) -> Format | Literal["float"]:
        return _first_fit(name, self.matrices, self.format)

    def _check_patterns(self, matrices: Sequence[Matrix]) -> None:
        _require_fit("matrices", "matrix", self.matrices, [matrix.name for matrix in matrices])


def _first_fit(name: str, patterns: Mapping[str, _T], otherwise: _T) -> _T:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)


def _require_fit(option: str, what: str, patterns: Collection[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(
                f'quantize.{option}: no {what} is called "{pattern}"',
                expected=f"a pattern that fits one of {len(names)} names such as {names[0]}",
                fix=did_you_mean(pattern, names),
            )
