"""Olive's INT8 passes with their defaults, and its dynamic one for matrix products alone.

They get the graph and the calibration samples that quantization.py left behind.

Runs in an environment of its own with olive-ai; benchmarks/README.md has the commands.

    python benchmarks/quantization_olive.py GRAPH.onnx CALIBRATION.npz OUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from olive.data.component.dataset import BaseDataset
from olive.data.config import DataComponentConfig, DataConfig
from olive.data.registry import Registry
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.quantization import OnnxDynamicQuantization, OnnxStaticQuantization


class Samples(BaseDataset):  # type: ignore[misc]
    """One batch of arrays after the other; Olive wants labels beside them, which nobody reads."""

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        return {name: array[0] for name, array in self.data[index].items()}, 0


@Registry.register_dataset()
def stored_samples(path: str, **unused: Any) -> Samples:
    """Single rows, not padded: Olive puts the batch axis back."""
    rows: dict[int, dict[str, Any]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            index, name = key.split(".", 1)
            batch = stored[key]
            for row in range(len(batch)):
                rows.setdefault(2 * int(index) + row, {})[name] = batch[row : row + 1]
    return Samples([rows[index] for index in sorted(rows)])


def main(graph: str, calibration: str, out: str) -> None:
    data = DataConfig(
        name="calibration",
        load_dataset_config=DataComponentConfig(type="stored_samples", params={"path": calibration}),
        pre_process_data_config=DataComponentConfig(type="skip_pre_process"),
        post_process_data_config=DataComponentConfig(type="skip_post_process"),
        dataloader_config=DataComponentConfig(params={"batch_size": 1}),
    )
    passes: dict[str, tuple[Any, dict[str, Any]]] = {
        "dynamic": (OnnxDynamicQuantization, {}),
        "dynamic-matmul": (OnnxDynamicQuantization, {"op_types_to_quantize": ["MatMul", "Gemm"]}),
        "static": (OnnxStaticQuantization, {"data_config": data}),
    }
    for name, (kind, options) in passes.items():
        made = create_pass_from_dict(kind, options, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
        result = made.run(ONNXModelHandler(graph), str(Path(out) / name))
        print(name, result.model_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
