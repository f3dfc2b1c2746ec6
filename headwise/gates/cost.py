"""What a graph costs: multiply-accumulates and weights counted in the ONNX file itself, and measured latency."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from headwise.device.machine import cpu_model
from headwise.errors import ExportError
from headwise.export.graph import module_path
from headwise.export.widen import widen_model
from headwise.gates.macs import Shape, counts, macs

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_PACKED = frozenset(
    {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
    | {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1}
)
_SMALL = 1024  # shapes and axes are smaller than this, weights are not needed to infer shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCost:
    """Cost of one graph at given input shapes.

    Attributes:
        macs: multiply-accumulates of every matrix multiplication, convolution and attention in the graph. A causal mask
            does not lower the count.
        attention_macs: of the nodes under the attention modules: projections, scores and weighted sum.
        by_scope: module path -> its own MACs, without those of its children.
        parameters: elements of the float and quantized weights in the file, one-element constants left out. A tied
            weight that the graph holds twice counts twice.
        file_bytes: of the graph, with its external data.
    """

    macs: int
    attention_macs: int
    by_scope: Mapping[str, int]
    parameters: int
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Wall time of one call.

    Attributes:
        median_ms, p90_ms: over the rounds.
        rounds: measured calls.
        device: what it ran on.
        threads: CPU threads; None where the backend decides.
        method: how it was measured.
        times_ms: of every round.
    """

    median_ms: float
    p90_ms: float
    rounds: int
    device: str
    threads: int | None
    method: str
    times_ms: tuple[float, ...]


def graph_cost(onnx_path: Path, shapes: Mapping[str, Shape], attention_scopes: Sequence[str] = ()) -> GraphCost:
    """Count a graph's multiply-accumulates and weights.

    Args:
        onnx_path: a graph of the default operator set.
        shapes: input name -> concrete shape.
        attention_scopes: module paths whose nodes count as attention, with everything below them.

    Raises:
        ExportError: an input has no shape here, or a node's work cannot be counted. Nothing is skipped in silence.
    """
    model = onnx.load(str(onnx_path), load_external_data=False)
    nodes = [node for node in model.graph.node if counts(node)]
    sizes = known_shapes(onnx_path, model, shapes)
    total: Counter[str] = Counter()
    for node in nodes:
        total[module_path(node)] += macs(node, sizes)
    prefixes = tuple(f"{scope}." for scope in attention_scopes)
    files = [onnx_path, onnx_path.with_name(f"{onnx_path.name}.data")]
    return GraphCost(
        macs=sum(total.values()),
        attention_macs=sum(count for scope, count in total.items() if f"{scope}.".startswith(prefixes)),
        by_scope=dict(total),
        parameters=_parameters(model.graph),
        file_bytes=sum(file.stat().st_size for file in files if file.exists()),
    )


def known_shapes(onnx_path: Path, model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Concrete shapes of all values around the nodes that multiply, inferred or else measured.

    Args:
        onnx_path: the graph, which is run where inference cannot tell a shape.
        model: the same, without external data.
        shapes: input name -> concrete shape.

    Raises:
        ExportError: an input has no shape here, or a shape cannot be told.
    """
    sizes = _shapes(model, shapes)
    nodes = [node for node in model.graph.node if counts(node)]
    missing = {name for node in nodes for name in [*node.input, *node.output] if name and name not in sizes}
    return sizes | _measured_shapes(onnx_path, shapes, missing) if missing else sizes


def latency(
    runners: Mapping[str, Callable[[Mapping[str, NDArray[Any]]], Any]],
    batch: Mapping[str, NDArray[Any]],
    rounds: int = 20,
    warmup: int = 3,
) -> dict[str, Latency]:
    """Measure runners against each other in one process, one timed call of each per round, so that load hits all alike.

    What comes first in a round is slower, also than itself. So every other round goes backwards, and every timed call
    has one in front that brings the caches back.

    Args:
        runners: label -> runner or any other callable.
        batch: the input of every call.
        rounds: measured calls of each.
        warmup: calls of each before that.
    """
    for runner in runners.values():
        for _ in range(warmup):
            runner(batch)
    times: dict[str, list[float]] = {label: [] for label in runners}
    labels = list(runners)
    for number in range(rounds):
        for label in labels[::-1] if number % 2 else labels:
            runner = runners[label]
            runner(batch)
            start = time.perf_counter()
            runner(batch)
            times[label].append(1e3 * (time.perf_counter() - start))
    size = "x".join(str(n) for n in next(iter(batch.values())).shape)
    method = f"median of {rounds} interleaved calls in both orders after {warmup} to warm up, input {size}"
    return {
        label: Latency(
            median_ms=float(np.median(values)),
            p90_ms=float(np.percentile(values, 90)),
            rounds=rounds,
            device=_device(runners[label]),
            threads=getattr(runners[label], "threads", None),
            method=method,
            times_ms=tuple(values),
        )
        for label, values in times.items()
    }


def device_name() -> str:
    """The CPU's model and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_model()}, {cores} cores"


def _device(runner: object) -> str:
    device = getattr(runner, "device", "cpu")
    return device_name() if device == "cpu" else str(device)


def _shapes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Concrete shapes of all values that shape inference can tell. Weights are not copied into the inference."""
    graph = model.graph
    missing = [value.name for value in graph.input if value.name not in shapes]
    if missing:
        raise ExportError(
            f"no shape for input {', '.join(missing)}",
            expected="a concrete shape for every input of the graph",
            fix="pass the shapes of a real batch",
        )
    lean = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    lean.graph.name = graph.name
    lean.graph.node.extend(graph.node)
    for value in graph.input:
        dtype = value.type.tensor_type.elem_type
        lean.graph.input.append(helper.make_tensor_value_info(value.name, dtype, shapes[value.name]))
    for tensor in graph.initializer:
        if prod(tensor.dims) > _SMALL:
            lean.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            lean.graph.initializer.append(tensor)
    sizes = _symbols(graph, shapes)
    for source, copies in ((graph.value_info, lean.graph.value_info), (graph.output, lean.graph.output)):
        for value in source:
            dims = [sizes.get(d.dim_param, d.dim_value or None) for d in value.type.tensor_type.shape.dim]
            dtype = value.type.tensor_type.elem_type
            copies.append(helper.make_tensor_value_info(value.name, dtype, dims))
    inferred = onnx.shape_inference.infer_shapes(lean, data_prop=True).graph
    known: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*inferred.input, *inferred.output, *inferred.value_info]:
        tensor_type = value.type.tensor_type
        if tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor_type.shape.dim):
            known[value.name] = tuple(dim.dim_value for dim in tensor_type.shape.dim)
    return known


def _symbols(graph: onnx.GraphProto, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Size of every named dimension of the inputs; the exporter wrote shapes with these names into the graph."""
    sizes: dict[str, int] = {}
    for value in graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            if dim.dim_param and sizes.setdefault(dim.dim_param, size) != size:
                raise ExportError(
                    f"input {value.name} has {size} along {dim.dim_param}, another input has {sizes[dim.dim_param]}",
                    expected="one size for a dimension of one name",
                    fix="pass the shapes of a real batch",
                )
    return sizes


def _measured_shapes(path: Path, shapes: Mapping[str, Shape], names: set[str]) -> dict[str, Shape]:
    """Shapes that inference cannot tell, from one run with all inputs at one."""
    model = onnx.load(str(path))
    widen_model(model)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - outputs))
    feed = {}
    for value in model.graph.input:
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = np.ones(shapes[value.name], dtype)
    options = ort.SessionOptions()
    # Shapes are those of the graph as it is written; optimizers also stumble over codes that are used again.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        wanted = sorted(names)
        return {name: np.shape(array) for name, array in zip(wanted, session.run(wanted, feed), strict=True)}
    except Exception as error:  # ONNX Runtime's exception classes share no public base
        raise ExportError(
            f"the shapes of {', '.join(sorted(names))} are not known, and the graph does not run: {error}",
            expected="a graph whose shapes can be told",
            fix="export it again for this batch",
        ) from error


def _parameters(graph: onnx.GraphProto) -> int:
    weights = [tensor for tensor in graph.initializer if tensor.data_type in _FLOATS | _PACKED]
    return sum(size for size in (prod(tensor.dims) for tensor in weights) if size > 1)
