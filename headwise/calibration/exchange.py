"""What it costs when a head uses the attention weights of another one and the output projection is solved anew.

Before a refit, heads look dear that others can stand in for, and cheap whose small change nobody makes good. Both show
in the products of what the heads give with their own weights and with those of each other.

Shape letters: N query heads, H head_dim, D model width; F = N * H features; t tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.model.view import AttentionView

LARGEST = 2 << 30
"""Bytes of sums over all layers; beyond, costs before the refit have to do."""
_DAMPING = 0.01
"""Added to variances, in units of their mean: directions that calibration hardly saw are not taken for help."""


def room(layers: Sequence[AttentionView]) -> int:
    """Bytes of the sums of all layers."""
    sizes = [(len(layer.layout.query), layer.layout.head_dim) for layer in layers]
    return sum(4 * heads * (heads * width + 1) * heads * width for heads, width in sizes)


class ExchangeSums:
    """Running sums of products over the tokens of one layer.

    Attributes:
        own: (F + 1, F + 1) products of what the heads give with their own weights, and of a constant behind it.
        cross: (N, F + 1, F): entry j, these with what all heads give when they use the weights of head j.
        other: (N, N, H, H): entry (j, i), the products of what head i gives with the weights of head j.
    """

    def __init__(self, heads: int, width: int) -> None:
        features = heads * width
        self.own = torch.zeros(features + 1, features + 1)
        self.cross = torch.zeros(heads, features + 1, features)
        self.other = torch.zeros(heads, heads, width, width)

    def add(self, own: torch.Tensor, used: int, given: torch.Tensor) -> None:
        """Tokens of one batch.

        Args:
            own: (t, N, H) with the heads' own weights.
            used: head whose weights all use in ``given``; 0 also adds the products of ``own`` itself.
            given: (t, N, H).
        """
        features = torch.cat([own.flatten(1), own.new_ones(len(own), 1)], dim=1)
        if used == 0:
            self.own += features.T @ features
        self.cross[used] += features.T @ given.flatten(1)
        self.other[used] += torch.einsum("tnh,tni->nhi", given, given)

    def cost(self, output: torch.Tensor) -> torch.Tensor:
        """(N, N): squared error that is left, summed over tokens, when head i, in the row, uses the weights of head j.

        All other heads stay as they are, and the output projection is the best one for what the heads then give.

        Args:
            output: (D, N, H) output projection.
        """
        _, heads, width = output.shape
        found = torch.zeros(heads, heads, dtype=torch.float64)
        own, cross, other = self.own.double(), self.cross.double(), self.other.double()
        places = torch.arange(heads * width + 1)
        damping = _DAMPING * float(own.diagonal()[:-1].mean())
        for head in range(heads):
            mine = places[head * width : (head + 1) * width]
            rest = torch.cat([places[: mine[0]], places[mine[-1] + 1 :]])
            inner = own[rest][:, rest]
            inner.diagonal()[:-1] += damping
            factor = torch.linalg.cholesky(inner)
            weight = output[:, head].double()
            # What the others cannot tell about this head, with its own weights and with those of every other head.
            seen = torch.linalg.solve_triangular(factor, own[rest][:, mine], upper=False)
            missing = own[mine][:, mine] - seen.T @ seen
            for used in range(heads):
                if used == head:
                    continue
                given = torch.linalg.solve_triangular(factor, cross[used][rest][:, mine], upper=False)
                shared = cross[used][mine][:, mine] - seen.T @ given
                alone = other[used, head] - given.T @ given
                alone.diagonal().add_(damping)
                told = shared @ torch.linalg.solve(alone, shared.T)
                found[head, used] = max(float(torch.einsum("dh,hi,di->", weight, missing - told, weight)), 0.0)
        return found
