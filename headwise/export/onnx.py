"""PyTorch -> ONNX: export, clean-up, and the checks that the graph is the model.

Transformers models go through transformers' own exporter, which knows their masks, caches and attention functions;
every other module goes through ``torch.onnx.export``. Both write the opset-23 ``Attention`` operator, which TensorRT
turns into one fused kernel per layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from headwise.device.arrays import Dims
from headwise.errors import ExportError
from headwise.export.graph import clean_up, save_graph, signature
from headwise.export.runners import OrtRunner
from headwise.export.tracing import caching, grouped_heads, no_fastpath, quiet, tuple_outputs
from headwise.model.forward import of_decoder, real_tokens, run, to_torch
from headwise.tolerances import ONNX_PARITY

Batch = Mapping[str, NDArray[Any]]
_REFUSALS = (RuntimeError, IndexError, ValueError)
"""What a forward raises on shapes or values that it does not take."""


class Parity(NamedTuple):
    """Largest absolute difference between the graph and the module on one batch."""

    shape: str
    output: str
    max_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """What was written.

    Attributes:
        inputs: name -> (dtype, dims); a dynamic dim is a name, ``batch`` or ``sequence``.
        outputs: the same.
        opset: of the default domain.
        nodes: operator type -> count.
        parity: against the module, at several shapes.
    """

    inputs: Mapping[str, tuple[str, Dims]]
    outputs: Mapping[str, tuple[str, Dims]]
    opset: int
    nodes: Mapping[str, int]
    parity: tuple[Parity, ...]


def to_onnx(
    module: torch.nn.Module,
    sample: Batch,
    path: Path,
    *,
    dynamic: Mapping[str, tuple[int, ...]],
    opset: int = 23,
    tolerance: float = ONNX_PARITY,
) -> ExportInfo:
    """Export a module and check the graph against it.

    Args:
        module: in eval mode, on the CPU, in fp32.
        sample: a real batch (batch axis first). Padding in it keeps the mask an input; a dynamic axis is longer than 1.
        path: the ONNX file; weights past the limit of protobuf go to a file beside it.
        dynamic: input name -> axes that vary, the batch axis included.
        opset: of the default domain; 23 is the first with ``Attention``.
        tolerance: see :func:`check_parity`.

    Raises:
        ExportError: the exporter gave up, an input was lost or an axis fixed, or the graph disagrees with the module.
    """
    _check_sample(sample, dynamic)
    inputs = to_torch(sample)
    with torch.no_grad():
        names = list(run(module, inputs))
    shapes = {name: dict.fromkeys(dynamic.get(name, ()), Dim.AUTO) for name in sample}
    try:
        with quiet(), caching(module, False), no_fastpath(), grouped_heads(), torch.no_grad():
            export = _export_transformers if isinstance(module, PreTrainedModel) else _export_plain
            model = export(module, inputs, shapes, names, opset)
    except Exception as error:  # the exporters raise anything, from TypeError to internal assertions
        raise not_traceable(module, error) from error
    clean_up(model, inputs=list(sample), outputs=names, dynamic=dynamic)
    save_graph(model, path)
    return ExportInfo(
        inputs={str(value.name): signature(value) for value in model.graph.inputs},
        outputs={str(value.name): signature(value) for value in model.graph.outputs},
        opset=model.opset_imports[""],
        nodes=dict(sorted(Counter(node.op_type for node in model.graph).items())),
        parity=check_parity(module, path, _variants(module, sample, dynamic), tolerance),
    )


def check_parity(
    module: torch.nn.Module, path: Path, batches: Sequence[Batch], tolerance: float = ONNX_PARITY
) -> tuple[Parity, ...]:
    """Compare a graph on ONNX Runtime with its module on every batch.

    Padded positions of per-token outputs are left out: what a model writes there is nobody's answer, and exporters may
    change it.

    Args:
        module: the module that was exported.
        path: the graph.
        batches: batches of different shapes.
        tolerance: largest absolute difference, relative to the largest output where that is above 1.

    Raises:
        ExportError: an output differs by more, or is not a number.
    """
    found = []
    with OrtRunner(path) as runner, torch.no_grad():
        for batch in batches:
            label = "x".join(str(size) for size in next(iter(batch.values())).shape)
            expected, actual = _reference(module, batch, label), runner(batch)
            for name, tensor in expected.items():
                reference = _valid(tensor.float().numpy(), batch, name)
                output = _valid(actual[name], batch, name)
                found.append(compare(Case(output=name, shape=label), reference, output, tolerance))
    return tuple(found)


class Case(NamedTuple):
    """What two arrays are that ought to be equal."""

    output: str
    shape: str


def compare(case: Case, reference: NDArray[Any], actual: NDArray[Any], tolerance: float) -> Parity:
    """The largest difference between an output of the module and of the graph.

    Raises:
        ExportError: the shapes differ, or it is larger than the tolerance, relative to the largest number where that is
            above 1.
    """
    worst = _difference(reference, actual, case.output)
    if not worst <= tolerance * max(1.0, float(np.abs(reference).max(initial=0.0))):
        raise ExportError(
            f"output {case.output} of the graph is off by {worst:.3g} at {case.shape}",
            expected=f"at most {tolerance:g} from the module",
            fix="do not turn sizes or values of tensors into Python numbers; else try another opset",
        )
    return Parity(shape=case.shape, output=case.output, max_abs=worst)


def not_traceable(module: torch.nn.Module, error: Exception) -> ExportError:
    """The error of a module that the exporter gave up on."""
    return ExportError(
        f"{type(module).__name__} cannot be exported: {_summary(error)}",
        expected="a forward that torch.export can trace with these inputs",
        fix="remove control flow that depends on tensor values; the full trace is the cause of this error",
    )


def _reference(module: torch.nn.Module, batch: Batch, label: str) -> dict[str, torch.Tensor]:
    try:
        return run(module, to_torch(batch))
    except _REFUSALS as error:
        raise ExportError(
            f"the module itself does not run at {label}: {_summary(error)}",
            expected="a forward that takes every size of the axes that are to be dynamic",
            fix="mark only axes as dynamic that may vary",
        ) from error


def _difference(reference: NDArray[Any], actual: NDArray[Any], name: str) -> float:
    if reference.shape != actual.shape:
        raise ExportError(
            f"output {name} of the graph has shape {actual.shape}",
            expected=f"{reference.shape}, as the module returns",
            fix="mark the axes that vary as dynamic",
        )
    return float(np.abs(reference - actual).max(initial=0.0))


def _valid(output: NDArray[Any], batch: Batch, name: str) -> NDArray[Any]:
    """The positions of a per-token output that are no padding; other outputs as they are."""
    mask = real_tokens(batch, decoder=of_decoder(name))
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return output
    return np.asarray(output[mask])


def _check_sample(sample: Batch, dynamic: Mapping[str, tuple[int, ...]]) -> None:
    for name, axes in dynamic.items():
        short = [axis for axis in axes if sample[name].shape[axis] < 2]
        if short:
            raise ExportError(
                f"the sample's input {name} has shape {sample[name].shape}, but axis {short[0]} is to be dynamic",
                expected="at least 2 along every dynamic axis: the exporter takes a 1 for a constant",
                fix="export with a batch of two or more rows",
            )


def _variants(module: torch.nn.Module, sample: Batch, dynamic: Mapping[str, tuple[int, ...]]) -> list[Batch]:
    """The sample, its first row alone, its rows twice, with padding where it has none, and another length."""
    batched = {name for name, axes in dynamic.items() if 0 in axes}
    single = {n: a[:1] if n in batched else a for n, a in sample.items()}
    double = {n: np.concatenate([a, a[::-1]]) if n in batched else a for n, a in sample.items()}
    variants: list[Batch] = [sample]
    if batched:
        variants += [single, double]
    for name in (n for n in sample if n.endswith("attention_mask") and sample[n].all()):
        padded = sample[name].copy()
        padded[0, -1] = 0
        variants.append({**sample, name: padded})
    if any(axis > 0 for axes in dynamic.values() for axis in axes):
        lengths = [{n: _crop(a, dynamic.get(n, ()), side) for n, a in sample.items()} for side in ("head", "tail")]
        lengths.append({n: _pad(n, a, dynamic.get(n, ())) for n, a in sample.items()})
        variants.append(next((batch for batch in lengths if _runs(module, batch)), lengths[0]))
    return variants


def _runs(module: torch.nn.Module, batch: Batch) -> bool:
    """Whether every row keeps a token, and with it whatever else the module looks for, such as an end of sequence."""
    if not all(mask.any(axis=-1).all() for name, mask in batch.items() if name.endswith("attention_mask")):
        return False
    try:
        with torch.no_grad():
            run(module, to_torch(batch))
    except _REFUSALS:
        return False
    return True


def _pad(name: str, array: NDArray[Any], axes: Sequence[int]) -> NDArray[Any]:
    """One position of padding more along the varying axes."""
    fill = int(name.endswith("padding_mask"))
    return np.pad(array, [(0, int(axis > 0 and axis in axes)) for axis in range(array.ndim)], constant_values=fill)


def _crop(array: NDArray[Any], axes: Sequence[int], side: str) -> NDArray[Any]:
    for axis in (axis for axis in axes if axis > 0):
        size = array.shape[axis]
        keep = np.arange(size)[: (size + 1) // 2] if side == "head" else np.arange(size)[size // 2 :]
        array = np.take(array, keep, axis)
    return array


def _export_transformers(
    module: Any, inputs: dict[str, torch.Tensor], shapes: dict[str, dict[int, Any]], names: list[str], opset: int
) -> ir.Model:
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
    exporter: Any = OnnxExporter()
    program: ir.Model = exporter.export(module, inputs, config=config).program
    return program


def _export_plain(
    module: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    shapes: dict[str, dict[int, Any]],
    names: list[str],
    opset: int,
) -> ir.Model:
    with tuple_outputs(module):
        program = torch.onnx.export(
            module,
            args=(),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=names,
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise ValueError("torch.onnx.export returned no program")
    return program.model


def _summary(error: BaseException) -> str:
    """The innermost cause in one line; the exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
