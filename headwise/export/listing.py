"""What an engine builder made of a graph, read from its own layer listing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

_TACTIC = re.compile(r"TacticName: ([^,]*)")
_LAYER = re.compile(r"^Name: ([^,]*), LayerType: (\w+)")
_TENSOR = re.compile(r"\{ Name: [^,]*, Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_FUSED_GEMM = re.compile(r"Fc(?![a-z])")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingSummary:
    """What the builder made of the graph.

    Attributes:
        layers: kernels and calls in the engine.
        fused_attention: fused attention kernels.
        gemms: operand types -> matrix multiplications, ``Half`` or ``Half*Int4`` where the weight differs.
        attention_kernels: the names of the fused attention kernels.
        products: node of the graph -> operand types of the matrix multiplication that it became, written as in
            ``gemms``.
        constants: node of the graph -> type of the largest constant of the kernel that it became part of.
    """

    layers: int
    fused_attention: int
    gemms: Mapping[str, int]
    attention_kernels: tuple[str, ...]
    products: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)


def read_listing(text: str) -> ListingSummary:
    """Count the kernels in a builder's layer listing (one line per layer, detailed verbosity)."""
    gemms: Counter[str] = Counter()
    attention: list[str] = []
    products: dict[str, str] = {}
    constants: dict[str, str] = {}
    layers = [line for line in text.splitlines() if line.startswith("Name: ")]
    for line in layers:
        layer, tactic = _LAYER.match(line), _TACTIC.search(line)
        if layer is None:
            continue
        origins = _ORIGIN.findall(line)
        constants |= dict.fromkeys(origins, _largest_constant(line))
        if tactic is not None and "mha" in tactic[1]:
            attention.append(tactic[1])
        elif layer[2] == "gemm" or (layer[2] == "runtime_fusion" and _FUSED_GEMM.search(layer[1])):
            operands = _operands(line)
            gemms[operands] += 1
            products |= dict.fromkeys(origins, operands)
    return ListingSummary(
        layers=len(layers),
        fused_attention=len(attention),
        gemms=dict(sorted(gemms.items())),
        attention_kernels=tuple(attention),
        products=products,
        constants={node: dtype for node, dtype in constants.items() if dtype},
    )


def _operands(line: str) -> str:
    inputs = line.partition("Constants: [")[0]
    data = [dtype for _, dtype in _TENSOR.findall(inputs)]
    types = dict.fromkeys(filter(None, [*data[:1], _largest_constant(line)]))
    return "*".join(types) or "unknown"


def _largest_constant(line: str) -> str:
    """Type of the weights of a kernel: a matrix, and not the scales beside it; empty where there is none."""
    section = line.partition("Constants: [")[2].partition("Outputs: [")[0]
    found = [([int(dim) for dim in dims.split(",")], dtype) for dims, dtype in _TENSOR.findall(section) if "," in dims]
    return max(found, key=lambda entry: prod(entry[0]))[1] if found else ""
