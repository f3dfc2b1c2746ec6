"""Deployment targets by name, and what each of them cannot do, so that a recipe is refused before any work is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from headwise.device.runtimes import FULL, ORT, RTX, RUNTIMES
from headwise.errors import TargetError, did_you_mean

CPU = "cpu"
"""The target that needs no engine."""

# compute capability -> the devices that have it, as people call them (NVIDIA's list of CUDA GPUs)
_DEVICES: Mapping[int, tuple[str, ...]] = {
    75: ("t4", "gtx-1650", "gtx-1660", "rtx-2060", "rtx-2070", "rtx-2080", "rtx-2080-ti", "quadro-rtx-6000"),
    80: ("a100", "a30"),
    86: (
        *("a2", "a10", "a10g", "a16", "a40", "rtx-a2000", "rtx-a4000", "rtx-a5000", "rtx-a6000"),
        *("rtx-3050", "rtx-3060", "rtx-3070", "rtx-3080", "rtx-3090"),
    ),
    87: ("jetson-orin", "jetson-agx-orin", "jetson-orin-nx", "jetson-orin-nano"),
    89: ("l4", "l40", "l40s", "rtx-4050", "rtx-4060", "rtx-4070", "rtx-4080", "rtx-4090", "rtx-6000-ada"),
    90: ("h100", "h200", "gh200"),
    120: ("rtx-5050", "rtx-5060", "rtx-5070", "rtx-5080", "rtx-5090", "rtx-pro-6000"),
    121: ("gb10", "dgx-spark"),
}
# what TensorRT-RTX builds ahead of time, without the device; the rest is built on the device with full TensorRT
_AHEAD_OF_TIME = frozenset({75, 80, 86, 89, 120, 121})
_REFUSED: Mapping[tuple[int, str], str] = {
    (75, "bf16"): "Turing has no bf16 arithmetic",
    (75, "fp32"): "TensorRT has no fp32 matrix multiplication for Turing",
}
# scheme -> the first compute capability that builds it, and why no earlier one does
_FIRST: Mapping[str, tuple[int, str]] = {
    "int8": (75, ""),
    "int8-weights": (75, ""),
    "fp8": (89, "fp8 begins with Ada"),
    "fp8-weights": (89, "fp8 begins with Ada"),
    "int4-weights": (80, "int4 weights begin with Ampere"),
    "nvfp4": (120, "fp4 begins with Blackwell"),
    "nvfp4-weights": (120, "fp4 begins with Blackwell"),
    "mxfp8-weights": (89, "fp8 begins with Ada"),
    "int8-kv": (75, ""),
    "int8-table": (75, ""),
    "int4-table": (80, "int4 weights begin with Ampere"),
    "fp8-kv": (89, "fp8 begins with Ada"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to build for.

    Attributes:
        name: as the recipe says it.
        sm: compute capability without the dot; 0 for the CPU.
        runtime: ``tensorrt-rtx`` (built anywhere), ``tensorrt`` (built on a device of this capability), or
            ``onnxruntime`` for the CPU.
    """

    name: str
    sm: int
    runtime: str


def resolve_target(name: str) -> Target:
    """``cpu``, ``sm86``, a device such as ``rtx-3060``, or one of these two with a runtime: ``tensorrt/a100``.

    Raises:
        TargetError: no such target, with the nearest name.
    """
    runtime, _, device = name.strip().lower().replace(" ", "-").replace("_", "-").rpartition("/")
    devices = {alias: sm for sm, aliases in _DEVICES.items() for alias in (f"sm{sm}", *aliases)}
    if device == CPU and not runtime:
        return Target(name=name, sm=0, runtime=ORT)
    if device not in devices:
        raise TargetError(
            f'unknown target "{name}"',
            expected="cpu, a compute capability such as sm86, or a device such as rtx-3060",
            fix=did_you_mean(device, [CPU, *devices]),
        )
    if runtime and runtime not in RUNTIMES:
        raise TargetError(
            f'unknown runtime "{runtime}" in target "{name}"',
            expected="tensorrt-rtx or tensorrt before the slash",
            fix=did_you_mean(runtime, RUNTIMES),
        )
    sm = devices[device]
    return Target(name=name, sm=sm, runtime=runtime or (RTX if sm in _AHEAD_OF_TIME else FULL))


def check_target(target: Target, precision: str, schemes: Collection[str] = ()) -> None:
    """Refuse what the target cannot do.

    Args:
        target: the device.
        precision: of everything that is not quantized.
        schemes: of the quantized matrices, see ``model.quantization.scheme``.

    Raises:
        TargetError: the precision, a scheme or the runtime does not exist there, with the reason.
    """
    if target.runtime == ORT:
        _check_cpu(schemes)
        return
    if target.runtime == RTX and target.sm not in _AHEAD_OF_TIME:
        raise TargetError(
            f"target {target.name} (sm{target.sm}) is not one of TensorRT-RTX's",
            expected="one of " + ", ".join(f"sm{sm}" for sm in sorted(_AHEAD_OF_TIME)),
            fix=f"use target tensorrt/sm{target.sm} and build on the device",
        )
    reason = _REFUSED.get((target.sm, precision))
    if reason:
        raise TargetError(
            f"target {target.name} (sm{target.sm}) cannot run {precision}: {reason}",
            expected="a precision that the target has: fp16",
            fix="set export.precision to fp16, or leave this target out",
        )
    for scheme in sorted(schemes):
        first, why = _FIRST[scheme]
        if target.sm < first:
            raise TargetError(
                f"target {target.name} (sm{target.sm}) cannot run {scheme}: {why}",
                expected="one of: " + ", ".join(name for name, (sm, _) in _FIRST.items() if sm <= target.sm),
                fix="change quantize.format and quantize.matrices, or leave this target out",
            )


def _check_cpu(schemes: Collection[str]) -> None:
    """ONNX Runtime multiplies faster than in fp32 only where weights and activations are both in int8."""
    for scheme in sorted(set(schemes) - {"int8", "int8-kv", "int8-table"}):
        raise TargetError(
            f"target {CPU} gains nothing from {scheme}",
            expected="int8 weights and activations",
            fix="give the CPU a recipe of its own with quantize.format int8, or leave this target out",
        )
