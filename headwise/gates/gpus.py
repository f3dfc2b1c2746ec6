"""What GPUs can reach at best, as their maker publishes it; docs/speed.md names the sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headwise.errors import TargetError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Published peaks of one GPU, dense, at its boost clock; nothing reaches them.

    Attributes:
        bandwidth: of its memory, in GB/s.
        tflops: number format of the operands -> 10^12 operations per second, two per multiply-accumulate. ``fp32`` is
            TF32 where tensor cores have it, because TensorRT may take it.
    """

    bandwidth: float
    tflops: Mapping[str, float]

    def peak(self, number: str) -> float:
        """Operations per second for operands in a format; a format without units of its own runs as fp16."""
        return 1e12 * self.tflops.get(number, self.tflops["fp16"])


GPUS: Mapping[str, Gpu] = {
    "rtx-3060": Gpu(bandwidth=360, tflops={"fp32": 12.7, "fp16": 51, "int8": 102}),
    "rtx-4090": Gpu(bandwidth=1008, tflops={"fp32": 82.6, "fp16": 330, "int8": 661, "fp8": 661}),
    "rtx-5090": Gpu(bandwidth=1792, tflops={"fp32": 105, "fp16": 419, "int8": 838, "fp8": 838, "fp4": 1676}),
    "l4": Gpu(bandwidth=300, tflops={"fp32": 60, "fp16": 121, "int8": 242, "fp8": 242}),
    "a10": Gpu(bandwidth=600, tflops={"fp32": 62.5, "fp16": 125, "int8": 250}),
    "a100": Gpu(bandwidth=2039, tflops={"fp32": 156, "fp16": 312, "int8": 624}),
    "h100": Gpu(bandwidth=3350, tflops={"fp32": 494, "fp16": 989, "int8": 1979, "fp8": 1979}),
    "h200": Gpu(bandwidth=4800, tflops={"fp32": 494, "fp16": 989, "int8": 1979, "fp8": 1979}),
    "jetson-orin-nano": Gpu(bandwidth=68, tflops={"fp32": 5.1, "fp16": 10.2, "int8": 20.5}),
    "jetson-orin-nx": Gpu(bandwidth=102, tflops={"fp32": 7.5, "fp16": 15, "int8": 30}),
    "jetson-agx-orin": Gpu(bandwidth=205, tflops={"fp32": 21, "fp16": 42.5, "int8": 85}),
}


def find_gpu(name: str) -> Gpu:
    """The peaks of a GPU by its name.

    Raises:
        TargetError: the table does not have it.
    """
    if name not in GPUS:
        raise TargetError(
            f'the peaks of "{name}" are not known here',
            expected="one of: " + ", ".join(GPUS),
            fix=did_you_mean(name, GPUS),
        )
    return GPUS[name]
