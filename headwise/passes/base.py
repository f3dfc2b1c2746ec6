"""What a pass is, and the one way to run it: requires, statistics, plan, check, surgery, ensures, recovery, record."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch

from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.streaming import Span
from headwise.calibration.tasks import Examples, Task
from headwise.calibration.timing import LatencyTable
from headwise.errors import PlanError
from headwise.model import surgery
from headwise.model.edits import Edit, EditPlan
from headwise.model.forward import run, to_torch
from headwise.model.layout import Layout
from headwise.model.shared_kv import SharedKV, ValueHeads
from headwise.model.surgery import Payloads
from headwise.model.view import ModelView
from headwise.passes.checks import refuse_changed, require_exact, versions_outside
from headwise.passes.recovery import Progress, Recovery, fold, from_first_edit, refit, removed_means
from headwise.spec import Spec


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

    def requires(self, view: ModelView) -> None:
        """What has to hold of every layer before anything is measured.

        Raises:
            PlanError: the pass cannot be applied to this model.
        """
        del view

    @abstractmethod
    def needs(self) -> frozenset[Stat]:
        """The statistics that ``plan`` reads."""

    @property
    def timed(self) -> bool:
        """Whether ``plan`` also reads ``stats.latency``."""
        return False

    def pairs(self, view: ModelView) -> Mapping[int, int]:
        """Layer -> the earlier layer that it is compared with, where ``needs`` asks for ``CROSS_MOMENT``.

        Raises:
            PlanError: the options cannot be met on this model.
        """
        del view
        return {}

    def span(self, view: ModelView) -> Span | None:
        """What heads see that stream, where ``needs`` asks for a statistic of that.

        Raises:
            PlanError: no head of the model can stream.
        """
        del view
        return None

    def for_layers(self, count: int) -> Self:
        """The same pass for the first attention layers of the model: options with an entry per layer are cut."""
        lists = {name: value for name, value in self if isinstance(value, tuple) and len(value) > count}
        return self.model_copy(update={name: value[:count] for name, value in lists.items()})

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

    def by_layer(self, view: ModelView) -> tuple[Pass | None, ...]:
        """For every attention layer the pass that does the same to a model of this layer alone; None where it is left
        as it is.

        Args:
            view: the untouched model; its layout is read, its weights need not be there.

        Raises:
            PlanError: what is done to a layer depends on the others.
        """
        del view
        raise PlanError(
            f"{self.name} decides over all layers together",
            expected="a pass that treats every layer by itself, because only one is in memory: share-kv or latent-kv",
            fix="run `headwise compress` on a machine with room for the whole model, or leave the pass out",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """What a pass did, for the report.

    Attributes:
        twin_error: largest difference between the edited model and its exact twin, relative to the largest output.
        refit: per refitted layer, its part (attention or mlp), and the relative squared error on the calibration
            tokens before and after.
    """

    name: str
    options: Mapping[str, Any]
    plan: EditPlan
    before: Layout
    after: Layout
    stats_digest: str
    twin_error: float
    refit: tuple[Mapping[str, Any], ...]
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
    sequence: int | None = None,
    latency: LatencyTable | None = None,
    progress: Progress | None = None,
) -> tuple[EditPlan, HeadStats]:
    """Collect what the pass needs and let it decide. Changes nothing."""
    _refuse(pass_, view)
    recovery = pass_.recovery()
    needs = pass_.needs() | (recovery.means() if recovery is not None else set())
    report = None if progress is None else partial(progress, "statistics")
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "sequence": sequence, "progress": report}
    collected = collect(view, task, examples, needs, pairs=pass_.pairs(view), span=pass_.span(view), **options)
    stats = replace(collected, latency=latency)
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
    pass_.requires(view)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """A plan that surgery has carried out, and what is needed to repair the model behind it.

    Attributes:
        before: the layout that it was made for.
        stats_digest, twin_error: see ``PassRecord``.
        means: what removed heads and neurons gave on average.
        missed: layer -> what its shared value heads miss.
    """

    plan: EditPlan
    before: Layout
    stats_digest: str
    twin_error: float
    means: list[tuple[Edit, torch.Tensor]]
    missed: Mapping[int, ValueHeads]


def edit(
    pass_: Pass,
    view: ModelView,
    task: Task,
    examples: Examples,
    *,
    seed: int = 0,
    batch_size: int = 32,
    sequence: int | None = None,
    latency: LatencyTable | None = None,
    progress: Progress | None = None,
) -> Edited:
    """The first half of ``run_pass``: plan, twin, surgery."""
    before = view.layout
    options: dict[str, Any] = {"batch_size": batch_size, "sequence": sequence, "progress": progress}
    plan, stats = make_plan(pass_, view, task, examples, seed=seed, latency=latency, **options)
    batch = examples.example_batch()
    payloads = pass_.payloads(view, stats, plan)
    with surgery.twin(view, plan, payloads), torch.inference_mode():
        twin = run(view.module, to_torch(batch))
    means = removed_means(view, plan, stats)
    surgery.apply(view, plan, payloads)
    return Edited(
        plan=plan,
        before=before,
        stats_digest=stats.digest,
        twin_error=require_exact(view, twin, batch),
        means=means,
        missed={plan.edits[i].layer: p.missed for i, p in payloads.items() if isinstance(p, SharedKV)},
    )


def repair(
    pass_: Pass,
    edited: Edited,
    view: ModelView,
    teacher: ModelView,
    examples: Examples,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Mapping[str, Any]]:
    """The second half of ``run_pass``: means and refits; gives what ``PassRecord.refit`` holds."""
    recovery = pass_.recovery()
    if recovery is None or not edited.plan.edits:
        return []
    if recovery.fold_mean:
        fold(view, edited.means)
    if not recovery.refit:
        return []
    options: dict[str, Any] = {"missed": edited.missed, "batch_size": batch_size, "progress": progress}
    return refit(view, teacher, from_first_edit(view, edited.plan), recovery, examples, **options)


def run_pass(
    pass_: Pass,
    view: ModelView,
    teacher: ModelView,
    task: Task,
    examples: Examples,
    *,
    seed: int = 0,
    batch_size: int = 32,
    sequence: int | None = None,
    latency: LatencyTable | None = None,
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
        sequence: tokens of the sample that multiply-accumulates are counted for; None: 128, or what the model can take.
        latency: of the model's layers, for a pass that is ``timed``.
        progress: see ``Progress``.

    Raises:
        PlanError: the plan cannot be made; the model is unchanged.
        SurgeryError: the edit is not exact; the model must not be used.
    """
    start = time.perf_counter()
    bystanders = versions_outside(view)
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    edited = edit(pass_, view, task, examples, seed=seed, sequence=sequence, latency=latency, **shared)
    fits = repair(pass_, edited, view, teacher, examples, **shared)
    refuse_changed(view, bystanders)
    return PassRecord(
        name=pass_.name,
        options=pass_.model_dump(mode="json"),
        plan=edited.plan,
        before=edited.before,
        after=view.layout,
        stats_digest=edited.stats_digest,
        twin_error=edited.twin_error,
        refit=tuple(fits),
        seconds=time.perf_counter() - start,
    )
