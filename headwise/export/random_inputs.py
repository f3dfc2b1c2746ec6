"""Inputs to time a model on: of given sizes, random where the content does not matter, and the same for every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from headwise.device.arrays import BF16, Port
from headwise.errors import DataError
from headwise.model.cache import SHIFT, held_of, is_past

_VIEWS = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators behind which ids are still ids, and tables still tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed.

    Attributes:
        batch: rows.
        tokens: of this call, along every axis that varies.
        past: tokens of earlier calls that are in the cache; None where the models are run without a cache.
        vocabulary: ids are drawn from 0 to below this; None where no input holds ids.
    """

    batch: int
    tokens: int
    past: int | None = None
    vocabulary: int | None = None


def random_inputs(inputs: Mapping[str, Port], case: Case, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Arrays for every input, without padding.

    Args:
        inputs: name -> dtype and dims; a bfloat16 is made as float32.
        case: the sizes.
        seed: an array depends on it, on its own name and on its shape, not on the other inputs.

    Raises:
        DataError: an input cannot have the size that was asked for, or the vocabulary is not known.
    """
    cached = any(map(is_past, inputs))
    found = {}
    for name, (dtype, dims) in inputs.items():
        if isinstance(dims[0], int) and dims[0] != case.batch:
            raise DataError(
                f"input {name} has a fixed batch of {dims[0]}, and {case.batch} was asked for",
                expected="a batch that the graph takes",
                fix=f"use --batch {dims[0]}, or export with an axis that varies",
            )
        past = case.past or 0
        varying = past + case.tokens if cached and name == "attention_mask" else case.tokens
        sizes = [dim if isinstance(dim, int) else held_of(dim, past) if is_past(name) else varying for dim in dims[1:]]
        shape = (case.batch, *sizes)
        random = np.random.default_rng([seed, *name.encode()])
        found[name] = np.array(_content(name, shape, case, random), "float32" if dtype == BF16 else dtype, order="C")
    return found


def _content(name: str, shape: tuple[int, ...], case: Case, random: np.random.Generator) -> NDArray[Any]:
    if name.endswith("attention_mask"):
        return np.ones(shape)
    if name.endswith(("padding_mask", "token_type_ids", f".{SHIFT}")):
        return np.zeros(shape)
    if name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]) + (case.past or 0), shape)
    if not name.endswith("input_ids"):
        return random.standard_normal(shape, np.float32)
    if case.vocabulary is None:
        raise DataError(
            f"the vocabulary of input {name} is not known",
            expected="a graph that looks its ids up in a table, or a checkpoint of transformers",
            fix="give --vocabulary N",
        )
    return random.integers(0, case.vocabulary, shape)


def vocabulary_of(path: Path) -> int | None:
    """Rows of the smallest table that a graph looks its ``input_ids`` up in; None where it has none."""
    graph = onnx.load(str(path), load_external_data=False).graph
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) > 1}
    ids = {value.name for value in graph.input if value.name.endswith("input_ids")}
    found = []
    for node in graph.node:
        if node.op_type in _VIEWS:
            source = node.input[0]
            if source in ids:
                ids.update(node.output)
            if source in rows and node.op_type == "DequantizeLinear":
                rows[node.output[0]] = rows[source]
        elif node.op_type == "Gather" and node.input[0] in rows and node.input[1] in ids:
            found.append(rows[node.input[0]])
    return min(found, default=None)
