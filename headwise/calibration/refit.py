"""Closed-form refit of an output projection: the recovery that needs no training.

After heads were removed or merged, the best output projection for what is left is a ridge regression of the untouched
layer's output on the head outputs that the edited layer has. Layers are solved in the order in which they run, and the
target includes what earlier layers got wrong, so that errors do not add up.

Shape letters: D model width, N query heads, H head_dim; F = N * H features, plus one constant where there is a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from headwise.calibration.stats import did_not_run
from headwise.calibration.tasks import Examples
from headwise.errors import DataError
from headwise.model.forward import run, to_torch
from headwise.model.view import AttentionView, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFit:
    """The solution for one layer.

    Attributes:
        layer: index of the layer.
        weight: (D, N, H).
        bias: (D,), or None where the layer has none.
        before: squared error on the calibration tokens relative to the target's energy, with the old weights.
        after: the same with the new ones; never larger.
    """

    layer: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    before: float
    after: float


class _Stop(Exception):
    """Ends a forward pass behind the layer that is being solved."""


def fit_output(
    student: ModelView,
    teacher: ModelView,
    layer: int,
    examples: Examples,
    *,
    ridge: float = 1.0,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> OutputFit:
    """Solve ``argmin ||O W - Y||^2 + lam ||W - W_0||^2`` for one layer, in float64 over valid tokens.

    ``O`` are the student's head outputs with a constant column, ``W_0`` its present weights, ``lam`` is ``ridge`` times
    the mean diagonal of ``O^T O``; the constant is not penalised. ``Y`` is the teacher's layer output plus the
    difference between the two residual streams, where the layer's output is added to them as it is.

    Args:
        student: the edited model; layers before ``layer`` are final.
        teacher: the untouched model.
        layer: which layer to solve.
        examples: calibration samples; at least as many tokens as features are needed.
        ridge: strength of the pull towards the present weights; weak values overfit the calibration text.
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Raises:
        DataError: fewer calibration tokens than features.
    """
    old = student.attention[layer].read()
    weight = old.output.flatten(1).T.double()
    if old.output_bias is not None:
        weight = torch.cat([weight, old.output_bias.double()[None]])
    features, width = weight.shape
    gram = torch.zeros(features, features, dtype=torch.float64)
    cross = torch.zeros(features, width, dtype=torch.float64)
    energy, tokens = 0.0, 0
    for batch in examples.batches(batch_size):
        family = student.attention[layer].family
        valid = None if family.patches else batch.valid(decoder=family.decoder)
        for heads, target in _runs(student, teacher, layer, to_torch(batch.inputs)):
            keep = None if valid is None or valid.shape != tuple(target.shape[:2]) else torch.as_tensor(valid)
            o = _tokens(heads.flatten(2), keep)
            if old.output_bias is not None:
                o = torch.cat([o, o.new_ones(len(o), 1)], dim=1)
            y = _tokens(target, keep)
            gram += o.T @ o
            cross += o.T @ y
            energy += float(y.square().sum())
            tokens += len(o)
        if progress is not None:
            progress(len(batch.samples))
    if tokens < features:
        raise DataError(
            f"{tokens} calibration tokens for {features} features of layer {layer}",
            expected=f"at least {features}, better ten times as many",
            fix="raise calibration.samples, or set refit: false",
        )
    solved = _solve(gram, cross, weight, ridge, constant=old.output_bias is not None)
    new_weight = solved[: old.output.shape[1] * old.output.shape[2]].T.unflatten(1, old.output.shape[1:])
    return OutputFit(
        layer=layer,
        weight=new_weight.to(old.output.dtype),
        bias=None if old.output_bias is None else solved[-1].to(old.output.dtype),
        before=_error(gram, cross, energy, weight),
        after=_error(gram, cross, energy, solved),
    )


def _solve(
    gram: torch.Tensor, cross: torch.Tensor, weight: torch.Tensor, ridge: float, *, constant: bool
) -> torch.Tensor:
    penalty = torch.full((len(gram),), 1.0, dtype=torch.float64)
    if constant:
        penalty[-1] = 0.0
    # Scaled by the features alone: the constant column says nothing about the size of head outputs.
    penalty *= ridge * gram.diagonal()[penalty > 0].mean()
    left = gram + torch.diag(penalty)
    right = cross + penalty[:, None] * weight
    solution: torch.Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution


def _error(gram: torch.Tensor, cross: torch.Tensor, energy: float, weight: torch.Tensor) -> float:
    """||O W - Y||^2 / ||Y||^2 from the accumulated products."""
    squared = (weight * (gram @ weight)).sum() - 2 * (weight * cross).sum() + energy
    return max(float(squared), 0.0) / max(energy, 1e-300)


def _runs(
    student: ModelView, teacher: ModelView, layer: int, inputs: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The student's head outputs and what the output projection shall make of them, once per run of the layer."""
    ours, theirs = student.attention[layer], teacher.attention[layer]
    if ours.runs > 1:
        yield from _taught(ours, teacher, theirs, inputs)
        return
    heads, _, residual = _observe(student, ours, inputs)
    _, target, original = _observe(teacher, theirs, inputs)
    if ours.residual and ours.direct and residual.shape == target.shape:
        target = target + original - residual
    yield heads, target


def _taught(
    ours: AttentionView, teacher: ModelView, theirs: AttentionView, inputs: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same for a layer that runs several times, on the inputs that it has in the teacher.

    In the student, later runs read what earlier ones wrote with the very projection that is being solved for. On the
    teacher's inputs nothing depends on it, so that the solution is exact for all runs together.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []
    with torch.inference_mode():
        with theirs.watch_calls(lambda args, kwargs: calls.append((args, kwargs))), theirs.watch_output(outputs.append):
            run(teacher.module, inputs)
        with ours.watch_heads(heads.append):
            for args, kwargs in calls:
                ours.module(*args, **kwargs)
    yield from zip(heads, outputs, strict=True)


def _observe(
    model: ModelView, layer: AttentionView, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head outputs, layer output and residual stream of one layer; nothing behind it is computed."""
    seen: dict[str, torch.Tensor] = {}

    def output(tensor: torch.Tensor) -> None:
        seen["output"] = tensor
        raise _Stop

    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(layer.watch_residual(lambda tensor: seen.__setitem__("residual", tensor)))
        stack.enter_context(layer.watch_heads(lambda tensor: seen.__setitem__("heads", tensor)))
        stack.enter_context(layer.watch_output(output))
        try:
            run(model.module, inputs)
        except _Stop:
            return seen["heads"], seen["output"], seen["residual"]
    raise did_not_run(layer)


def _tokens(tensor: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """(B, T, ...) -> (valid tokens, ...) in float64."""
    return (tensor.flatten(0, 1) if keep is None else tensor[keep]).double()
