"""What became of every weight matrix, as the rows of a table in the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwise.pipeline.report.summary import ABSENT, Report, Stage, amount

_HEADINGS = ("Matrix", "Inputs × outputs", "Format", "Output error", "Size", "Saved")
_DROP = "Alone it costs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTable:
    """The matrices of one quantize stage.

    Attributes:
        stage: its name.
        headline: how many have which format, and what that saves.
        headings, rows: one row per matrix, under its name in the checkpoint.
    """

    stage: str
    headline: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def matrix_tables(report: Report) -> list[MatrixTable]:
    """One table per stage that quantized something."""
    return [_table(stage) for stage in report["stages"] if "matrices" in (stage.get("record") or {})]


def _table(stage: Stage) -> MatrixTable:
    matrices = stage["record"]["matrices"]
    formats = Counter(matrix["scheme"] for matrix in matrices)
    before, after = (sum(matrix[key] for matrix in matrices) for key in ("bytes_before", "bytes_after"))
    counts = ", ".join(f"{count} in {scheme}" for scheme, count in formats.items())
    sizes = [amount("file_bytes", size).replace("\N{NO-BREAK SPACE}", " ") for size in (before, after)]
    scales, kv, sweep = (stage["record"][key] for key in ("scales", "kv", "sweep"))
    scaled = f"; {scales['folded']} scales folded, {scales['explicit']} in front of matrices" if scales else ""
    cached = f"; {kv['tensors']} keys and values in {kv['format']}, {kv['per_channel']} per channel" if kv else ""
    measured = f"; alone each one costs {sweep['metric']} on {sweep['samples']} samples as shown" if sweep else ""
    return MatrixTable(
        stage=stage["name"],
        headline=f"{len(matrices)} matrices, {counts}; {sizes[0]} became {sizes[1]}{scaled}{cached}{measured}",
        headings=_HEADINGS + ((_DROP,) if sweep else ()),
        rows=tuple(_row(matrix) + ((_drop(matrix),) if sweep else ()) for matrix in matrices),
    )


def _row(matrix: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        matrix["name"],
        f"{matrix['inputs']} × {matrix['outputs']}",
        matrix["scheme"] + (f" ({matrix['reason']})" if matrix["reason"] else ""),
        f"{matrix['error']:.2g}" if matrix["error"] else ABSENT,
        amount("file_bytes", matrix["bytes_after"]),
        amount("file_bytes", matrix["bytes_before"] - matrix["bytes_after"]),
    )


def _drop(matrix: Mapping[str, Any]) -> str:
    return ABSENT if matrix["drop"] is None else f"{matrix['drop']:.4f}"
