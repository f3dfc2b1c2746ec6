"""Why a smaller graph is not faster: from a profile of both graphs on ONNX Runtime, and from their sizes."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

from headwise.device.arrays import store
from headwise.device.session import ports

_CALLS = 5
_WIDTH = 8
"""Matrices with other widths leave a rest that vector and tensor units do not fill."""
_SOME = 0.05
"""Parts of the time below this are no reason for anything."""
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention", "Einsum", "QLinear", "DynamicQuantizeMatMul")
_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is known of a graph without running it.

    Attributes:
        macs, attention_macs: see ``GraphCost``.
        odd: widths of its constant matrices that are no multiple of 8.
        half: whether weights are in fp16 or bf16.
    """

    macs: int
    attention_macs: int
    odd: tuple[int, ...]
    half: bool

    @classmethod
    def of(cls, path: Path, cost: Mapping[str, Any]) -> Sizes:
        """Read a graph whose cost was counted."""
        graph = onnx.load(str(path), load_external_data=False).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
        used = [
            tensors[name]
            for node in graph.node
            if node.op_type in ("MatMul", "Gemm")
            for name in node.input[1:2]
            if name in tensors
        ]
        odd = {int(dim) for tensor in used for dim in tensor.dims if dim % _WIDTH}
        return cls(
            macs=int(cost["macs"]),
            attention_macs=int(cost["attention_macs"]),
            odd=tuple(sorted(odd)),
            half=any(tensor.data_type in _HALVES for tensor in tensors.values()),
        )


def operator_times(path: Path, feed: Mapping[str, NDArray[Any]]) -> Counter[str]:
    """Operator of ONNX Runtime's optimised graph -> milliseconds of one call, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        arrays = {name: store(feed[name], port.dtype) for name, port in ports(session.get_inputs()).items()}
        for _ in range(_CALLS):
            session.run(None, arrays)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: Counter[str] = Counter()
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    # The first call also plans memory.
    for event in kernels[len(kernels) // _CALLS :]:
        found[event["args"]["op_name"]] += event["dur"]
    return Counter({name: dur / 1e3 / (_CALLS - 1) for name, dur in found.items()})


def why_not_faster(before: Sizes, after: Sizes, then: Mapping[str, float], now: Mapping[str, float]) -> str:
    """The likely reasons, as a clause behind "likely because".

    Args:
        before: the untouched model's graph.
        after: the smaller one.
        then: ``operator_times`` of the untouched model's graph.
        now: of the smaller one.
    """
    reasons = []
    products, earlier, total = _products(now), _products(then), sum(then.values())
    gone = 1 - after.macs / before.macs if before.macs else 0.0
    casts = now.get("Cast", 0.0) / max(sum(now.values()), 1e-9)
    if after.half:
        spent = f", and spends {casts:.0%} of the time on casts" if casts >= _SOME else ""
        reasons.append(f"fp16 and bf16 are for GPUs: ONNX Runtime computes most of it in fp32 on a CPU{spent}")
    if gone < 0.02:
        reasons.append("the multiply-accumulates stayed: tables or bytes became smaller, not the work")
    elif gone * earlier / total < _SOME:
        reasons.append(_small_share(before, gone, then))
    elif products / earlier > after.macs / before.macs + 0.1:
        reasons.append(_slow_products(before, after, products / earlier))
    quantizing = sum(time for name, time in now.items() if name.startswith(("DynamicQuantizeLinear", "Dequantize")))
    if quantizing > _SOME * sum(now.values()):
        reasons.append(f"quantizing activations takes {quantizing / sum(now.values()):.0%} of the time")
    return "; ".join(reasons) or "what it saves is less than times vary by on this machine"


def _small_share(before: Sizes, gone: float, then: Mapping[str, float]) -> str:
    total = sum(then.values())
    others = [(name, time) for name, time in Counter(then).most_common() if not name.startswith(_PRODUCTS)][:3]
    listed = ", ".join(f"{name} {time / total:.0%}" for name, time in others)
    return (
        f"only {gone:.0%} of the multiply-accumulates went (attention has {before.attention_macs / before.macs:.0%} of "
        f"them), and products are {_products(then) / total:.0%} of the time at this size ({listed} stayed)"
    )


def _slow_products(before: Sizes, after: Sizes, time: float) -> str:
    slow = f"its products take {time:.0%} of their former time for {after.macs / before.macs:.0%} of the work"
    new = [width for width in after.odd if width not in before.odd]
    if new:
        named = ", ".join(map(str, new[:4])) + (" and more" if len(new) > 4 else "")
        return f"{slow}, with widths that are no multiple of {_WIDTH} ({named}): round_to keeps to sizes kernels like"
    return f"{slow}: at this size starting a kernel costs as much as its work, a larger batch gains more"


def _products(times: Mapping[str, float]) -> float:
    fused = {name: time for name, time in times.items() if name.startswith(("Fused", *_PRODUCTS)) or "MatMul" in name}
    return max(sum(fused.values()), 1e-9)
