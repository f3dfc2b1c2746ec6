"""Second moments between the inputs of two layers, and what computes one from the other.

Shape letters: D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from headwise.calibration.tasks import Batch
from headwise.model.view import ModelView

_RIDGE = 1e-4
"""Pull of a translator towards zero, in units of the mean squared input; inputs of transformers have near-zero
directions, along which nothing could be told from noise."""


class CrossSums:
    """Sums of ``x y^T`` over tokens: x what a layer projects keys and values from, y the same of an earlier layer."""

    def __init__(self, pairs: Mapping[int, int]) -> None:
        """Args:
        pairs: layer -> the earlier layer.
        """
        self._pairs = pairs
        self._sums: dict[int, torch.Tensor] = {}

    @contextmanager
    def watched(self, view: ModelView, batch: Batch) -> Iterator[None]:
        """Add what the model computes of a batch while the block runs."""
        inputs: dict[int, torch.Tensor] = {}

        with ExitStack() as stack:
            for layer in sorted({*self._pairs, *self._pairs.values()}):
                stack.enter_context(view.attention[layer].watch_input(partial(inputs.__setitem__, layer)))
            yield
        for layer, owner in self._pairs.items():
            family = view.attention[layer].family
            valid = None if family.patches else batch.valid(decoder=family.decoder and not family.cross)
            mask = None if valid is None else torch.as_tensor(valid)
            x, y = (_tokens(inputs[which], mask) for which in (layer, owner))
            self._sums[layer] = self._sums.get(layer, 0) + x.T @ y

    def means(self, layers: int) -> tuple[torch.Tensor, ...]:
        """Per layer (D + 1, D + 1) means, inputs with a 1 behind them; without entries where a layer has no pair."""
        return tuple(
            self._sums[layer] / self._sums[layer][-1, -1] if layer in self._sums else torch.zeros(0, 0)
            for layer in range(layers)
        )


def translator(cross: torch.Tensor, moment: torch.Tensor, *, constant: bool) -> torch.Tensor:
    """(D, D + 1) that computes x from y with the least squared error, its last column a constant.

    Args:
        cross: (D + 1, D + 1) mean of ``x y^T``, both with a 1 behind them.
        moment: (D + 1, D + 1) mean of ``y y^T``.
        constant: allow one; otherwise the last column is zero.
    """
    width = len(moment) - 1
    kept = width + int(constant)
    left, right = moment[:kept, :kept].clone(), cross[:width, :kept]
    left.diagonal()[:width] += _RIDGE * float(moment.diagonal()[:width].mean())
    found = torch.zeros(width, width + 1, dtype=torch.float64)
    found[:, :kept] = torch.linalg.solve(left, right.T).T
    return found


def _tokens(inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, D) -> (tokens, D + 1) in float64, without padding where the mask speaks about these tokens."""
    x = inputs.detach()
    x = (x[mask] if mask is not None and mask.shape == x.shape[:2] else x.flatten(0, 1)).double()
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)
