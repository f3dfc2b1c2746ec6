"""The models and the ONNX graphs that travel between the stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from headwise.export.decoder import DECODE
from headwise.export.opening import open_runner
from headwise.export.precision import Precision
from headwise.export.quantize import Promise
from headwise.export.runners import Runner
from headwise.model.checkpoint import Checkpoint, load_checkpoint

GRAPH, MODEL = "model.onnx", "model"
"""Names in the folder of a stage: of its graph, and of the folder of a checkpoint."""
DECODED = {GRAPH: "decoded.onnx", DECODE: "decoded-decode.onnx"}
"""Graph -> the same one in numbers that ONNX Runtime computes with; only where it lacks a format of the first."""


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
        single_promises: the same for the engine of single tokens.
    """

    path: Path
    digest: str
    precision: Precision
    dense: Path
    scopes: tuple[str, ...]
    promises: tuple[Promise, ...] = ()
    single_promises: tuple[Promise, ...] = ()

    @property
    def decode(self) -> Path | None:
        """The graph for calls of one token per row, where the stage that made this one made one."""
        path = self.path.with_name(DECODE)
        return path if path.exists() else None

    def runner(self) -> Runner:
        """Reads whole samples, with what ONNX Runtime can run of this graph and of that of single tokens."""
        return open_runner(judged(self.path), single=judged(self.path.with_name(DECODE)))


def judged(path: Path) -> Path:
    """What ONNX Runtime runs in the place of a graph: the decoded one beside it, or the graph itself."""
    decoded = path.with_name(DECODED.get(path.name, path.name))
    return decoded if decoded.exists() else path
