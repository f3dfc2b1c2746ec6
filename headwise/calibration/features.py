"""What the projections behind heads and neurons read, and how much the model's output depends on what they write.

Shape letters: D model width, F features of a layer (query heads times head_dim, or neurons).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from headwise.calibration.tasks import Batch, Examples, Task
from headwise.calibration.tokens import valid_mask, valid_tokens
from headwise.model.access import hooked, watched_input
from headwise.model.forward import run, to_torch
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView, ModelView

Layer = AttentionView | MlpView


class FeatureMoments:
    """Running sums of ``x x^T`` over tokens, x = the features of a layer with a 1 behind them."""

    def __init__(self, view: ModelView) -> None:
        self.layers: tuple[Layer, ...] = (*view.attention, *view.mlp)
        self.sums: dict[int, torch.Tensor] = {}

    def watched(self, batch: Batch) -> AbstractContextManager[object]:
        """Collect while the model runs on a batch."""
        stack = ExitStack()
        for index, layer in enumerate(self.layers):
            mask = valid_mask(batch, layer.family)
            stack.enter_context(watched_input(layer.output, partial(self._add, index, mask)))
        return stack

    def _add(self, index: int, mask: torch.Tensor | None, features: torch.Tensor) -> None:
        tokens = valid_tokens(features.detach(), mask)
        tokens = torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1)
        # Products of one batch in the model's own precision: sums over batches are what has to be exact.
        self.sums[index] = self.sums.get(index, 0) + (tokens.T @ tokens).double()

    def means(self) -> tuple[torch.Tensor, ...]:
        """Per attention layer, then per MLP, (F + 1, F + 1); the last entry of the sums counts the tokens."""
        return tuple(total / total[-1, -1] for _, total in sorted(self.sums.items()))


def output_curvature(
    view: ModelView,
    task: Task,
    examples: Examples,
    *,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """How much the signal depends on what a layer writes, in every direction and summed over the tokens of a sample.

    From one random projection of the signal per batch: E[g g^T] is E[J^T J] for g = J^T v, v ~ N(0, I).

    Args:
        view: the model.
        task: gives the label-free signal.
        examples: calibration samples.
        seed: of the projections.
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Returns:
        Per attention layer, then per MLP, (D, D): errors e, (D,), that are independent from token to token, change the
        signal of a sample by ``E[e^T curvature e]``, squared.
    """
    layers: tuple[Layer, ...] = (*view.attention, *view.mlp)
    generator = torch.Generator().manual_seed(seed)
    sums = [torch.zeros(w, w, dtype=torch.float64) for w in (layer.linear()[0].shape[0] for layer in layers)]
    for batch in examples.batches(batch_size):
        with ExitStack() as stack, torch.enable_grad():
            added = [stack.enter_context(_shifted(layer.output)) for layer in layers]
            signal = task.signal(run(view.module, to_torch(batch.inputs)), batch)
            value = (signal * torch.randn(signal.shape, generator=generator, dtype=signal.dtype)).sum()
            owners = [index for index, shifts in enumerate(added) for _ in shifts]
            gradients = torch.autograd.grad(value, [shift for shifts in added for shift in shifts], allow_unused=True)
        for index, gradient in zip(owners, gradients, strict=True):
            if gradient is not None:
                tokens = valid_tokens(gradient, valid_mask(batch, layers[index].family)).double()
                sums[index] += tokens.T @ tokens
        if progress is not None:
            progress(len(batch.samples))
    return tuple(total / len(examples) for total in sums)


@contextmanager
def _shifted(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Add zeros to everything that a module returns while the block runs: gradients need something to be of."""
    zeros: list[torch.Tensor] = []

    def shift(_: nn.Module, __: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        zeros.append(torch.zeros_like(result, requires_grad=True))
        return result + zeros[-1]

    with hooked(module.register_forward_hook(shift)):
        yield zeros
