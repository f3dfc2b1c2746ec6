"""The inputs and outputs of a decoder's graph: what a first call is given, and what they are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from headwise.device.arrays import Dims
from headwise.errors import ExportError
from headwise.export.graph import signature
from headwise.model.cache import SEQUENCE, TOTAL_SEQUENCE, CacheLayout, is_past, past_axis
from headwise.model.decoder import positions

Arrays = Mapping[str, NDArray[Any]]

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


def axis_names(layout: CacheLayout) -> dict[str, dict[int, str]]:
    """Graph input -> axis that varies -> name."""
    names = {
        IDS: {0: "batch", 1: SEQUENCE},
        MASK: {0: "batch", 1: TOTAL_SEQUENCE},
        POSITIONS: {0: "batch", 1: SEQUENCE},
    }
    for name, tensor in layout.past().items():
        names[name] = {0: "batch", len(tensor.shape): past_axis(tensor)}
    return names


def cache_bytes(path: Path) -> int:
    """Bytes of one token in the cache of a decoder's graph, of all layers; 0 without a cache."""
    total = 0
    for value in filter(lambda value: is_past(value.name), onnx.load(str(path), load_external_data=False).graph.input):
        kind = value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim if dim.dim_value]
        total += prod(sizes) * onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return total


def first_call(batch: Arrays, inputs: Mapping[str, Dims]) -> dict[str, NDArray[Any]]:
    """The batch, and where the graph has a cache whatever else its first call needs: an empty past, mask, positions.

    Args:
        batch: named arrays, batch axis first.
        inputs: input of the graph -> its dims.
    """
    found = dict(batch)
    if not any(map(is_past, inputs)) or IDS not in found:
        return found
    rows, tokens = found[IDS].shape
    mask = found.setdefault(MASK, np.ones((rows, tokens), np.int64))
    if POSITIONS in inputs:
        found.setdefault(POSITIONS, positions(mask, tokens))
    for name in filter(is_past, inputs):
        inner = [dim if isinstance(dim, int) else 0 for dim in inputs[name][1:]]
        found.setdefault(name, np.zeros((rows, *inner), np.float32))
    return found


def check_ports(graph: ir.Graph, layout: CacheLayout) -> None:
    """Name the axes of what the graph caches, and check all of it against the layout.

    Raises:
        ExportError: an input or output is missing, or its sizes are not those of the layout.
    """
    sides = (
        ("input", {str(v.name): v for v in graph.inputs}, layout.past()),
        ("output", {str(v.name): v for v in graph.outputs}, layout.present()),
    )
    for side, values, tensors in sides:
        for name, tensor in tensors.items():
            held = past_axis(tensor).removeprefix("past_")
            held = TOTAL_SEQUENCE if held == SEQUENCE else held
            wanted = tensor.dims("batch", past_axis(tensor) if side == "input" else held)
            found = signature(values[name])[1] if name in values else ()
            # Sizes that vary have no name of their own in an output.
            fixed = tuple(dim if isinstance(dim, int) else want for dim, want in zip(found, wanted, strict=False))
            if fixed != wanted or any(isinstance(dim, int) for dim in (found[0], found[len(tensor.shape)])):
                raise ExportError(
                    f"{side} {name} of the graph is {found or 'missing'}",
                    expected=f"{wanted}, which is what the layer caches",
                    fix="report this with the model's config: its class fills the cache in another way",
                )
            values[name].shape = ir.Shape(wanted)
