"""What weights and cache of a model take, and how much text fits beside the weights: before and after a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.errors import DataError
from headwise.export.precision import Precision
from headwise.gates.model_cost import kv_bytes_per_prompt_token, kv_bytes_per_token, kv_bytes_windows
from headwise.model.checkpoint import load_checkpoint
from headwise.pipeline.folders import is_run, last_pass, stage_with_cache
from headwise.pipeline.report.document import read_report
from headwise.pipeline.report.summary import Stage

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
        precision: of weights and cache; a cache of codes, which the graph of a run may have, is counted as it is.
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
        "models": {name: _costs(sizes, memory, _BYTES[precision], batch) for name, sizes in models.items()},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What a model holds.

    Attributes:
        parameters: numbers in its weights.
        cached: numbers in its cache for one token, without heads that stream.
        prompt: the same for one token of a prompt, of which layers may keep a share.
        windows: numbers in its cache of heads that stream, at most.
        codes: formats of the cache where it holds codes, and bytes of one token in it.
    """

    parameters: int
    cached: int
    prompt: int
    windows: int = 0
    codes: tuple[str, int] | None = None


def _costs(sizes: _Sizes, memory: int | None, width: int, batch: int) -> dict[str, Any]:
    weights = sizes.parameters * width
    kind, token = sizes.codes or (None, sizes.cached * width)
    windows = sizes.windows * width
    pruned = sizes.codes is None and sizes.prompt < sizes.cached
    left = None if memory is None else max(0, memory - weights - batch * windows)
    return {
        "parameters": sizes.parameters,
        "weight_bytes": weights,
        "kv_bytes_per_token": token,
        "kv_bytes_per_prompt_token": sizes.prompt * width if pruned else token,
        "kv_bytes_windows": windows,
        "kv_format": kind,
        "context": None if left is None or not token else left // (batch * token),
        "prompt": None if left is None or not pruned else left // (batch * sizes.prompt * width),
    }


def _of_checkpoint(source: str) -> _Sizes:
    view = load_checkpoint(source).view()
    parameters = sum(p.numel() for p in view.module.parameters())
    return _Sizes(
        parameters=parameters,
        cached=kv_bytes_per_token(view) // 2,
        prompt=kv_bytes_per_prompt_token(view) // 2,
        windows=kv_bytes_windows(view) // 2,
    )


def _of_run(folder: Path) -> dict[str, _Sizes]:
    report = read_report(folder)
    before = report["stages"][0]
    after, quantized = _of_stage(last_pass(report) or before), stage_with_cache(report)
    if quantized is not None:
        codes = str(quantized["record"]["kv"]["format"]), int(quantized["cost"]["kv_bytes_per_token"])
        after = replace(after, codes=codes)
    return {"before": _of_stage(before), "after": after}


def _of_stage(stage: Stage) -> _Sizes:
    cost = stage["cost"]
    try:
        # Reports count a cache of numbers in float16; older ones know no windows, and no prompts that are pruned.
        parameters, cached = int(cost["parameters"]), int(cost["kv_bytes_per_token"]) // 2
        prompt = int(cost.get("kv_bytes_per_prompt_token", 2 * cached)) // 2
        windows = int(cost.get("kv_bytes_windows", 0)) // 2
        return _Sizes(parameters=parameters, cached=cached, prompt=prompt, windows=windows)
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
    table.add_row(f"cache per token ({precision})", *map(_cache, columns))
    if any(model["kv_bytes_per_prompt_token"] != model["kv_bytes_per_token"] for model in columns):
        label = f"cache per token of a prompt ({precision})"
        table.add_row(label, *(f"{model['kv_bytes_per_prompt_token']:,} B" for model in columns))
    if any(model["kv_bytes_windows"] for model in columns):
        bounded = (_readable(model["kv_bytes_windows"]) for model in columns)
        table.add_row(f"cache of streaming heads, at most ({precision})", *bounded)
    if found["memory_bytes"] is not None:
        rows = "" if found["batch"] == 1 else f", {found['batch']} texts"
        label = f"tokens in {_readable(found['memory_bytes'])}{rows}"
        table.add_row(label, *("none" if m["context"] is None else f"{m['context']:,}" for m in columns))
        if any(model["prompt"] is not None for model in columns):
            longest = (m["context"] if m["prompt"] is None else m["prompt"] for m in columns)
            table.add_row("of a prompt alone", *("none" if tokens is None else f"{tokens:,}" for tokens in longest))
    note = "Activations and the workspace of a runtime come on top. A model may take fewer tokens than fit."
    return Group(Text(found["artifact"], style="bold"), table, Text(note))


def _cache(model: dict[str, Any]) -> str:
    if not model["kv_bytes_per_token"]:
        return "none"
    return f"{model['kv_bytes_per_token']:,} B" + (f" ({model['kv_format']})" if model["kv_format"] else "")


def _readable(size: int) -> str:
    """``1.5 GiB``, in the largest unit that leaves a number above 1."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.4g} {unit}"
    return f"{size} B"
