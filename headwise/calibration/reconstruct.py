"""Reconstruction of an attention layer by gradient descent, for what no closed form reaches: queries and keys.

The output of a layer is linear in its values and its output projection, which a refit solves for. Queries and keys act
through a softmax. Here all projections of a layer go down the gradient of the error that the refit has too: what the
untouched layer gives, and what earlier layers got wrong. No labels, no other layer: layers are fitted one by one, in
the order in which they run, as quantizers reconstruct them (AdaRound, arXiv 2004.10568; BRECQ, arXiv 2102.05426).
An eighth of the samples is held out, and the weights that are best on them stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.func import functional_call

from headwise.calibration.calls import Call
from headwise.calibration.refit import observe, target
from headwise.calibration.tasks import Batch as ExampleBatch
from headwise.calibration.tasks import Examples
from headwise.calibration.tokens import valid_mask, valid_tokens
from headwise.errors import DataError
from headwise.model.forward import to_torch
from headwise.model.view import AttentionView, ModelView

_HELD = 8
"""One batch of so many is held out."""
_ROWS = 8
"""Samples of a step."""
_RATE = 0.015
"""Largest step of a weight, in units of the root mean square of its matrix."""
_WARM_UP = 0.1
"""Share of the steps until they have that size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """What became of one layer.

    Attributes:
        weights: parameter of the attention module -> its new value.
        before: squared error on the held-out tokens relative to the target's energy, with the old weights.
        after: the same with the new ones; never larger.
        epoch: the one that the weights are of; 0 where no epoch was better than the old weights.
    """

    weights: Weights
    before: float
    after: float
    epoch: int


Weights = Mapping[str, torch.Tensor]


class _Batch(NamedTuple):
    """A call of the student's layer, which of its tokens count, what these shall give, (tokens, D), and samples."""

    call: Call
    valid: torch.Tensor | None
    wanted: torch.Tensor
    samples: int


def reconstruct(
    student: ModelView,
    teacher: ModelView,
    layer: int,
    examples: Examples,
    *,
    epochs: int,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Fit the projections of one attention layer to the untouched layer's output.

    The inputs and targets of the layer stay in memory meanwhile: twice the hidden states of all calibration tokens.

    Args:
        student: the edited model; layers before ``layer`` are final. It is left as it is.
        teacher: the untouched model.
        layer: which attention layer; one that runs once.
        examples: calibration samples.
        epochs: how often every sample is seen, each time in another order, which is the same in every run.
        progress: called with the epoch, from 1, and the number of samples of every finished batch.

    Raises:
        DataError: too few samples to hold some out.
    """
    ours, theirs = student.attention[layer], teacher.attention[layer]
    batches = [_record(student, ours, teacher, theirs, batch) for batch in examples.batches(_ROWS)]
    held, fitted = batches[::_HELD], [batch for place, batch in enumerate(batches) if place % _HELD]
    if not fitted:
        raise DataError(
            f"{len(examples)} calibration samples to reconstruct layer {layer}",
            expected=f"more than {_ROWS}, some of which are held out",
            fix="raise calibration.samples, or set reconstruct: 0",
        )
    weights = {name: value.clone().requires_grad_() for name, value in ours.projections().items()}
    descent = _Descent(ours, weights, fitted, steps=epochs * len(fitted))
    random = torch.Generator().manual_seed(0)
    before = after = _error(ours, weights, held)
    best, epoch = _values(weights), 0
    for number in range(1, epochs + 1):
        for place in torch.randperm(len(fitted), generator=random).tolist():
            descent.step(fitted[place])
            if progress is not None:
                progress(number, fitted[place].samples)
        error = _error(ours, weights, held)
        if error < after:
            best, epoch, after = _values(weights), number, error
    return Reconstruction(weights=best, before=before, after=after, epoch=epoch)


class _Descent:
    """Adam with a warm-up and a falling rate, on the mean squared error of a token relative to the target's energy."""

    def __init__(self, layer: AttentionView, weights: Weights, batches: Sequence[_Batch], *, steps: int) -> None:
        self.layer, self.weights = layer, weights
        tokens = sum(len(batch.wanted) for batch in batches)
        self.energy = sum(float(batch.wanted.square().sum()) for batch in batches) / max(tokens, 1)
        rates = {name: _RATE * _size(name, weights) for name in weights}
        self.optimizer = torch.optim.Adam([{"params": [weights[name]], "lr": rate} for name, rate in rates.items()])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(_pace, steps=steps))

    def step(self, batch: _Batch) -> None:
        """One step on the error of one batch."""
        self.optimizer.zero_grad()
        loss = _squares(self.layer, self.weights, batch) / max(len(batch.wanted) * self.energy, 1e-300)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


def _pace(step: int, *, steps: int) -> float:
    """Share of the largest rate: up in a straight line, then down along a cosine."""
    warm_up = max(round(_WARM_UP * steps), 1)
    return min((step + 1) / warm_up, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def _size(name: str, weights: Weights) -> float:
    """Root mean square of a matrix; a bias, which may be zero, moves as fast as its matrix."""
    beside = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
    return float(weights.get(beside, weights[name]).detach().square().mean().sqrt())


def _values(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def _record(
    student: ModelView, ours: AttentionView, teacher: ModelView, theirs: AttentionView, batch: ExampleBatch
) -> _Batch:
    """What the layer is called with, and what it shall give."""
    inputs = to_torch(batch.inputs)
    calls: list[Call] = []
    with ours.watch_calls(lambda args, kwargs: calls.append(Call(args, kwargs))):
        own = observe(student, ours, inputs)
    valid = valid_mask(batch, ours.family)
    wanted = valid_tokens(target(ours, own, observe(teacher, theirs, inputs)), valid)
    return _Batch(calls.pop().alone().copied(), valid, wanted.clone(), len(batch.samples))


def _squares(layer: AttentionView, weights: Weights, batch: _Batch) -> torch.Tensor:
    """Squared error over the tokens of a batch."""
    found: list[torch.Tensor] = []
    with layer.watch_output(found.append):
        functional_call(layer.module, dict(weights), batch.call.args, batch.call.kwargs)
    return (valid_tokens(found[0], batch.valid) - batch.wanted).square().sum()


@torch.no_grad()
def _error(layer: AttentionView, weights: Weights, batches: Sequence[_Batch]) -> float:
    """Squared error over batches, relative to the energy of their targets."""
    energy = sum(float(batch.wanted.square().sum()) for batch in batches)
    return sum(float(_squares(layer, weights, batch)) for batch in batches) / max(energy, 1e-300)
