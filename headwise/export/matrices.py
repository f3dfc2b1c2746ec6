"""The weight matrices of a graph under their names in the checkpoint, and the activations that they multiply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from headwise.calibration.ranges import Tap
from headwise.device.arrays import store
from headwise.device.session import DISABLED_OPTIMIZERS, ports
from headwise.errors import ExportError
from headwise.export.graph import module_path
from headwise.export.ports import first_call
from headwise.model.quantization import Matrix

Array = NDArray[Any]

_SMALLEST_TABLE = 4096
"""Elements; what has fewer, such as the biases of relative positions, is not worth its rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A node that multiplies an activation with a constant matrix.

    Attributes:
        name: of the matrix, see ``Matrix``.
        node: ``MatMul`` or ``Gemm``.
        transposed: the graph holds the matrix as (N, K).
        bias: name of the constant that is added to the product; empty where there is none.
    """

    name: str
    node: NodeProto
    transposed: bool
    bias: str

    @property
    def weight(self) -> str:
        """Name of the constant."""
        return str(self.node.input[1])

    @property
    def stored(self) -> str:
        """The same, with a mark where it is read the other way round: such codes cannot be shared."""
        return self.weight + ("^T" if self.transposed else "")


def products(graph: onnx.GraphProto) -> list[Product]:
    """Every multiplication with a constant matrix, in the order of the graph.

    A matrix has the path of its module as name; of several in one module the later ones get a number.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    readers = _readers(graph)
    found: list[Product] = []
    seen: Counter[str] = Counter()
    for node in graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        plain = not attributes.get("transA") and attributes.get("alpha", 1.0) == 1.0
        if node.op_type not in ("MatMul", "Gemm") or not plain or ranks.get(node.input[1]) != 2:
            continue
        path = module_path(node) or node.input[1]
        seen[path] += 1
        found.append(
            Product(
                name=path if seen[path] == 1 else f"{path}.{seen[path]}",
                node=node,
                transposed=bool(attributes.get("transB")),
                bias=_bias(node, readers, ranks, attributes),
            )
        )
    return found


def find_matrices(path: Path) -> tuple[Matrix, ...]:
    """The weight matrices of an fp32 graph.

    Raises:
        ExportError: there is none.
    """
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    matrices, found = [], products(graph)
    uses = Counter(product.stored for product in found)
    for product in found:
        weight = np.asarray(numpy_helper.to_array(constants[product.weight]), np.float32)
        matrices.append(
            Matrix(
                name=product.name,
                node=product.node.name,
                tap=product.node.input[0],
                weight=weight.T if product.transposed else weight,
                biased=bool(product.bias),
                constant=product.stored if uses[product.stored] > 1 else "",
            )
        )
    if not matrices:
        raise ExportError(
            f"{path.name} multiplies with no constant matrix",
            expected="linear layers",
            fix="leave quantize out of the recipe",
        )
    return tuple(matrices)


def lookups(graph: onnx.GraphProto) -> list[tuple[str, NodeProto]]:
    """The name of every large constant table that one ``Gather`` and nothing else reads, and this node.

    A table has the path of its module as name, with a number where that is the name of a matrix already.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    readers = _readers(graph)
    seen = Counter(product.name for product in products(graph))
    found = []
    for node in graph.node:
        axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
        dims = sizes.get(node.input[0], ()) if node.op_type == "Gather" else ()
        if len(dims) == 2 and axis == 0 and dims[0] * dims[1] >= _SMALLEST_TABLE and len(readers[node.input[0]]) == 1:
            path = module_path(node) or node.input[0]
            seen[path] += 1
            found.append((path if seen[path] == 1 else f"{path}.{seen[path]}", node))
    return found


def find_tables(path: Path) -> tuple[Matrix, ...]:
    """The embedding tables of an fp32 graph, each as (width, rows)."""
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return tuple(
        Matrix(
            name=name,
            node=node.name,
            tap=node.input[1],
            weight=np.asarray(numpy_helper.to_array(constants[node.input[0]]), np.float32).T,
            biased=False,
        )
        for name, node in lookups(graph)
    )


def find_taps(path: Path, names: Collection[str]) -> tuple[Tap, ...]:
    """These activation tensors with the dims that the graph says they have."""
    graph = onnx.load(str(path), load_external_data=False).graph
    known = {value.name: value for value in [*graph.input, *graph.value_info, *graph.output]}
    taps = []
    for name in dict.fromkeys(names):
        dims = known[name].type.tensor_type.shape.dim if name in known else ()
        taps.append(Tap(name=name, dims=tuple(dim.dim_param or dim.dim_value for dim in dims)))
    return tuple(taps)


class TapRunner:
    """Runs a graph on ONNX Runtime and returns activation tensors from inside of it.

    Args:
        path: an fp32 graph.
        names: of the tensors.
    """

    def __init__(self, path: Path, names: Collection[str]) -> None:
        model = onnx.load(str(path))
        self._names = list(dict.fromkeys(names))
        outputs = {value.name for value in model.graph.output} | {value.name for value in model.graph.input}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names if name not in outputs)
        given = {value.name for value in model.graph.input}
        self._given = [name for name in self._names if name in given]
        self._wanted = [name for name in self._names if name not in given]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self._session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(DISABLED_OPTIMIZERS),
        )
        self._inputs = ports(self._session.get_inputs())

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors for one batch."""
        complete = first_call(batch, {name: port.dims for name, port in self._inputs.items()})
        feed = {name: store(complete[name], port.dtype) for name, port in self._inputs.items() if name in complete}
        found = dict(zip(self._wanted, self._session.run(self._wanted, feed), strict=True)) if self._wanted else {}
        return {**found, **{name: np.asarray(batch[name]) for name in self._given}}


def _readers(graph: onnx.GraphProto) -> Mapping[str, list[NodeProto]]:
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _bias(
    node: NodeProto, readers: Mapping[str, list[NodeProto]], ranks: Mapping[str, int], attributes: Mapping[str, Any]
) -> str:
    """The constant vector that is added to the product and to nothing else."""
    if node.op_type == "Gemm":
        own = node.input[2] if len(node.input) > 2 and attributes.get("beta", 1.0) == 1.0 else ""
        return _vector(own, readers, ranks)
    following = readers.get(node.output[0], [])
    if len(following) != 1 or following[0].op_type != "Add":
        return ""
    other = next((name for name in following[0].input if name != node.output[0]), "")
    return _vector(other, readers, ranks)


def _vector(name: str, readers: Mapping[str, list[NodeProto]], ranks: Mapping[str, int]) -> str:
    return name if ranks.get(name) == 1 and len(readers[name]) == 1 else ""
