"""Targets: names, runtimes, and what is refused before a build."""

from __future__ import annotations

import pytest

from headwise.errors import TargetError
from headwise.export.targets import Target, check_target, resolve_target


@pytest.mark.parametrize(
    ("name", "sm", "runtime"),
    [
        ("sm86", 86, "tensorrt-rtx"),
        ("rtx-3060", 86, "tensorrt-rtx"),
        ("RTX 3060", 86, "tensorrt-rtx"),
        ("t4", 75, "tensorrt-rtx"),
        ("l4", 89, "tensorrt-rtx"),
        ("rtx_5090", 120, "tensorrt-rtx"),
        ("jetson-orin", 87, "tensorrt"),
        ("h100", 90, "tensorrt"),
        ("tensorrt/a100", 80, "tensorrt"),
        ("tensorrt-rtx/a100", 80, "tensorrt-rtx"),
    ],
)
def test_resolve(name: str, sm: int, runtime: str) -> None:
    assert resolve_target(name) == Target(name=name, sm=sm, runtime=runtime)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(TargetError, match=r'unknown target "rtx-306"\n(.*\n)*.*did you mean "rtx-3060"'):
        resolve_target("rtx-306")
    with pytest.raises(TargetError, match=r'unknown runtime "tensort" in target(.*\n)*.*did you mean "tensorrt"'):
        resolve_target("tensort/t4")


@pytest.mark.parametrize(("precision", "reason"), [("bf16", "no bf16 arithmetic"), ("fp32", "no fp32 matrix mult")])
def test_turing_refusals(precision: str, reason: str) -> None:
    with pytest.raises(TargetError, match=rf"t4 \(sm75\) cannot run {precision}: .*{reason}") as caught:
        check_target(resolve_target("t4"), precision)
    assert caught.value.exit_code == 2
    check_target(resolve_target("sm80"), precision)
    check_target(resolve_target("t4"), "fp16")


def test_a_capability_that_tensorrt_rtx_does_not_have() -> None:
    with pytest.raises(TargetError, match=r"h100 \(sm90\) is not one of TensorRT-RTX's(.*\n)*.*tensorrt/sm90"):
        check_target(resolve_target("tensorrt-rtx/h100"), "fp16")
    check_target(resolve_target("h100"), "fp16")


def test_the_cpu_is_a_target_without_an_engine() -> None:
    target = resolve_target("CPU")
    assert (target.sm, target.runtime) == (0, "onnxruntime")
    check_target(target, "bf16", {"int8"})
    for scheme in ("int8-weights", "int4-weights", "fp8"):
        with pytest.raises(TargetError, match=f"target cpu gains nothing from {scheme}"):
            check_target(target, "fp16", {"int8", scheme})
    with pytest.raises(TargetError, match='unknown target "tensorrt/cpu"'):
        resolve_target("tensorrt/cpu")


# what the builder of TensorRT-RTX 1.7 accepted, scheme by scheme, on the first capability and on the one before it
FIRST = {"int8": 75, "int8-weights": 75, "fp8": 89, "fp8-weights": 89, "int4-weights": 80, "nvfp4-weights": 120}


@pytest.mark.parametrize("scheme", FIRST)
def test_every_format_begins_with_a_capability(scheme: str) -> None:
    capabilities = [75, 80, 86, 89, 120, 121]
    for sm in capabilities:
        target = resolve_target(f"sm{sm}")
        if sm >= FIRST[scheme]:
            check_target(target, "fp16", {scheme})
        else:
            with pytest.raises(TargetError, match=rf"target sm{sm} \(sm{sm}\) cannot run {scheme}: ") as caught:
                check_target(target, "fp16", {"int8", scheme})
            assert "int8, int8-weights" in caught.value.expected
