"""Closed-form refit of an output or down projection: the recovery that needs no training.

After heads or neurons were removed or merged, the best projection of what is left is a ridge regression of the
untouched layer's output on the features that the edited layer has: its head outputs, or what its neurons give. Layers
are solved in the order in which they run, and the target includes what earlier layers got wrong, so that errors do not
add up.

Shape letters: B batch, T tokens, D model width; F features (query heads times head_dim, or neurons), plus one constant
where there is a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from headwise.calibration.faults import did_not_run
from headwise.calibration.tasks import Examples
from headwise.calibration.tokens import valid_mask, valid_tokens
from headwise.errors import DataError
from headwise.model.access import watched_input
from headwise.model.forward import run, to_torch
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFit:
    """The solution for one layer.

    Attributes:
        layer: index of the attention layer or MLP.
        weight: (D, F).
        bias: (D,), or None where the layer has none.
        before: squared error on the calibration tokens relative to the target's energy, with the old weights.
        after: the same with the new ones; never larger.
    """

    layer: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    before: float
    after: float


Inputs = Mapping[str, torch.Tensor]
_SINGULAR = 1e-6
"""Smallest over largest pivot at which a matrix counts as singular: its condition number is the square of that."""


class _Stop(Exception):
    """Ends a forward pass behind the layer that is being solved."""


def fit_output(
    student: ModelView,
    teacher: ModelView,
    layer: int,
    examples: Examples,
    *,
    mlp: bool = False,
    ridge: float = 1.0,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> OutputFit:
    """Solve ``argmin ||O W - Y||^2 + lam ||W - W_0||^2`` for one layer, in float64 over valid tokens.

    ``O`` are the student's features with a constant column, ``W_0`` its present weights, ``lam`` is ``ridge`` times
    the mean diagonal of ``O^T O``; the constant is not penalised. ``Y`` is the teacher's layer output plus the
    difference between the two residual streams, where the layer's output is added to them as it is.

    Args:
        student: the edited model; layers before ``layer`` are final.
        teacher: the untouched model.
        layer: which attention layer to solve, or which MLP.
        examples: calibration samples; at least as many tokens as features are needed.
        mlp: solve the down projection of an MLP.
        ridge: strength of the pull towards the present weights; weak values overfit the calibration text.
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Raises:
        DataError: fewer calibration tokens than features.
    """
    ours, theirs = (model.mlp[layer] if mlp else model.attention[layer] for model in (student, teacher))
    old, old_bias = ours.linear()
    weight = old.T.double()
    if old_bias is not None:
        weight = torch.cat([weight, old_bias.double()[None]])
    features, width = weight.shape
    sums = Products(features, width)
    for batch in examples.batches(batch_size):
        mask = valid_mask(batch, ours.family)
        for found, wanted in _runs(student, ours, teacher, theirs, to_torch(batch.inputs)):
            o = valid_tokens(found, mask).double()
            if old_bias is not None:
                o = torch.cat([o, o.new_ones(len(o), 1)], dim=1)
            sums.add(o, valid_tokens(wanted, mask).double())
        if progress is not None:
            progress(len(batch.samples))
    off = "set refit: false" + (" (refit_mlp where the pass has it)" if mlp else "")
    sums.require_tokens(f"{'MLP' if mlp else 'layer'} {layer}", off)
    solved = solve(sums.gram, sums.cross, weight, ridge, constant=old_bias is not None)
    return OutputFit(
        layer=layer,
        weight=solved[: old.shape[1]].T.to(old.dtype),
        bias=None if old_bias is None else solved[-1].to(old.dtype),
        before=sums.error(weight),
        after=sums.error(solved),
    )


class Products:
    """Sums over tokens from which a least squares problem is solved.

    Attributes:
        gram: (F, F) products of the features.
        cross: (F, D) products of the features with what they shall give.
        energy: squared size of what they shall give.
        tokens: how many were added.
    """

    def __init__(self, features: int, width: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.cross = torch.zeros(features, width, dtype=torch.float64)
        self.energy, self.tokens = 0.0, 0

    def add(self, features: torch.Tensor, target: torch.Tensor) -> None:
        """Add tokens: (tokens, F) and (tokens, D)."""
        self.gram += features.T @ features
        self.cross += features.T @ target
        self.energy += float(target.square().sum())
        self.tokens += len(features)

    def error(self, weight: torch.Tensor) -> float:
        """||O W - Y||^2 / ||Y||^2 for (F, D) weights."""
        squared = (weight * (self.gram @ weight)).sum() - 2 * (weight * self.cross).sum() + self.energy
        return max(float(squared), 0.0) / max(self.energy, 1e-300)

    def require_tokens(self, of: str, otherwise: str) -> None:
        """Raise DataError where there are fewer tokens than features."""
        features = len(self.gram)
        if self.tokens < features:
            raise DataError(
                f"{self.tokens} calibration tokens for {features} features of {of}",
                expected=f"at least {features}, better ten times as many",
                fix=f"raise calibration.samples, or {otherwise}",
            )


def solve(
    gram: torch.Tensor, cross: torch.Tensor, weight: torch.Tensor, ridge: float, *, constant: bool
) -> torch.Tensor:
    """The ridge solution of ``fit_output`` from products over tokens; the last feature may be a constant."""
    penalty = torch.full((len(gram),), 1.0, dtype=torch.float64)
    if constant:
        penalty[-1] = 0.0
    # Scaled by the features alone: the constant column says nothing about their size.
    penalty *= ridge * gram.diagonal()[penalty > 0].mean()
    left = gram + torch.diag(penalty)
    right = cross + penalty[:, None] * weight
    factor, failed = torch.linalg.cholesky_ex(left)
    pivots = factor.diagonal()
    if not int(failed) and float(pivots.min()) > _SINGULAR * float(pivots.max()):
        return torch.cholesky_solve(right, factor)
    solution: torch.Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution


def _runs(
    student: ModelView,
    ours: AttentionView | MlpView,
    teacher: ModelView,
    theirs: AttentionView | MlpView,
    inputs: Inputs,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The student's features and what the projection shall make of them, once per run of the layer."""
    if ours.runs > 1:
        yield from _taught(ours, teacher, theirs, inputs)
        return
    seen, wanted = observe(student, ours, inputs), observe(teacher, theirs, inputs)
    yield seen.features, target(ours, seen, wanted)


class Seen(NamedTuple):
    """Features, (B, T, F), and output of one layer, and the residual stream that it is added to, where known."""

    features: torch.Tensor
    output: torch.Tensor
    residual: torch.Tensor | None


def target(layer: AttentionView | MlpView, student: Seen, teacher: Seen) -> torch.Tensor:
    """The teacher's output, and the difference between both residual streams where the output is added as it is."""
    direct = isinstance(layer, MlpView) or layer.direct
    ours, theirs = student.residual, teacher.residual
    if not direct or ours is None or theirs is None or ours.shape != teacher.output.shape:
        return teacher.output
    return teacher.output + theirs - ours


def _taught(
    ours: AttentionView | MlpView, teacher: ModelView, theirs: AttentionView | MlpView, inputs: Inputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same for a layer that runs several times, on the inputs that it has in the teacher.

    In the student, later runs read what earlier ones wrote with the very projection that is being solved for. On the
    teacher's inputs nothing depends on it, so that the solution is exact for all runs together.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []
    features: list[torch.Tensor] = []
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(theirs.watch_output(outputs.append))
        if isinstance(theirs, AttentionView):
            stack.enter_context(theirs.watch_calls(lambda args, kwargs: calls.append((args, kwargs))))
        if isinstance(ours, MlpView) and isinstance(theirs, MlpView):
            # Neurons that stay give what they give in the teacher.
            places = [theirs.layout.neurons.index(neuron) for neuron in ours.layout.neurons]
            stack.enter_context(theirs.watch_neurons(lambda neurons: features.append(neurons[..., places])))
        run(teacher.module, inputs)
    if isinstance(ours, AttentionView):
        with torch.inference_mode(), watched_input(ours.output, features.append):
            for args, kwargs in calls:
                ours.module(*args, **kwargs)
    yield from zip(features, outputs, strict=True)


def observe(model: ModelView, layer: AttentionView | MlpView, inputs: Inputs) -> Seen:
    """One layer in a forward pass; nothing behind it is computed."""
    seen: dict[str, torch.Tensor] = {}

    def output(tensor: torch.Tensor) -> None:
        seen["output"] = tensor
        raise _Stop

    with ExitStack() as stack, torch.inference_mode():
        if layer.residual:
            stack.enter_context(layer.watch_residual(partial(seen.__setitem__, "residual")))
        stack.enter_context(watched_input(layer.output, partial(seen.__setitem__, "features")))
        stack.enter_context(layer.watch_output(output))
        try:
            run(model.module, inputs)
        except _Stop:
            return Seen(seen["features"], seen["output"], seen.get("residual"))
    raise did_not_run(layer)
