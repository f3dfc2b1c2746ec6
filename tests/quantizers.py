"""The quantize stage without the run around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from headwise.calibration.tasks import Examples
from headwise.export.precision import ExportSpec
from headwise.export.runners import OrtRunner
from headwise.model.view import ModelView
from headwise.passes.quantize import Quantize
from headwise.pipeline.graphs import Graph, judged
from headwise.pipeline.monitor import Silent
from headwise.pipeline.quantize.stage import Quantizer
from headwise.pipeline.store import Store


def quantized(
    graph: Path, view: ModelView, examples: Examples, folder: Path, *, precision: Any = "fp32", **options: Any
) -> dict[str, Any]:
    """Fill ``folder / "out"`` as the stage would; what its manifest would remember."""
    chosen = Quantize.model_validate(options)
    recipe = SimpleNamespace(quantize=chosen, batch_size=4, export=ExportSpec())
    facts = {"calibration": examples, "calibration_digest": "", "examples": examples}
    scopes = tuple(layer.path for layer in view.attention)
    source = Graph(path=graph, digest="", precision="fp32", dense=graph, scopes=scopes)
    workspace: Any = SimpleNamespace(recipe=recipe, **facts)
    (folder / "out").mkdir(parents=True)
    tool = Quantizer(workspace, Store(folder / "store", Silent(), resume=False), Silent(), source)
    return tool.for_tensorrt(chosen, precision, folder / "out")


def outputs(path: Path, examples: Examples) -> dict[str, Any]:
    """Of a graph, or of what ONNX Runtime runs in its place, on a batch of examples."""
    batch = examples.example_batch()
    with OrtRunner(judged(path), ignore=batch) as runner:
        return runner(batch)


def distance(left: dict[str, Any], right: dict[str, Any]) -> float:
    """The largest difference of an output, relative to its size."""
    return max(float(np.linalg.norm(left[n] - right[n]) / np.linalg.norm(right[n])) for n in right)
