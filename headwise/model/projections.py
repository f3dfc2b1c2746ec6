"""The weights of one attention layer, in one order and shape for every family.

Shape letters: D model width, N query heads, K kv heads, H head_dim. In a clustered layer R of the N query heads have
queries and J of the K kv heads have keys; elsewhere R is N and J is K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from headwise.model.latent import LatentProjections


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """The weights of one attention layer, in this order and shape for every family.

    Attributes:
        query: (R, H, D); ``key``: (J, H, D); ``value``: (K, H, D).
        output: (D, N, H).
        query_bias: (R, H) or None; ``key_bias`` (J, H) and ``value_bias`` (K, H) or None.
        output_bias: (D,) or None.
        further: path of a further parameter -> its parts, (N, ...) of any shape behind.
        latent: keys and values of a layer that computes them from a latent; ``key`` and ``value`` are empty there, and
            where they are another layer's.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    further: Mapping[str, torch.Tensor]
    latent: LatentProjections | None = None

    def of(self, queries: Sequence[int], kvs: Sequence[int]) -> Projections:
        """Those of some heads, by position and in this order; for layers in which R is N and J is K."""
        query, kv = list(queries), list(kvs)
        return Projections(
            query=self.query[query],
            key=self.key[kv],
            value=self.value[kv],
            output=self.output[:, query],
            query_bias=pick(self.query_bias, query),
            key_bias=pick(self.key_bias, kv),
            value_bias=pick(self.value_bias, kv),
            output_bias=self.output_bias,
            further={path: parts[query] for path, parts in self.further.items()},
        )


def pick(tensor: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor | None:
    """Some rows of a bias or another tensor, in this order; None where there is none."""
    return None if tensor is None else tensor[list(rows)]
