"""How alike the attention weights of two heads are, and what it costs when one head uses those of the other.

Shape letters: B batch rows, T query tokens, S key tokens, D model width, N query heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headwise.calibration.exchange import ExchangeSums
from headwise.model.view import AttentionView


class MapSums:
    """Running sums over the attention weights of one layer.

    Attributes:
        similarity: (N, N) sum over rows of the cosine between two heads' weights, all valid query tokens side by side.
        cost: (N, N) sum over valid tokens of the squared change of the layer output when head i, in the row, uses the
            weights of head j, in the column.
        exchange: products behind the cost after a refit; None where nobody needs it.
        rows: batch rows so far; ``tokens``: valid query tokens so far.
    """

    def __init__(self, layer: AttentionView, *, cost: bool, repaired: bool) -> None:
        heads = len(layer.layout.query)
        self.similarity = torch.zeros(heads, heads, dtype=torch.float64)
        self.cost = torch.zeros(heads, heads, dtype=torch.float64)
        self.rows = self.tokens = 0
        output = layer.read().output
        self.metric = torch.einsum("dnh,dni->nhi", output, output) if cost else None
        self.exchange = ExchangeSums(heads, layer.layout.head_dim) if repaired else None

    @contextmanager
    def watched(self, layer: AttentionView, mask: torch.Tensor | None) -> Iterator[None]:
        """Add what ``layer`` computes while the block runs; ``mask`` is (B, T), true at valid tokens, or None."""

        def see(weights: torch.Tensor, values: torch.Tensor) -> None:
            self._add(weights.detach(), values.detach(), mask)

        with layer.watch_weights(see):
            yield

    def _add(self, weights: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        rows, _, tokens, _ = weights.shape
        valid = (
            mask if mask is not None and mask.shape == (rows, tokens) else torch.ones(rows, tokens, dtype=torch.bool)
        )
        maps = torch.nn.functional.normalize((weights * valid[:, None, :, None]).flatten(2), dim=-1)
        self.similarity += (maps @ maps.mT).sum(0).double()
        self.rows += rows
        self.tokens += int(valid.sum())
        if self.metric is None and self.exchange is None:
            return
        own = (weights @ values).transpose(1, 2)[valid]
        for used in range(weights.shape[1]):
            given = (weights[:, used, None] @ values).transpose(1, 2)[valid]
            if self.exchange is not None:
                self.exchange.add(own, used, given)
            if self.metric is not None:
                change = given - own
                self.cost[:, used] += torch.einsum("tnh,nhi,tni->n", change, self.metric, change).double()
