"""What it costs to put the mean of a head or neuron in its place: to first order by gradients, or measured.

That is what removal does once the mean has been folded into the bias behind it. A gate to zero would also count the
constant part, which is not lost.

Shape letters: B batch rows, S samples, F neurons of an MLP, N query heads of a layer, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from headwise.calibration.tasks import Batch, Examples, Task
from headwise.model.forward import run, to_torch
from headwise.model.view import ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Mean outputs over tokens: per attention layer (N, H), per MLP (F,)."""

    heads: Sequence[torch.Tensor]
    neurons: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Hutchinson projections of the signal: how many per sample, and their seed."""

    count: int
    seed: int


def gated(view: ModelView, gates: Sequence[torch.Tensor], means: Means) -> AbstractContextManager[object]:
    """Gate all heads and neurons; a closed gate puts the unit's mean in its place.

    Args:
        view: the model.
        gates: per attention layer (N,) or (B, N), then per MLP (F,) or (B, F).
        means: of all units.
    """
    stack = ExitStack()
    for layer, gate, mean in zip(view.attention, gates, means.heads, strict=False):
        stack.enter_context(layer.gate(gate, mean.to(gate.dtype)))
    for mlp, gate, mean in zip(view.mlp, gates[len(view.attention) :], means.neurons, strict=True):
        stack.enter_context(mlp.gate(gate, mean.to(gate.dtype)))
    return stack


def unit_gradients(
    view: ModelView,
    task: Task,
    examples: Examples,
    means: Means,
    draws: Draws | None,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Second moments of gradients with respect to gates, per sample.

    Args:
        view: the model.
        task: gives the loss, or the signal.
        examples: calibration samples.
        means: what a closed gate gives.
        draws: Gauss-Newton: E[J^T J] of the label-free signal; None takes the gradient of the task's loss, which needs
            labels (empirical Fisher).
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Returns:
        Per attention layer the matrix (N, N), then per MLP the diagonal (F,).
    """
    sizes = [len(layer.layout.query) for layer in view.attention] + [len(mlp.layout.neurons) for mlp in view.mlp]
    heads = len(view.attention)
    shapes = [(n, n) for n in sizes[:heads]] + [(n,) for n in sizes[heads:]]
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    generator = torch.Generator().manual_seed(draws.seed) if draws is not None else None
    for batch in examples.batches(batch_size):
        gates = [torch.ones(len(batch.samples) * batch.per_sample, n, requires_grad=True) for n in sizes]
        with gated(view, gates, means), torch.enable_grad():
            outputs = run(view.module, to_torch(batch.inputs))
            if draws is None:
                values = [task.loss(outputs, batch, examples).sum()]
            else:
                signal = task.signal(outputs, batch)
                values = [
                    (signal * torch.randn(signal.shape, generator=generator, dtype=signal.dtype)).sum()
                    for _ in range(draws.count)
                ]
            for value in values:
                _accumulate(sums, torch.autograd.grad(value, gates, retain_graph=True), batch, by_sample=draws is None)
        if progress is not None:
            progress(len(batch.samples))
    return tuple(total / (len(examples) * (1 if draws is None else draws.count)) for total in sums)


def _accumulate(
    sums: list[torch.Tensor], gradients: tuple[torch.Tensor, ...], batch: Batch, *, by_sample: bool
) -> None:
    """Add squares of what rows, or samples of several rows, say; rows do not mix in the model."""
    for total, gradient in zip(sums, gradients, strict=True):
        rows = gradient.double()
        if by_sample:
            rows = rows.unflatten(0, (-1, batch.per_sample)).sum(1)
        total.add_(rows.T @ rows if total.dim() == 2 else rows.square().sum(0))
