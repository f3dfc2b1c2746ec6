"""Which form clustered layers take in the graph: both are made, one goes on, and the report says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from headwise.model.attend import Form

FORMS: tuple[Form, ...] = ("gathered", "fused")
_ENGINES = (
    "TensorRT has one kernel for it, but two matrix products with a softmax in memory for the other; "
    "export.clusters takes the other one to a device, where it can be measured"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormChoice:
    """The form that the stages behind the export work on.

    Attributes:
        form: the chosen one.
        why: the reason, in words.
        macs: multiply-accumulates of each form's graph.
        latency_ms: median of each on ONNX Runtime, from one interleaved run on one thread.
    """

    form: Form
    why: str
    macs: Mapping[Form, int]
    latency_ms: Mapping[Form, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_form(
    macs: Mapping[Form, int],
    latency_ms: Mapping[Form, float],
    *,
    wanted: Literal["auto"] | Form,
    engines: bool,
) -> FormChoice:
    """Take what the recipe asks for; else the fused form for engines, and the faster one for ONNX Runtime.

    Args:
        macs: per form, of its graph.
        latency_ms: per form, on ONNX Runtime on this machine.
        wanted: ``export.clusters`` of the recipe.
        engines: whether the recipe builds engines.
    """
    if wanted != "auto":
        chosen, why = wanted, "the recipe asks for it"
    elif engines:
        chosen, why = "fused", _ENGINES
    else:
        chosen, why = min(FORMS, key=lambda name: latency_ms[name]), "it is the faster one on ONNX Runtime here"
    return FormChoice(form=chosen, why=why, macs=macs, latency_ms=latency_ms)
