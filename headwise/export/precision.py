"""The precision of a graph, written into the ONNX file, because TensorRT 11 takes the types of a graph as they are."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
from pydantic import Field, model_validator

from headwise.errors import ExportError
from headwise.export.angles import Angles
from headwise.spec import Spec

Precision = Literal["fp32", "fp16", "bf16"]

_FP16_MAX = 65504.0
_BF16_MAX = float.fromhex("0x1.FEp127")
_NO_MASK = float(np.finfo(np.float32).max)


class Range(Spec):
    """The sizes of one dynamic axis in an engine."""

    min: int = Field(default=1, ge=1)
    """The smallest size."""
    opt: int = Field(default=1, ge=1)
    """The size that the kernels are chosen for."""
    max: int = Field(default=8, ge=1)
    """The largest size."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min} <= opt {self.opt} <= max {self.max} does not hold")
        return self


class ExportSpec(Spec):
    """How the graph and the engine are made."""

    precision: Precision = "fp16"
    """The float type of weights and activations in graphs for TensorRT; the target ``cpu`` computes in fp32."""
    opset: int = Field(default=23, ge=20, le=24)
    """ONNX opset; 23 is the first one with the Attention operator, which becomes one fused kernel."""
    clusters: Literal["auto", "gathered", "fused"] = "auto"
    """How clustered layers compute: scores of the representatives only, gathered for all heads (``gathered``), or all
    scores in one fused kernel per layer (``fused``). ``auto`` exports both: fused for engines, else the faster one."""
    cache: Literal["auto"] | bool = "auto"
    """Whether a decoder's graph takes the keys and values of earlier calls and returns them with its own, so that it
    can generate text. ``auto``: where the model generates text and all its layers allow it."""
    decode: Literal["auto", "same"] = "auto"
    """Calls of one token per row. ``auto`` exports a second graph for them where latent attention absorbs its
    projections, and builds a second engine; ``same`` leaves them to the graph that reads prompts."""
    keep_io: bool = False
    """Keep float inputs and outputs in fp32 and cast inside of the graph."""
    batch: Range = Range()
    """Batch sizes of the engine."""
    sequence: Range | None = None
    """Sequence lengths of the engine; without it, 1 to the model's longest (512 where the model has no limit)."""
    context: int | None = Field(default=None, ge=1)
    """Tokens of earlier calls that the engine of a decoder takes; without it, the model's longest, but at most 4096."""
    workspace_mb: int | None = Field(default=None, ge=1)
    """Limit of the scratch memory of the engine in MiB; without it the builder decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionInfo:
    """What was written.

    Attributes:
        precision: of weights and activations.
        bytes: size of the file.
        casts: casts that the conversion put around operators without a kernel in this precision.
        runs_on_cpu: False for bf16, which ONNX Runtime has no CPU kernels for: it can only be judged on the device.
    """

    precision: str
    bytes: int
    casts: int
    runs_on_cpu: bool


def convert_precision(src: Path, dst: Path, precision: Precision, *, keep_io: bool = False) -> PrecisionInfo:
    """Write the graph in another precision. Integer inputs (token ids, masks) keep their types.

    Args:
        src: an fp32 graph.
        dst: the new file.
        precision: ``fp32`` copies the file.
        keep_io: keep float inputs and outputs in fp32.

    Raises:
        ExportError: a weight does not fit the precision, or an operator cannot be converted.
    """
    if precision == "fp32":
        shutil.copyfile(src, dst)
        return PrecisionInfo(precision=precision, bytes=dst.stat().st_size, casts=0, runs_on_cpu=True)
    model = onnx.load(str(src))
    before = _casts(model)
    model = to_precision(model, precision, keep_io=keep_io)
    onnx.save(model, str(dst))
    return PrecisionInfo(
        precision=precision,
        bytes=dst.stat().st_size,
        casts=_casts(model) - before,
        runs_on_cpu=precision != "bf16",
    )


def to_precision(model: onnx.ModelProto, precision: Precision, *, keep_io: bool = False) -> onnx.ModelProto:
    """The model in another precision, see :func:`convert_precision`; the one that was given must not be used again."""
    if precision == "fp32":
        return model
    angles = Angles.of(model)
    model = _to_float16(model, keep_io) if precision == "fp16" else _to_bfloat16(model, keep_io)
    angles.put_back(model.graph, TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16)
    check_graph(model, f"the {precision} graph", fix="use precision fp32, or the other half type")
    return model


def check_graph(model: onnx.ModelProto, what: str, *, fix: str) -> None:
    """Raise ExportError unless the graph is valid ONNX whose types agree."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{what} is not valid: {str(error).strip().splitlines()[0]}", expected="a graph whose types agree", fix=fix
        ) from error


def _casts(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in model.graph.node)


def _to_float16(model: onnx.ModelProto, keep_io: bool) -> onnx.ModelProto:
    # onnxruntime's tools are slow to import, and only this conversion needs them
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = np.abs(numpy_helper.to_array(tensor))
            # infinity and the lowest float mean "masked", and the converter's clamp keeps that meaning
            too_large = values[(values > _FP16_MAX) & (values < _NO_MASK)]
            if too_large.size:
                raise ExportError(
                    f"weight {tensor.name} holds {float(too_large.max()):.6g}",
                    expected=f"at most {_FP16_MAX:.0f}, the largest fp16 number",
                    fix="use precision bf16 (sm80 and later) or fp32",
                )
    logger = logging.getLogger("onnxruntime.transformers.float16")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line per weight that is rounded up from below 6e-8
            converted = OnnxModel(convert_float_to_float16(model, keep_io_types=keep_io))
            converted.topological_sort()  # the casts of inputs are appended at the end
    finally:
        logger.setLevel(level)
    half: onnx.ModelProto = converted.model
    return half


def _to_bfloat16(model: onnx.ModelProto, keep_io: bool) -> onnx.ModelProto:
    """Retype every float value; an operator without bf16 in its schema runs in fp32 between casts."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = [*inferred.input, *inferred.output, *inferred.value_info]
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    for tensor in graph.initializer:
        _round(tensor)
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _retyped(node, floats, opset)
    ports = [*graph.input, *graph.output]
    if keep_io:
        nodes = _float_ports(graph, nodes, floats)
    for value in [*graph.value_info, *([] if keep_io else ports)]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _round(tensor: TensorProto) -> None:
    """An fp32 tensor in bf16; the lowest float would round to -inf, and 0 * -inf in a mask is NaN, so it is clipped."""
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    clipped = np.where(np.isfinite(values), np.clip(values, -_BF16_MAX, _BF16_MAX), values)
    tensor.CopyFrom(numpy_helper.from_array(clipped.astype(ml_dtypes.bfloat16), tensor.name))


def _retyped(node: NodeProto, floats: set[str], opset: int) -> Iterator[NodeProto]:
    """The node in bf16, or in fp32 between casts."""
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise ExportError(
                f"node {node.name} ({node.op_type}) holds a subgraph",
                expected="a graph without control flow for bf16",
                fix="use precision fp16",
            )
    if node.op_type == "Constant" and node.output[0] in floats:
        value = _constant(node)
        _round(value)
        yield helper.make_node("Constant", [], list(node.output), name=node.name, value=value)
        return
    unsupported = _without_bfloat16(node, floats, opset)
    inputs = {name: f"{node.name}_{name}_fp32" for name in dict.fromkeys(unsupported["inputs"])}
    outputs = {name: f"{node.name}_{name}_fp32" for name in unsupported["outputs"]}
    for name, cast in inputs.items():
        yield helper.make_node("Cast", [name], [cast], name=f"{cast}_in", to=TensorProto.FLOAT)
    node.input[:] = [inputs.get(name, name) for name in node.input]
    node.output[:] = [outputs.get(name, name) for name in node.output]
    for attribute in [] if outputs else node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.BFLOAT16
        if attribute.type == AttributeProto.TENSOR:
            _round(attribute.t)
    yield node
    for name, cast in outputs.items():
        yield helper.make_node("Cast", [cast], [name], name=f"{cast}_out", to=TensorProto.BFLOAT16)


def _constant(node: NodeProto) -> TensorProto:
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: TensorProto = attribute.t
        return tensor
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), np.float32))


def _without_bfloat16(node: NodeProto, floats: set[str], opset: int) -> Mapping[str, list[str]]:
    """The float inputs and outputs of a node whose schema has no bf16 for them."""
    found: dict[str, list[str]] = {"inputs": [], "outputs": []}
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError as error:
        raise ExportError(
            f"node {node.name} ({node.domain}:{node.op_type}) is not an ONNX operator",
            expected="the operators of the default set for bf16",
            fix="use precision fp16",
        ) from error
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    sides = (("inputs", node.input, schema.inputs), ("outputs", node.output, schema.outputs))
    for side, names, formals in sides:
        for index, name in enumerate(names):
            formal = formals[min(index, len(formals) - 1)]  # the last one may be variadic
            types = allowed.get(formal.type_str, {formal.type_str})
            if name in floats and "tensor(bfloat16)" not in types:
                found[side].append(name)
    return found


def _float_ports(graph: onnx.GraphProto, nodes: list[NodeProto], floats: set[str]) -> list[NodeProto]:
    """Casts behind the float inputs and before the float outputs, which stay fp32."""
    inputs = {value.name: f"{value.name}_bf16" for value in graph.input if value.name in floats}
    outputs = {value.name: f"{value.name}_bf16" for value in graph.output if value.name in floats}
    names = {**inputs, **outputs}
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [outputs.get(name, name) for name in node.output]
    head = [helper.make_node("Cast", [n], [c], name=f"{c}_in", to=TensorProto.BFLOAT16) for n, c in inputs.items()]
    tail = [helper.make_node("Cast", [c], [n], name=f"{c}_out", to=TensorProto.FLOAT) for n, c in outputs.items()]
    return [*head, *nodes, *tail]
