"""Closed-form repair after surgery: means of what was removed into biases, and projections refitted in run order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from headwise.calibration.refit import fit_output
from headwise.calibration.stats import HeadStats, Stat
from headwise.calibration.tasks import Examples
from headwise.calibration.value_refit import fit_values
from headwise.model import surgery
from headwise.model.edits import DropHeads, DropNeurons, Edit, EditPlan
from headwise.model.latent_edits import ShareLayers
from headwise.model.mlp import MlpView
from headwise.model.shared_kv import ValueHeads
from headwise.model.view import AttentionView, ModelView

Part = Literal["attention", "mlp"]
EVERY: frozenset[Part] = frozenset({"attention", "mlp"})
Progress = Callable[[str, int], None]
"""Called with what is being done and how many calibration samples of it just finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Closed-form repair after surgery.

    Attributes:
        fold_mean: add the mean output of removed heads and neurons to the bias behind them, where there is one.
        refit: refit projections from the first edited layer on.
        ridge: see ``calibration.refit``.
        rounds: how often shared value heads are solved, in turn with the output projection.
        parts: the kinds of layers that are refitted.
    """

    fold_mean: bool
    refit: bool
    ridge: float
    rounds: int = 0
    parts: frozenset[Part] = frozenset({"attention"})

    @classmethod
    def of_attention(cls, *, refit: bool, mlp: bool, ridge: float) -> Recovery:
        """Refits of edited attention layers and all behind them, and of the MLPs behind them too if ``mlp``."""
        parts = EVERY if mlp else frozenset[Part]({"attention"})
        return cls(fold_mean=False, refit=refit, ridge=ridge, parts=parts)

    def means(self) -> frozenset[Stat]:
        """The statistics that folding means takes."""
        names: Mapping[Part, Stat] = {"attention": Stat.HEAD_MEAN, "mlp": Stat.NEURON_MEAN}
        return frozenset(names[part] for part in self.parts if self.fold_mean)


def removed_means(view: ModelView, plan: EditPlan, stats: HeadStats) -> list[tuple[Edit, torch.Tensor]]:
    """Per edit, (D,) what its removed heads or neurons add to the residual stream on average; before surgery."""
    found: list[tuple[Edit, torch.Tensor]] = []
    for edit in plan.edits:
        if isinstance(edit, DropHeads) and Stat.HEAD_MEAN in stats.values:
            layer = view.attention[edit.layer]
            heads = [layer.layout.query.index(head) for head in edit.query]
            weight = layer.read().output[:, heads].double()
            mean = torch.einsum("dnh,nh->d", weight, stats[Stat.HEAD_MEAN][edit.layer][heads])
            found.append((edit, mean))
        elif isinstance(edit, DropNeurons) and Stat.NEURON_MEAN in stats.values:
            gone = set(edit.neurons)
            mlp = view.mlp[edit.layer]
            places = [place for place, neuron in enumerate(mlp.layout.neurons) if neuron in gone]
            found.append((edit, mlp.linear()[0][:, places].double() @ stats[Stat.NEURON_MEAN][edit.layer][places]))
    return found


def fold(view: ModelView, means: list[tuple[Edit, torch.Tensor]]) -> None:
    """Add the means to the biases of layers that have one."""
    for edit, mean in means:
        layer = _layer(view, edit)
        weight, bias = layer.linear()
        if bias is not None:
            surgery.set_output(layer, weight, (bias.double() + mean).to(bias.dtype))


def from_first_edit(view: ModelView, plan: EditPlan) -> tuple[AttentionView | MlpView, ...]:
    """The first layer that a plan edits and all behind it, in run order."""
    order = view.sublayers
    edited = [_layer(view, edit) for edit in plan.edits]
    # An owner may get other weights before it lends them.
    edited += [view.attention[edit.owner] for edit in plan.edits if isinstance(edit, ShareLayers)]
    return order[min(map(order.index, edited)) :]


def refit(
    view: ModelView,
    teacher: ModelView,
    layers: Sequence[AttentionView | MlpView],
    recovery: Recovery,
    examples: Examples,
    *,
    missed: Mapping[int, ValueHeads],
    batch_size: int,
    progress: Progress | None,
) -> list[Mapping[str, Any]]:
    """Refit those of the layers, given in run order, that are of the parts to repair."""
    fits: list[Mapping[str, Any]] = []
    for layer in layers:
        part: Part = "mlp" if isinstance(layer, MlpView) else "attention"
        if part not in recovery.parts:
            continue
        report = None if progress is None else partial(progress, f"refit of {part} {layer.index}")
        options: dict[str, Any] = {"ridge": recovery.ridge, "batch_size": batch_size, "progress": report}
        # A layer that runs several times reads in its later runs what it wrote: only its output is solved for.
        if isinstance(layer, AttentionView) and recovery.rounds and layer.index in missed and layer.runs == 1:
            lost = missed[layer.index]
            both = fit_values(view, teacher, layer.index, lost, examples, rounds=recovery.rounds, **options)
            surgery.set_values(layer, both.values)
            fit = both.output
        else:
            fit = fit_output(view, teacher, layer.index, examples, mlp=part == "mlp", **options)
        surgery.set_output(layer, fit.weight, fit.bias)
        fits.append({"part": part, "layer": layer.index, "before": fit.before, "after": fit.after})
    return fits


def _layer(view: ModelView, edit: Edit) -> AttentionView | MlpView:
    return view.mlp[edit.layer] if isinstance(edit, DropNeurons) else view.attention[edit.layer]
