"""A model repository of Triton Inference Server for what a bundle holds.

The TensorRT backend of Triton loads engines of full TensorRT. Engines of TensorRT-RTX it cannot load; where a bundle
has no others, the graph is served by the ONNX Runtime backend.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwise.device.bundle import SINGLE
from headwise.device.runtimes import FULL, ORT
from headwise.errors import BundleError

_TYPES = {
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}


def write_repository(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Write ``triton/NAME/config.pbtxt`` and ``triton/NAME/1/model.plan`` or ``model.onnx``; the names.

    Args:
        folder: of the bundle.
        manifest: of a bundle whose models and evidence are there already.

    Raises:
        BundleError: an input or output has a type that Triton does not know.
    """
    artifacts: Sequence[Mapping[str, Any]] = manifest["artifacts"]
    plans = [artifact for artifact in artifacts if artifact["runtime"] == FULL]
    name = re.sub(r"[^\w.-]", "_", manifest["name"])
    graphs = {name + (SINGLE if a["single"] else ""): a for a in artifacts if a["runtime"] == ORT}
    served = {f"{name}-{plan['name']}": plan for plan in plans} or graphs
    batch = int(manifest["evidence"]["export"]["batch"]["max"])
    for model, artifact in served.items():
        version = folder / "triton" / model / "1"
        version.mkdir(parents=True)
        for file in artifact["files"]:
            # Weights beside a graph keep their name, which the graph knows.
            main = "model.plan" if artifact["runtime"] == FULL else "model.onnx"
            target = main if file == artifact["file"] else Path(file).name
            shutil.copyfile(folder / file, version / target)
        (version.parent / "config.pbtxt").write_text(config(model, artifact, batch), encoding="utf-8")
    return list(served)


def config(name: str, artifact: Mapping[str, Any], largest_batch: int) -> str:
    """The text of ``config.pbtxt``.

    Args:
        name: of the model.
        artifact: of the manifest.
        largest_batch: rows of a call; requests are put together up to that many, where every input and output begins
            with the batch.
    """
    is_plan = artifact["runtime"] == FULL
    ports = [*artifact["inputs"].values(), *artifact["outputs"].values()]
    batched = all(dims and isinstance(dims[0], str) for _, dims in ports)
    backend = "tensorrt" if is_plan else "onnxruntime"
    lines = [
        f"# {artifact['precision']} of {artifact['file']}",
        "# Engines of TensorRT-RTX cannot be loaded by Triton; an engine of full TensorRT can.",
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend)}",
        f"max_batch_size: {largest_batch if batched else 0}",
    ]
    for side in ("inputs", "outputs"):
        lines += [f"{side.removesuffix('s')} ["]
        lines += [",\n".join(_port(port, *found, batched=batched) for port, found in artifact[side].items())]
        lines += ["]"]
    if batched:
        # Triton puts requests of equal shapes together: for a decoder those with pasts of the same length.
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _port(name: str, dtype: str, dims: Sequence[int | str], *, batched: bool) -> str:
    sizes = ", ".join(str(dim) if isinstance(dim, int) else "-1" for dim in (dims[1:] if batched else dims))
    # A tensor of one number per row has no dims of its own, which Triton has no word for.
    shape = f"dims: [ {sizes} ]" if sizes else "dims: [ 1 ] reshape: { shape: [ ] }"
    return f"  {{ name: {json.dumps(name)} data_type: {_type(name, dtype)} {shape} }}"


def _type(name: str, dtype: str) -> str:
    if dtype in _TYPES:
        return _TYPES[dtype]
    raise BundleError(
        f"Triton Inference Server has no type for the {dtype} of {name}",
        expected=f"inputs and outputs of {', '.join(_TYPES)}",
        fix="leave out --triton, or quantize the cache with kv: int8",
    )
