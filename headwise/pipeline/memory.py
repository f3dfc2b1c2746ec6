"""What weights and cache of a model take, and how much text fits beside the weights: before and after a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.errors import DataError
from headwise.export.precision import Precision
from headwise.gates.model_cost import kv_bytes_per_token, kv_bytes_windows
from headwise.model.checkpoint import load_checkpoint
from headwise.pipeline.folders import is_run, last_pass
from headwise.pipeline.report import read_report
from headwise.pipeline.summary import Stage

_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
_UNITS = {"": 1, **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of ``8GiB``, ``500 MB`` or ``4096``.

    Raises:
        DataError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    unit = next((factor for name, factor in _UNITS.items() if match and name.lower() == match[2].lower()), None)
    if match is None or unit is None or match[1].count(".") > 1 or not float("0" + match[1]):
        raise DataError(
            f'"{text}" is no size of a memory',
            expected="a number above 0 and a unit: " + ", ".join(filter(None, _UNITS)),
            fix="for example --memory 8GiB",
        )
    return int(float("0" + match[1]) * unit)


def memory_cost(artifact: str, *, memory: int | None, precision: Precision = "fp16", batch: int = 1) -> dict[str, Any]:
    """Bytes of weights and cache as plain data: of a checkpoint, or of a run's model before and after.

    Args:
        artifact: a checkpoint, or the folder of a run, whose report is enough.
        memory: bytes that weights and cache may take together; None asks for no context.
        precision: of weights and cache.
        batch: texts that are in memory together.

    Raises:
        DataError: the run's report does not know the costs.
    """
    path = Path(artifact)
    models = _of_run(path) if is_run(path) else {"model": _of_checkpoint(artifact)}
    return {
        "artifact": artifact,
        "precision": precision,
        "memory_bytes": memory,
        "batch": batch,
        "models": {name: _costs(held, memory, _BYTES[precision], batch) for name, held in models.items()},
    }


class _Held(NamedTuple):
    """Parameters of a model, and numbers in its cache: for every token, and at most for heads that stream."""

    parameters: int
    token: int
    windows: int


def _costs(held: _Held, memory: int | None, width: int, batch: int) -> dict[str, Any]:
    weights, token, windows = held.parameters * width, held.token * width, held.windows * width
    left = None if memory is None else memory - weights - batch * windows
    return {
        "parameters": held.parameters,
        "weight_bytes": weights,
        "kv_bytes_per_token": token,
        "kv_bytes_windows": windows,
        "context": None if left is None or not token else max(0, left) // (batch * token),
    }


def _of_checkpoint(source: str) -> _Held:
    view = load_checkpoint(source).view()
    parameters = sum(p.numel() for p in view.module.parameters())
    return _Held(parameters, kv_bytes_per_token(view) // 2, kv_bytes_windows(view) // 2)


def _of_run(folder: Path) -> dict[str, _Held]:
    report = read_report(folder)
    before = report["stages"][0]
    return {name: _of_stage(stage) for name, stage in (("before", before), ("after", last_pass(report) or before))}


def _of_stage(stage: Stage) -> _Held:
    try:
        cost = stage["cost"]
        # Reports count a cache in float16; those of version 0.1.0 know no windows.
        windows = int(cost.get("kv_bytes_windows", 0)) // 2
        return _Held(int(cost["parameters"]), int(cost["kv_bytes_per_token"]) // 2, windows)
    except KeyError as error:
        raise DataError(
            f"the report says nothing about the {error.args[0]} of {stage['name']}",
            expected="a run whose first stages have ended",
            fix="run headwise compress to its end, or name a checkpoint",
        ) from error


def memory_table(found: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    models, precision = found["models"], found["precision"]
    table = Table("", *models)
    columns = list(models.values())
    table.add_row("parameters", *(f"{model['parameters']:,}" for model in columns))
    table.add_row(f"weights ({precision})", *(_readable(model["weight_bytes"]) for model in columns))
    cache = (f"{model['kv_bytes_per_token']:,} B" if model["kv_bytes_per_token"] else "none" for model in columns)
    table.add_row(f"cache per token ({precision})", *cache)
    if any(model["kv_bytes_windows"] for model in columns):
        bounded = (_readable(model["kv_bytes_windows"]) for model in columns)
        table.add_row(f"cache of streaming heads, at most ({precision})", *bounded)
    if found["memory_bytes"] is not None:
        rows = "" if found["batch"] == 1 else f", {found['batch']} texts"
        label = f"tokens in {_readable(found['memory_bytes'])}{rows}"
        table.add_row(label, *("none" if m["context"] is None else f"{m['context']:,}" for m in columns))
    note = "Activations and the workspace of a runtime come on top. A model may take fewer tokens than fit."
    return Group(Text(found["artifact"], style="bold"), table, Text(note))


def _readable(size: int) -> str:
    """``1.5 GiB``, in the largest unit that leaves a number above 1."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.4g} {unit}"
    return f"{size} B"
