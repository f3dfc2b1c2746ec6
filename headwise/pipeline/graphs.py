"""The ONNX graphs that travel between the stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headwise.export.precision import Precision
from headwise.export.quantize import Promise

GRAPH = "model.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An ONNX graph of the pipeline.

    Attributes:
        path: the file.
        digest: digest of its artifact.
        precision: of its weights and activations, where they are not quantized.
        dense: the untouched model's fp32 graph, which latencies are compared with.
        scopes: module paths of the attention layers, whose costs are counted apart.
        promises: what an engine must run in another format.
    """

    path: Path
    digest: str
    precision: Precision
    dense: Path
    scopes: tuple[str, ...]
    promises: tuple[Promise, ...] = ()
