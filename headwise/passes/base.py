"""What a pass is, and the one way to run it: requires, statistics, plan, check, surgery, ensures, recovery, record."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch

from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.tasks import Examples, Task
from headwise.errors import PlanError, SurgeryError
from headwise.model import surgery
from headwise.model.edits import EditPlan
from headwise.model.forward import of_decoder, real_tokens, run, to_torch
from headwise.model.layout import Layout
from headwise.model.shared_kv import SharedKV
from headwise.model.surgery import Payloads
from headwise.model.view import ModelView
from headwise.passes.recovery import Progress, Recovery, fold, refit, removed_means
from headwise.spec import Spec
from headwise.tolerances import TWIN


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
    progress: Progress | None = None,
) -> tuple[EditPlan, HeadStats]:
    """Collect what the pass needs and let it decide. Changes nothing."""
    _refuse(pass_, view)
    recovery = pass_.recovery()
    needs = pass_.needs() | (recovery.means() if recovery is not None else set())
    report = None if progress is None else partial(progress, "statistics")
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "sequence": sequence, "progress": report}
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
    sequence: int | None = None,
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
        progress: see ``Progress``.

    Raises:
        PlanError: the plan cannot be made; the model is unchanged.
        SurgeryError: the edit is not exact; the model must not be used.
    """
    start = time.perf_counter()
    before = view.layout
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    plan, stats = make_plan(pass_, view, task, examples, seed=seed, sequence=sequence, **shared)
    batch = examples.example_batch()
    inputs = to_torch(batch)
    payloads = pass_.payloads(view, stats, plan)
    with surgery.twin(view, plan, payloads), torch.inference_mode():
        twin = run(view.module, inputs)
    means = removed_means(view, plan, stats)
    bystanders = _versions(view)
    surgery.apply(view, plan, payloads)
    twin_error = _require_exact(view, twin, batch)
    fits: list[Mapping[str, Any]] = []
    recovery = pass_.recovery()
    if recovery is not None and plan.edits:
        if recovery.fold_mean:
            fold(view, means)
        if recovery.refit:
            missed = {plan.edits[i].layer: p.missed for i, p in payloads.items() if isinstance(p, SharedKV)}
            fits = refit(view, teacher, plan, recovery, examples, missed=missed, **shared)
    if _versions(view) != bystanders:
        raise SurgeryError(
            "a weight outside the attention layers and MLPs changed",
            expected="only their projections to change",
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
    """Identity and write count of every parameter outside attention and MLPs: any change to one shows."""
    inside = [layer.path for layer in view.attention] + [path for mlp in view.mlp for path in mlp.paths]
    paths = tuple(f"{path}." for path in inside)
    return {
        name: (id(parameter), parameter._version)
        for name, parameter in view.module.named_parameters()
        if not name.startswith(paths)
    }
