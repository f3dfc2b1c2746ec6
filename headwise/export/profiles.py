"""The shapes that an engine is built for, from the axes of a graph that vary and the ranges of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from headwise.device.arrays import Dims
from headwise.errors import ExportError
from headwise.export.graph import graph_inputs
from headwise.export.precision import ExportSpec, Range
from headwise.model.cache import PAST_KEPT, PAST_SEQUENCE, PAST_WINDOW, TOTAL_SEQUENCE, held_of, is_past

Profiles = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Input -> ``min``, ``opt`` and ``max`` shape."""

_LONGEST, _CONTEXT = 512, 4096
_KINDS = ("min", "opt", "max")


def engine_shapes(onnx_path: Path, spec: ExportSpec, limits: Mapping[str, int]) -> dict[str, Profiles]:
    """``profiles`` and ``decode`` of an engine, see :func:`profiles_for` and :func:`decode_profiles`."""
    profiles = profiles_for(onnx_path, spec, limits)
    return {"profiles": profiles, "decode": decode_profiles(onnx_path, profiles)}


def profiles_for(
    onnx_path: Path, spec: ExportSpec, limits: Mapping[str, int] | None = None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes that an engine has to take, from the dynamic axes of the graph.

    Args:
        onnx_path: a graph; axis 0 of an input is the batch, every other dynamic axis a sequence. A decoder's graph with
            a cache has the tokens of this call, those of earlier calls, of which there may be none, and both together.
        spec: the ranges of both.
        limits: ``batch`` or ``sequence`` -> the largest size that the model takes (its position embeddings).

    Returns:
        Input -> ``min``, ``opt`` and ``max`` shape; inputs without a dynamic axis are left out.

    Raises:
        ExportError: the recipe asks for more than the limit.
    """
    limits = limits or {}
    inputs = graph_inputs(onnx_path)
    decoder = any(map(is_past, inputs))
    longest = limits.get("sequence", _LONGEST)
    longest = min(longest, _LONGEST) if decoder else longest
    sequence = spec.sequence or Range(min=1, opt=min(128, longest), max=longest)
    context = spec.context or min(limits.get("sequence", _CONTEXT), _CONTEXT)
    for axis, wanted, limit in (
        ("batch.max", spec.batch.max, limits.get("batch")),
        ("sequence.max", sequence.max, limits.get("sequence")),
        ("context", context, limits.get("sequence")),
    ):
        if limit is not None and wanted > limit:
            raise ExportError(
                f"export.{axis} is {wanted}",
                expected=f"at most {limit}, the largest {axis.partition('.')[0]} that the model takes",
                fix=f"lower export.{axis}",
            )
    first = {kind: getattr(sequence, kind) for kind in _KINDS}
    sizes = {
        "batch": {kind: getattr(spec.batch, kind) for kind in _KINDS},
        PAST_SEQUENCE: {"min": 0, "opt": 0, "max": context},
        TOTAL_SEQUENCE: {**first, "max": sequence.max + context},
    }
    return _shapes(inputs, sizes, first)


def decode_profiles(onnx_path: Path, profiles: Profiles) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of calls with one token per row, for which an engine has kernels of their own; empty without a cache.

    Args:
        onnx_path: a graph.
        profiles: of calls of any length, see :func:`profiles_for`.
    """
    inputs = graph_inputs(onnx_path)
    # A tensor that holds all tokens, or one that does where prompts are short.
    ends = [(name, axis) for name, dims in inputs.items() for axis, dim in enumerate(dims) if _unbounded(name, dim)]
    if not ends:
        return {}
    past, axis = ends[0]
    context = profiles[past]["max"][axis]
    lengths = {"min": 0, "opt": context // 2, "max": context}
    sizes = {
        "batch": {kind: profiles[past][kind][0] for kind in _KINDS},
        PAST_SEQUENCE: lengths,
        TOTAL_SEQUENCE: {kind: length + 1 for kind, length in lengths.items()},
    }
    return _shapes(inputs, sizes, dict.fromkeys(_KINDS, 1))


def _unbounded(name: str, dim: int | str) -> bool:
    return is_past(name) and isinstance(dim, str) and dim.startswith((PAST_SEQUENCE, PAST_KEPT))


def _shapes(
    inputs: Mapping[str, Dims], sizes: Mapping[str, Mapping[str, int]], others: Mapping[str, int]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Input -> smallest, best and largest shape, from the sizes of named axes and of all other axes that vary."""

    def size(axis: int, dim: int | str, kind: str) -> int:
        if isinstance(dim, int):
            return dim
        if axis and dim.startswith(PAST_KEPT) and kind == "max":
            # A text may be a short prompt and many tokens behind it, all of which are held.
            return sizes[PAST_SEQUENCE][kind]
        if axis and dim.startswith((PAST_KEPT, PAST_WINDOW)):
            return held_of(dim, sizes[PAST_SEQUENCE][kind])
        return sizes.get("batch" if axis == 0 else dim, others)[kind]

    return {
        name: {kind: tuple(size(axis, dim, kind) for axis, dim in enumerate(dims)) for kind in _KINDS}
        for name, dims in inputs.items()
        if not all(isinstance(dim, int) for dim in dims)
    }
