"""What the neurons of every MLP give, summed over tokens.

Shape letters: B batch rows, T tokens, F neurons of an MLP.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch

from headwise.calibration.tasks import Batch
from headwise.calibration.tokens import valid_mask, valid_tokens
from headwise.model.view import ModelView


class NeuronSums:
    """Running sums over the tokens of what every neuron gives."""

    def __init__(self, view: ModelView) -> None:
        self.view = view
        widths = [len(mlp.layout.neurons) for mlp in view.mlp]
        self.tokens = [0] * len(widths)
        self.total = [torch.zeros(width, dtype=torch.float64) for width in widths]
        self.absolute = [torch.zeros(width, dtype=torch.float64) for width in widths]

    def watched(self, batch: Batch) -> AbstractContextManager[object]:
        """Collect while the model runs on a batch."""
        stack = ExitStack()
        for mlp in self.view.mlp:
            stack.enter_context(mlp.watch_neurons(partial(self._add, mlp.index, valid_mask(batch, mlp.family))))
        return stack

    def _add(self, index: int, mask: torch.Tensor | None, neurons: torch.Tensor) -> None:
        tokens = valid_tokens(neurons.detach(), mask)
        self.tokens[index] += len(tokens)
        self.total[index] += tokens.sum(0, dtype=torch.float64)
        self.absolute[index] += tokens.abs().sum(0, dtype=torch.float64)

    def mean(self) -> tuple[torch.Tensor, ...]:
        """Per MLP (F,): mean over tokens."""
        return tuple(total / count for total, count in zip(self.total, self.tokens, strict=True))

    def size(self) -> tuple[torch.Tensor, ...]:
        """Per MLP (F,): mean absolute value over tokens."""
        return tuple(total / count for total, count in zip(self.absolute, self.tokens, strict=True))
