"""What an engine builder made of a graph, read from its own layer listing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_TACTIC = re.compile(r"TacticName: ([^,]*)")
_LAYER = re.compile(r"^Name: ([^,]*), LayerType: (\w+)")
_TENSOR = re.compile(r"\{ Name: [^,]*, Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_FUSED_GEMM = re.compile(r"Fc(?![a-z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingSummary:
    """What the builder made of the graph.

    Attributes:
        layers: kernels and calls in the engine.
        fused_attention: fused attention kernels.
        gemms: operand types -> matrix multiplications, ``Half`` or ``Half*Int4`` where the weight differs.
        attention_kernels: the names of the fused attention kernels.
    """

    layers: int
    fused_attention: int
    gemms: Mapping[str, int]
    attention_kernels: tuple[str, ...]


def read_listing(text: str) -> ListingSummary:
    """Count the kernels in a builder's layer listing (one line per layer, detailed verbosity)."""
    gemms: Counter[str] = Counter()
    attention: list[str] = []
    layers = [line for line in text.splitlines() if line.startswith("Name: ")]
    for line in layers:
        layer, tactic = _LAYER.match(line), _TACTIC.search(line)
        if layer is None:
            continue
        if tactic is not None and "mha" in tactic[1]:
            attention.append(tactic[1])
        elif layer[2] == "gemm" or (layer[2] == "runtime_fusion" and _FUSED_GEMM.search(layer[1])):
            gemms[_operands(line)] += 1
    return ListingSummary(
        layers=len(layers),
        fused_attention=len(attention),
        gemms=dict(sorted(gemms.items())),
        attention_kernels=tuple(attention),
    )


def _operands(line: str) -> str:
    inputs, _, rest = line.partition("Constants: [")
    constants = rest.partition("Outputs: [")[0]
    data = [dtype for _, dtype in _TENSOR.findall(inputs)]
    weights = [dtype for dims, dtype in _TENSOR.findall(constants) if dims.count(",") >= 1]
    types = dict.fromkeys([*data[:1], *weights[:1]])
    return "*".join(types) or "unknown"
