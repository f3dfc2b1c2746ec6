"""What a pass is, and the one way to run it: requires, statistics, plan, check, surgery, ensures, recovery, record."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from headwise.calibration.refit import fit_output
from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.tasks import Examples, Task
from headwise.calibration.value_refit import fit_values
from headwise.errors import PlanError, SurgeryError
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan, ShareLayers
from headwise.model.forward import of_decoder, real_tokens, run, to_torch
from headwise.model.layout import Layout
from headwise.model.surgery import Payloads, SharedKV
from headwise.model.view import ModelView
from headwise.spec import Spec
from headwise.tolerances import TWIN

Progress = Callable[[str, int], None]
"""Called with what is being done and how many calibration samples of it just finished."""


class Pass(Spec):
    """A compression idea. Its fields are the options that a recipe can set.

    A subclass says what it needs and makes a plan; it never touches a tensor of the model and never runs it.
    """

    name: ClassVar[str]
    """As written in a recipe."""
    summary: ClassVar[str]
    """One line for ``headwise passes``."""
    paper: ClassVar[str] = ""
    """arXiv id of the method."""

    @abstractmethod
    def needs(self) -> frozenset[Stat]:
        """The statistics that ``plan`` reads."""

    def pairs(self, view: ModelView) -> Mapping[int, int]:
        """Layer -> the earlier layer that it is compared with, where ``needs`` asks for ``CROSS_MOMENT``.

        Raises:
            PlanError: the options cannot be met on this model.
        """
        del view
        return {}

    @abstractmethod
    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        """Decide. The same view, options and statistics give the same plan; nothing is changed.

        Raises:
            PlanError: the options cannot be met on this model.
        """

    def payloads(self, view: ModelView, stats: HeadStats, plan: EditPlan) -> Payloads:
        """The numbers that edits of the plan need, from weights and statistics alone."""
        del view, stats, plan
        return {}

    def recovery(self) -> Recovery | None:
        """What to repair in closed form after the edits."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Closed-form repair after surgery.

    Attributes:
        fold_mean: add the mean output of removed heads to the output bias, where the layer has one.
        refit: refit output projections from the first edited layer on.
        ridge: see ``calibration.refit``.
        rounds: how often shared value heads are solved, in turn with the output projection.
    """

    fold_mean: bool
    refit: bool
    ridge: float
    rounds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """What a pass did, for the report.

    Attributes:
        twin_error: largest difference between the edited model and its exact twin, relative to the largest output.
        refit: per refitted layer, the relative squared error on the calibration tokens before and after.
    """

    name: str
    options: Mapping[str, Any]
    plan: EditPlan
    before: Layout
    after: Layout
    stats_digest: str
    twin_error: float
    refit: tuple[Mapping[str, float], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "options": dict(self.options),
            "plan": self.plan.to_json(),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "stats_digest": self.stats_digest,
            "twin_error": self.twin_error,
            "refit": [dict(fit) for fit in self.refit],
            "seconds": self.seconds,
        }


def make_plan(
    pass_: Pass,
    view: ModelView,
    task: Task,
    examples: Examples,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[EditPlan, HeadStats]:
    """Collect what the pass needs and let it decide. Changes nothing."""
    _refuse(pass_, view)
    recovery = pass_.recovery()
    needs = pass_.needs() | ({Stat.HEAD_MEAN} if recovery is not None and recovery.fold_mean else set())
    report = None if progress is None else partial(progress, "statistics")
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": report}
    stats = collect(view, task, examples, needs, pairs=pass_.pairs(view), **options)
    plan = pass_.plan(view, stats)
    plan.check(view.layout)
    return plan, stats


def _refuse(pass_: Pass, view: ModelView) -> None:
    """Raise PlanError, before anything is measured, where a pass cannot be right on a layer's class."""
    for layer in view.attention:
        if pass_.name in layer.family.refuses:
            raise PlanError(
                f"{pass_.name} cannot be applied to layer {layer.index} ({layer.family.name})",
                expected=f"another pass, because {layer.family.refuses[pass_.name]}",
                fix="leave the pass out; `headwise inspect` lists what a model cannot have done to it",
            )


def run_pass(
    pass_: Pass,
    view: ModelView,
    teacher: ModelView,
    task: Task,
    examples: Examples,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> PassRecord:
    """Apply a pass to ``view`` in place.

    Args:
        pass_: the pass with its options.
        view: the model to edit.
        teacher: the untouched model, for the refit.
        task: how to feed the model and read it.
        examples: calibration samples.
        seed: seed of every random draw.
        batch_size: calibration samples per batch.
        progress: see ``Progress``.

    Raises:
        PlanError: the plan cannot be made; the model is unchanged.
        SurgeryError: the edit is not exact; the model must not be used.
    """
    start = time.perf_counter()
    before = view.layout
    plan, stats = make_plan(pass_, view, task, examples, seed=seed, batch_size=batch_size, progress=progress)
    batch = examples.example_batch()
    inputs = to_torch(batch)
    payloads = pass_.payloads(view, stats, plan)
    with surgery.twin(view, plan, payloads), torch.inference_mode():
        twin = run(view.module, inputs)
    folded = _mean_of_removed(view, plan, stats) if Stat.HEAD_MEAN in stats.values else {}
    bystanders = _versions(view)
    surgery.apply(view, plan, payloads)
    twin_error = _require_exact(view, twin, batch)
    fits: list[Mapping[str, float]] = []
    recovery = pass_.recovery()
    if recovery is not None and plan.edits:
        if recovery.fold_mean:
            _fold(view, folded)
        if recovery.refit:
            missed = {plan.edits[i].layer: p.missed for i, p in payloads.items() if isinstance(p, SharedKV)}
            options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
            fits = _refit(view, teacher, plan, recovery, examples, missed=missed, **options)
    if _versions(view) != bystanders:
        raise SurgeryError(
            "a weight outside the attention layers changed",
            expected="only attention projections to change",
            fix="this is a bug in headwise; please report it with the recipe",
        )
    return PassRecord(
        name=pass_.name,
        options=pass_.model_dump(mode="json"),
        plan=plan,
        before=before,
        after=view.layout,
        stats_digest=stats.digest,
        twin_error=twin_error,
        refit=tuple(fits),
        seconds=time.perf_counter() - start,
    )


def _require_exact(view: ModelView, twin: dict[str, torch.Tensor], batch: Mapping[str, np.ndarray]) -> float:
    """The largest relative difference; tokens of padding, which may see no token at all, are left out."""
    with torch.inference_mode():
        outputs = run(view.module, to_torch(batch))
    errors: list[torch.Tensor] = []
    for name, every in twin.items():
        valid = real_tokens(batch, decoder=of_decoder(name))
        per_token = valid is not None and every.dim() > 2 and tuple(every.shape[:2]) == valid.shape
        keep = torch.as_tensor(valid) if per_token else slice(None)
        expected, actual = every[keep], outputs[name][keep]
        errors.append((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    # Not Python's maximum, which passes over what is not a number.
    worst = float(torch.stack(errors).max())
    if not worst <= TWIN:
        raise SurgeryError(
            f"the edited model differs from its exact twin by {worst:.2g} of the largest output",
            expected=f"at most {TWIN:g}",
            fix="this is a bug in headwise; please report it with the model type and the recipe",
        )
    return worst


def _versions(view: ModelView) -> dict[str, tuple[int, int]]:
    """Identity and write count of every parameter outside attention: any change to one shows."""
    paths = tuple(f"{layer.path}." for layer in view.attention)
    return {
        name: (id(parameter), parameter._version)
        for name, parameter in view.module.named_parameters()
        if not name.startswith(paths)
    }


def _mean_of_removed(view: ModelView, plan: EditPlan, stats: HeadStats) -> dict[int, torch.Tensor]:
    """Layer -> (D,) what its removed heads add to the residual stream on average."""
    folded: dict[int, torch.Tensor] = {}
    for edit in plan.edits:
        if not isinstance(edit, DropHeads):
            continue
        layer = view.attention[edit.layer]
        heads = [layer.layout.query.index(head) for head in edit.query]
        weight = layer.read().output[:, heads].double()
        mean = stats[Stat.HEAD_MEAN][edit.layer][heads]
        folded[edit.layer] = torch.einsum("dnh,nh->d", weight, mean)
    return folded


def _fold(view: ModelView, folded: Mapping[int, torch.Tensor]) -> None:
    for index, delta in folded.items():
        layer = view.attention[index]
        weights = layer.read()
        if weights.output_bias is not None:
            surgery.set_output(layer, weights.output, (weights.output_bias.double() + delta).to(delta.dtype))


def _refit(
    view: ModelView,
    teacher: ModelView,
    plan: EditPlan,
    recovery: Recovery,
    examples: Examples,
    *,
    missed: Mapping[int, surgery.ValueHeads],
    batch_size: int,
    progress: Progress | None,
) -> list[Mapping[str, float]]:
    # An owner may get other weights before it lends them.
    first = min(edit.owner if isinstance(edit, ShareLayers) else edit.layer for edit in plan.edits)
    fits: list[Mapping[str, float]] = []
    for layer in view.attention[first:]:
        report = None if progress is None else partial(progress, f"refit of layer {layer.index}")
        options: dict[str, Any] = {"ridge": recovery.ridge, "batch_size": batch_size, "progress": report}
        # A layer that runs several times reads in its later runs what it wrote: only its output is solved for.
        if recovery.rounds and layer.index in missed and layer.runs == 1:
            both = fit_values(
                view, teacher, layer.index, missed[layer.index], examples, rounds=recovery.rounds, **options
            )
            surgery.set_values(layer, both.values)
            fit = both.output
        else:
            fit = fit_output(view, teacher, layer.index, examples, **options)
        surgery.set_output(layer, fit.weight, fit.bias)
        fits.append({"layer": layer.index, "before": fit.before, "after": fit.after})
    return fits
