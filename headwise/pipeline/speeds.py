"""The speed of a run's stages: which are judged, against what, and what a report says about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headwise.errors import RecipeError
from headwise.gates.judge import GateSpec, Verdict
from headwise.gates.speed import Speedup, judge_speed, speed_not_run, speed_words

UNTIMED = ("baseline", "pass")
"""Kinds of stages that make no graph, so that they have no speed."""
_FOR_TENSORRT = "this graph is for TensorRT: its speed on a CPU says nothing about that of its engine"
_ENGINE = (
    "the run has no engine of the untouched model to compare with; on the GPU, "
    "`headwise bench` times engines against each other"
)
_SMALLER = 0.99


def deployed(stages: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Which of the (name, kind) of all stages make what is deployed: engines, ``cpu`` among them, or the fp32 graph."""
    named = list(stages)
    engines = frozenset(name for name, kind in named if kind == "engine")
    return engines or frozenset(name for name, kind in named if kind == "onnx")


def refuse_untimed(gate: GateSpec, kinds: Mapping[str, str]) -> None:
    """Raise RecipeError for a limit on the speed of a stage that makes no graph.

    Args:
        gate: of the recipe.
        kinds: name -> kind of every stage.
    """
    for name, limits in gate.stages.items():
        if limits.min_speedup is not None and kinds.get(name, name) in UNTIMED:
            raise RecipeError(
                f"gate.stages.{name}.min_speedup: this stage makes no graph that could be timed",
                expected="onnx, or the stage of a target",
                fix="set it for gate.stages.onnx, whose graph holds the passes before it",
            )


def is_smaller(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether multiply-accumulates or bytes of a graph fell by more than one percent."""
    return any(after[name] < _SMALLER * before[name] for name in ("macs", "file_bytes"))


def in_words(
    latency: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], confidence: float
) -> dict[str, Any]:
    """What a report says about a measured latency: the speedup with its interval, and the plain sentence."""
    speed = Speedup.of(latency["times_ms"]["reference"], latency["times_ms"]["value"], confidence)
    words = speed_words(speed, smaller=is_smaller(before, after))
    why = latency["why"] if words.startswith("smaller") else ""
    return {"speedup": speed.to_json(), "verdict": f"{words}, likely because {why}" if why else words}


def judge_stage(stage: Mapping[str, Any], gate: GateSpec, named: frozenset[str]) -> list[Verdict]:
    """The verdict on a stage's speed; none where no limit concerns it.

    Args:
        stage: ``name``, ``kind`` and ``cost`` as in the report.
        gate: of the whole run.
        named: what is deployed, see ``deployed``.
    """
    name, kind = stage["name"], stage["kind"]
    minimum = gate.speed_limit(name, kind, is_deployed=name in named)
    if minimum is None:
        return []
    latency = (stage.get("cost") or {}).get("latency")
    if kind in ("precision", "quantize"):
        return [speed_not_run(minimum, name, _FOR_TENSORRT)]
    if latency is None:
        return [speed_not_run(minimum, name, _ENGINE if kind == "engine" else "this stage was not timed")]
    return [judge_speed(latency["times_ms"], gate.for_stage(name, kind), minimum, name)]
