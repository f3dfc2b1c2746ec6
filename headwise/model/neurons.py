"""Which neurons an MLP has, and the edit that removes some. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from headwise.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpLayout:
    """The neurons of one MLP, by their ids in the original checkpoint.

    Attributes:
        neurons: original ids of the neurons that are left, in storage order.
        width: neurons that the original checkpoint had.
    """

    neurons: tuple[int, ...]
    width: int

    def without(self, neurons: Sequence[int]) -> MlpLayout:
        """The layout after removing these neurons."""
        gone = set(neurons)
        return replace(self, neurons=tuple(neuron for neuron in self.neurons if neuron not in gone))

    def to_json(self) -> dict[str, Any]:
        return {"width": self.width, "neurons": ranges(self.neurons)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MlpLayout:
        return cls(neurons=from_ranges(data["neurons"]), width=int(data["width"]))


def ranges(ids: Sequence[int]) -> str:
    """``(0, 1, 2, 5, 7, 8)`` as ``"0-2 5 7-8"``: an MLP has thousands of neurons, of which most are neighbours."""
    runs: list[list[int]] = []
    for identity in ids:
        if runs and identity == runs[-1][1] + 1:
            runs[-1][1] = identity
        else:
            runs.append([identity, identity])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str) -> tuple[int, ...]:
    """What ``ranges`` wrote."""
    ends = [(first, last or first) for first, _, last in (run.partition("-") for run in text.split())]
    return tuple(identity for first, last in ends for identity in range(int(first), int(last) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DropNeurons:
    """Remove neurons of one MLP.

    Attributes:
        layer: index of the MLP.
        neurons: original ids of the neurons to remove.
    """

    type: ClassVar[str] = "drop-neurons"
    layer: int
    neurons: tuple[int, ...]

    def check(self, layout: MlpLayout) -> None:
        """Raise PlanError unless the edit leaves an MLP that can run."""
        unknown = sorted(set(self.neurons) - set(layout.neurons))
        if unknown:
            raise PlanError(
                f"MLP {self.layer} has no neuron {unknown[0]}",
                expected=f"one of {ranges(layout.neurons)}",
                fix="plan on the layout that the model has now; neurons keep their original ids",
            )
        if len(set(self.neurons)) == len(layout.neurons):
            raise PlanError(
                f"MLP {self.layer} would keep 0 of {len(layout.neurons)} neurons",
                expected="at least 1 neuron in every MLP",
                fix="lower the ratio, or set scope: layer so that every layer gives the same share",
            )

    def apply(self, layout: MlpLayout) -> MlpLayout:
        return layout.without(self.neurons)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "neurons": ranges(self.neurons)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DropNeurons:
        return cls(layer=int(data["layer"]), neurons=from_ranges(data["neurons"]))
