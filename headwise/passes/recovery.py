"""Closed-form repair after surgery: means of what was removed into biases, and projections refitted in run order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from headwise.calibration.reconstruct import reconstruct
from headwise.calibration.refit import OutputFit, fit_output
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
        epochs: how often attention layers see the calibration samples in a reconstruction by gradient descent.
        parts: the kinds of layers that are refitted.
    """

    fold_mean: bool
    refit: bool
    ridge: float
    rounds: int = 0
    epochs: int = 0
    parts: frozenset[Part] = frozenset({"attention"})

    @classmethod
    def of_attention(cls, *, refit: bool, mlp: bool, ridge: float, epochs: int = 0) -> Recovery:
        """Refits of edited attention layers and all behind them, and of the MLPs behind them too if ``mlp``."""
        parts = EVERY if mlp else frozenset[Part]({"attention"})
        return cls(fold_mean=False, refit=refit, ridge=ridge, epochs=epochs, parts=parts)

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
    repair = _Repair(view, teacher, recovery, examples, missed, batch_size, progress or _silent)
    chosen = [layer for layer in layers if _part(layer) in recovery.parts]
    return [repair.mlp(layer) if isinstance(layer, MlpView) else repair.attention(layer) for layer in chosen]


@dataclass(frozen=True, slots=True)
class _Repair:
    """Fits layers and writes what was found; each method gives what ``PassRecord.refit`` holds of a layer."""

    view: ModelView
    teacher: ModelView
    recovery: Recovery
    examples: Examples
    missed: Mapping[int, ValueHeads]
    batch_size: int
    progress: Progress

    def mlp(self, layer: MlpView) -> Mapping[str, Any]:
        fit = self._output(layer)
        return {"part": "mlp", "layer": layer.index, "before": fit.before, "after": fit.after}

    def attention(self, layer: AttentionView) -> Mapping[str, Any]:
        # A layer that runs several times reads in its later runs what it wrote: only its output is solved for.
        once, recovery = layer.runs == 1, self.recovery
        # One that borrows its keys and values cannot run alone.
        alone = once and layer.layout.owner is None
        solved = once and recovery.rounds and layer.index in self.missed
        fit = self._values(layer) if solved else self._output(layer)
        entry: dict[str, Any] = {"part": "attention", "layer": layer.index, "before": fit.before, "after": fit.after}
        if alone and recovery.epochs:
            entry["reconstruction"] = self._reconstruct(layer)
            # Small steps leave the output projection short of its best.
            entry["after"] = self._output(layer).after
        return entry

    def _output(self, layer: AttentionView | MlpView) -> OutputFit:
        mlp = isinstance(layer, MlpView)
        fit = fit_output(self.view, self.teacher, layer.index, self.examples, mlp=mlp, **self._options(layer))
        surgery.set_output(layer, fit.weight, fit.bias)
        return fit

    def _values(self, layer: AttentionView) -> OutputFit:
        missed, rounds = self.missed[layer.index], self.recovery.rounds
        options = {"rounds": rounds, **self._options(layer)}
        both = fit_values(self.view, self.teacher, layer.index, missed, self.examples, **options)
        surgery.set_values(layer, both.values)
        surgery.set_output(layer, both.output.weight, both.output.bias)
        return both.output

    def _options(self, layer: AttentionView | MlpView) -> dict[str, Any]:
        report = partial(self.progress, f"refit of {_part(layer)} {layer.index}")
        return {"ridge": self.recovery.ridge, "batch_size": self.batch_size, "progress": report}

    def _reconstruct(self, layer: AttentionView) -> dict[str, Any]:
        epochs = self.recovery.epochs

        def report(epoch: int, samples: int) -> None:
            self.progress(f"reconstruction of attention {layer.index}, epoch {epoch} of {epochs}", samples)

        found = reconstruct(self.view, self.teacher, layer.index, self.examples, epochs=epochs, progress=report)
        surgery.set_projections(layer, found.weights)
        return {"before": found.before, "after": found.after, "epoch": found.epoch}


def _part(layer: AttentionView | MlpView) -> Part:
    return "mlp" if isinstance(layer, MlpView) else "attention"


def _silent(what: str, samples: int) -> None:
    del what, samples


def _layer(view: ModelView, edit: Edit) -> AttentionView | MlpView:
    return view.mlp[edit.layer] if isinstance(edit, DropNeurons) else view.attention[edit.layer]
