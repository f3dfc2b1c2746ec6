"""Clean-up of an exported graph: what the exporter leaves to the runtime, to the reader and to chance."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass, ShapeInferencePass

from headwise.device.arrays import ANY, Dims, Port
from headwise.errors import ExportError

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_EXTERNAL_BYTES = 1_800_000_000  # a protobuf message ends at 2 GiB
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def clean_up(
    model: ir.Model,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, tuple[int, ...]],
    names: Mapping[str, Mapping[int, str]] | None = None,
) -> None:
    """Make the graph what the module is: these inputs and outputs, these dynamic axes, and nothing of this machine.

    Args:
        model: changed in place.
        inputs: names that the graph must take, all of them and no other.
        outputs: names that the graph must return, in this order.
        dynamic: input -> axes that must have stayed dynamic.
        names: input -> axis -> what a dynamic axis is called; by default ``batch`` and ``sequence``.

    Raises:
        ExportError: an input or output was lost, or an axis was fixed.
    """
    _keep_outputs(model, outputs)
    ShapeInferencePass()(model)
    _fit_operators(model.graph)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    _drop_notes(model)
    _name_dims(model.graph, dynamic, names or {})
    _check_inputs(model.graph, inputs, dynamic)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write one file, or the graph and ``<name>.data`` when the weights pass the limit of protobuf."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > _EXTERNAL_BYTES else None)


def copy_graph(source: Path, target: Path) -> None:
    """Copy a graph that ``save_graph`` wrote to a file of the same name in another folder."""
    for name in (source.name, f"{source.name}.data"):
        if source.with_name(name).exists():
            shutil.copyfile(source.with_name(name), target.with_name(name))


def module_path(node: onnx.NodeProto) -> str:
    """Path of the module that a node came from; the exporter's list ends with the name of the node itself."""
    scopes = next((item.value for item in node.metadata_props if item.key == NAME_SCOPES), "[]")
    paths = ast.literal_eval(scopes)[:-1]
    return str(paths[-1]) if paths else ""


def graph_inputs(path: Path) -> dict[str, Dims]:
    """Input -> dims of a graph on disk; a dynamic dim is a name."""
    return {name: port.dims for name, port in graph_ports(path)[0].items()}


def graph_ports(path: Path) -> tuple[dict[str, Port], dict[str, Port]]:
    """Inputs and outputs of a graph on disk, by name; a size that varies is a name.

    Raises:
        ExportError: the file holds no graph.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ExportError(
            f"{path} holds no ONNX graph: {error}",
            expected="a file that an exporter has written to its end",
            fix="export it again, or copy it again",
        ) from error
    return _ports(graph.input), _ports(graph.output)


def _ports(values: Iterable[onnx.ValueInfoProto]) -> dict[str, Port]:
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        sizes = (dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or ANY) for dim in tensor.shape.dim)
        found[value.name] = Port(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, tuple(sizes))
    return found


def signature(value: ir.Value) -> tuple[str, Dims]:
    """Dtype and dims of a graph input or output; a dynamic dim is a name."""
    dims = () if value.shape is None else value.shape
    return str(value.dtype), tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims)


def _keep_outputs(model: ir.Model, names: Sequence[str]) -> None:
    values = {value.name: value for value in model.graph.outputs}
    lost = [name for name in names if name not in values]
    if lost:
        raise ExportError(
            f"the graph lost the outputs {', '.join(lost)}; it has {', '.join(str(name) for name in values)}",
            expected="every output of the module",
            fix="return outputs as tensors of their own, not as views of an input",
        )
    model.graph.outputs[:] = [values[name] for name in names]


def _drop_notes(model: ir.Model) -> None:
    """Drop notes that hold paths of this machine; of the metadata only the module path of a node stays."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()


def _fit_operators(graph: ir.Graph) -> None:
    """Write out what the exporter leaves to the operator, and a runtime does not do.

    For ONNX Runtime a mask ``(B, H, 1, T)`` of ``Attention`` gets its query axis, and rotary tables ``(1, S, D/2)`` get
    their batch axis. For TensorRT, which else does not find out that gathered keys have as many heads as queries,
    reshapes get sizes that are known in the place of -1.
    """
    for node in list(graph.all_nodes()):
        if node.op_type == "Attention" and len(node.inputs) > 3:
            _expand(node, 3, axis=-2, like=0, like_axis=-2)
        elif node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
            for index in (1, 2):
                _expand(node, index, axis=0, like=0, like_axis=0)
        elif node.op_type == "Reshape":
            _say_sizes(node)


def _expand(node: ir.Node, index: int, *, axis: int, like: int, like_axis: int) -> None:
    """Repeat input ``index`` of a node along an axis of size 1 up to the size of an axis of input ``like``."""
    value, model = node.inputs[index], node.inputs[like]
    if value is None or model is None or value.shape is None or model.shape is None or node.graph is None:
        return
    if value.shape[axis] != 1 or model.shape[like_axis] == 1:
        return
    start, rank = like_axis % len(model.shape), len(value.shape)
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.int64))})
    size = ir.node("Shape", [model], {"start": start, "end": start + 1})
    parts = [size.outputs[0] if i == axis % rank else one.outputs[0] for i in range(rank)]
    shape = ir.node("Concat", parts, {"axis": 0})
    expand = ir.node("Expand", [value, shape.outputs[0]])
    dims = [model.shape[like_axis] if i == axis % rank else dim for i, dim in enumerate(value.shape)]
    expand.outputs[0].type, expand.outputs[0].shape = value.type, ir.Shape(dims)
    added = (one, size, shape, expand)
    for position, new in enumerate(added):
        new.name = new.outputs[0].name = f"{node.name}_expand_{index}_{position}"
    node.graph.insert_before(node, added)
    node.replace_input_with(index, expand.outputs[0])


def _say_sizes(node: ir.Node) -> None:
    """Put the known size of an axis in the place of -1 where a shape is put together from single sizes.

    Reshapes share shapes, and -1 may stand for another size in each: queries, keys and values of layers that have fewer
    of some. So this one gets a shape of its own.
    """
    target, reshaped = node.inputs[1], node.outputs[0].shape
    sizes = None if target is None else target.producer()
    if sizes is None or sizes.op_type != "Concat" or reshaped is None or len(sizes.inputs) != len(reshaped):
        return
    parts, added = list(sizes.inputs), []
    for axis, (value, size) in enumerate(zip(sizes.inputs, reshaped, strict=True)):
        constant = None if value is None else ir.convenience.get_const_tensor(value)
        if constant is not None and constant.numpy().tolist() == [-1] and isinstance(size, int):
            added.append(ir.node("Constant", [], {"value": ir.tensor(np.array([size], np.int64))}))
            parts[axis] = added[-1].outputs[0]
    if not added or node.graph is None:
        return
    added.append(ir.node("Concat", parts, {"axis": 0}))
    for position, new in enumerate(added):
        new.name = new.outputs[0].name = f"{node.name}_size_{position}"
    node.graph.insert_before(node, added)
    node.replace_input_with(1, added[-1].outputs[0])


def _name_dims(
    graph: ir.Graph, dynamic: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Mapping[int, str]]
) -> None:
    """Give the symbols of the inputs the wanted names, or ``batch`` and ``sequence``, everywhere in the graph."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis in dynamic.get(str(value.name), ()):
            symbol = value.shape[axis] if value.shape is not None else None
            if isinstance(symbol, ir.SymbolicDim) and symbol.value not in names:
                others = len(set(names.values()) - {"batch"})
                usual = "batch" if axis == 0 else f"sequence_{others}" if others else "sequence"
                names[str(symbol.value)] = wanted.get(str(value.name), {}).get(axis, usual)
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        dims = [
            dim if isinstance(dim, int) else _SYMBOL.sub(lambda m: names.get(m[0], m[0]), str(dim.value))
            for dim in value.shape
        ]
        value.shape = ir.Shape(dims)


def _check_inputs(graph: ir.Graph, inputs: Sequence[str], dynamic: Mapping[str, tuple[int, ...]]) -> None:
    values = {str(value.name): value for value in graph.inputs}
    read = {name for name, value in values.items() if value.uses() or value.is_graph_output()}
    lost, extra = [name for name in inputs if name not in read], [name for name in values if name not in inputs]
    if lost or extra:
        raise ExportError(
            f"the graph {'lost' if lost else 'has unknown'} inputs: {', '.join(lost or extra)}",
            expected="exactly the inputs of the sample: " + ", ".join(inputs),
            fix="export with a batch that has padding in it, or leave out inputs that the model does not read",
        )
    for name, axes in dynamic.items():
        shape = values[name].shape
        fixed = [axis for axis in axes if shape is None or isinstance(shape[axis], int)]
        if fixed:
            raise ExportError(
                f"axis {fixed[0]} of input {name} was fixed at {shape[fixed[0]] if shape is not None else 'nothing'}",
                expected="a dynamic axis",
                fix="the forward turns this size into a constant: take it from tensor.shape where it is used",
            )
