"""The graph of single tokens beside the one that reads prompts: scaled as that is, and checked to have its matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from headwise.errors import ExportError
from headwise.export.absorbed import find_absorbed, smooth_absorbed
from headwise.export.matrices import products
from headwise.export.smoothing import smooth
from headwise.model.quantization import Matrix


def absorbed_names(graph: onnx.GraphProto) -> list[str]:
    """The matrices of the graph that reads prompts which this one has absorbed."""
    return [found.name for found in find_absorbed(graph)]


def smooth_single(
    model: onnx.ModelProto,
    matrices: Sequence[Matrix],
    scales: Mapping[str, Sequence[int]],
    names: Collection[str],
) -> None:
    """Scale channels as in the graph that reads prompts, in place.

    Args:
        model: the fp32 graph of single tokens.
        matrices: of the graph that reads prompts.
        scales: see ``smooth``, by the tensors of that graph.
        names: matrices that read the scaled tensor.
    """
    wanted = {m.name: tuple(scales[m.tap]) for m in matrices if m.name in names and m.tap in scales}
    found = [product for product in products(model.graph) if product.name in wanted]
    smooth(model, {product.node.input[0]: wanted[product.name] for product in found}, list(wanted))
    smooth_absorbed(model.graph, wanted)


def require_like(single: onnx.ModelProto, prompts: onnx.ModelProto) -> None:
    """Check that both graphs multiply with the same numbers: codes and scales of one are then those of the other.

    Raises:
        ExportError: a matrix of the graph of single tokens is another one.
    """
    known = _weights(prompts.graph)
    for name, weight in _weights(single.graph).items():
        if name not in known or not np.array_equal(weight, known[name]):
            raise ExportError(
                f"the graph of single tokens has another matrix {name} than the one that reads prompts",
                expected="the same numbers in both",
                fix="this is a bug in headwise; please report it with the model type and the recipe, or set "
                "export.decode: same",
            )


def _weights(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """Name -> (K, N) of every matrix; up-projections as the graph that reads prompts has them."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for product in products(graph):
        value = numpy_helper.to_array(constants[product.weight])
        found[product.name] = value.T if product.transposed else value
    for entry in find_absorbed(graph):
        value = numpy_helper.to_array(constants[entry.weight])
        found[entry.name] = value.reshape(-1, value.shape[-1]).T
    return found
