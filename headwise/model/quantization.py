"""Which weight matrices are stored and multiplied in which number format. Pure data: no graph and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

Format = Literal["int8", "fp8", "int4", "nvfp4", "mxfp8"]
"""Number formats. fp8 is E4M3; nvfp4 is E2M1 in blocks of 16 with E4M3 scales, mxfp8 E4M3 in blocks of 32 with
powers of two as scales."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """A weight matrix of a graph.

    Attributes:
        name: path of its module in the checkpoint.
        node: name of the node that multiplies with it.
        tap: name of the activation tensor that it multiplies; matrices that share one share its scales.
        weight: (K, N) float32, K inputs and N outputs, whatever way the graph stores it.
        biased: whether a bias is added to the product.
        constant: name of the constant; layers that share their weights read one. Empty where nobody shares it.
    """

    name: str
    node: str
    tap: str
    weight: Array
    biased: bool
    constant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPlan:
    """What becomes of one matrix.

    Attributes:
        name: see ``Matrix``.
        format: of its weights; None keeps it in the precision of the graph.
        block: inputs that share a scale; None is one scale per output.
        input_largest: magnitude of the input that the largest code stands for, in nvfp4 with the largest scale of a
            block; None leaves the input in the precision of the graph (weights only).
        reason: why a matrix keeps the precision of the graph.
    """

    name: str
    format: Format | None
    block: int | None = None
    input_largest: float | None = None
    reason: str = ""

    @property
    def scheme(self) -> str:
        """``int8``, ``int8-weights`` and so on, as :func:`scheme` writes it; ``float`` where nothing changes."""
        return "float" if self.format is None else scheme(self.format, weights_only=self.input_largest is None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MatrixPlan:
        return cls(**data)


def scheme(number: Format, *, weights_only: bool) -> str:
    """One word for a format and for what has it: weights and inputs, or weights only."""
    return f"{number}-weights" if weights_only else number


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """What quantization does to a graph. Survives a round trip through JSON unchanged.

    Attributes:
        matrices: every matrix of the graph, in its order.
        smooth: activation tensor -> one exponent per channel. Before anything else, its channels are multiplied by
            ``2 ** -exponent`` and the weights behind it by the inverse, which changes nothing: powers of two are exact.
        tables: embeddings, with a scale per row, or per block of a row.
    """

    matrices: tuple[MatrixPlan, ...]
    smooth: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tables: tuple[MatrixPlan, ...] = ()

    def quantized(self) -> dict[str, MatrixPlan]:
        """The matrices that change, by name; tables are not among them."""
        return {entry.name: entry for entry in self.matrices if entry.format is not None}

    def to_json(self) -> dict[str, Any]:
        return {
            "matrices": [entry.to_json() for entry in self.matrices],
            "smooth": {tap: list(exponents) for tap, exponents in self.smooth.items()},
            "tables": [entry.to_json() for entry in self.tables],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantPlan:
        return cls(
            matrices=tuple(MatrixPlan.from_json(entry) for entry in data["matrices"]),
            smooth={tap: tuple(exponents) for tap, exponents in data["smooth"].items()},
            tables=tuple(MatrixPlan.from_json(entry) for entry in data["tables"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """A quantized matrix: ``weight = codes * scale``, blocks of inputs sharing a row of scales.

    Attributes:
        values: (K, N) in the format's own dtype.
        scale: (N,) without blocks, otherwise (K / block, N); float32 numbers that the graph's scales can hold.
        shared: one more factor of the whole matrix (nvfp4); 1 for the other formats.
        bias_delta: (N,) to add to the bias, or None.
    """

    values: Array
    scale: Array
    shared: float = 1.0
    bias_delta: Array | None = None
