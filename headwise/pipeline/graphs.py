"""The models and the ONNX graphs that travel between the stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from headwise.export.decoder import DECODE
from headwise.export.precision import Precision
from headwise.export.quantize import Promise
from headwise.model.checkpoint import Checkpoint, load_checkpoint

GRAPH, DECODED, MODEL = "model.onnx", "decoded.onnx", "model"
"""Names in the folder of a stage: of graphs, and of the folder of a checkpoint."""


@dataclass(frozen=True)
class StoredModel:
    """A model that a stage left on disk; read when somebody needs it.

    Attributes:
        digest: digest of the artifact.
        folder: its checkpoint directory; None for the untouched model.
        untouched: the model that the user named.
    """

    digest: str
    folder: Path | None
    untouched: Checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model. Callers that edit it take a copy."""
        return self.untouched if self.folder is None else load_checkpoint(self.folder)


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

    @property
    def decode(self) -> Path | None:
        """The graph for calls of one token per row, where the stage that made this one made one."""
        path = self.path.with_name(DECODE)
        return path if path.exists() else None
