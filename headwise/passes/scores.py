"""Head importance: pure functions from weights or statistics to one number per query head; higher is more important.

Shape letters: D model width, N query heads of a layer, K kv heads, H head_dim, S samples, M heads of all layers.
"""

from __future__ import annotations

import torch

from headwise.model.view import Projections


def random(heads: int, generator: torch.Generator) -> torch.Tensor:
    """(N,) uniform numbers: the baseline that every other score has to beat."""
    return torch.rand(heads, generator=generator, dtype=torch.float64)


def weight_norm(weights: Projections) -> torch.Tensor:
    """(N,) Frobenius norms of ``W_o^h W_v^h``.

    The product is what a head adds to the residual stream per unit of attention. Unlike the norms of the single
    matrices it does not change under a change of basis inside the head, which leaves the model as it is.
    """
    values = weights.value.repeat_interleave(weights.output.shape[1] // weights.value.shape[0], dim=0)
    product = torch.einsum("onh,nhi->noi", weights.output.double(), values.double())
    norms: torch.Tensor = torch.linalg.matrix_norm(product)
    return norms


def michel(gradients: torch.Tensor) -> torch.Tensor:
    """(S, N) gradients of the loss with respect to the gates -> (N,) mean absolute gradient (arXiv 1905.10650)."""
    return gradients.abs().mean(dim=0)


def fisher(gradients: torch.Tensor) -> torch.Tensor:
    """(S, N) gradients -> (N,) mean squared gradient, the diagonal of the empirical Fisher (arXiv 2204.09656)."""
    return gradients.square().mean(dim=0)


def per_layer_normalized(scores: torch.Tensor) -> torch.Tensor:
    """Scores of one layer divided by their L2 norm, as Michel et al. do before ranking across layers."""
    length: torch.Tensor = torch.linalg.vector_norm(scores)
    return scores / length.clamp_min(1e-12)


def unit_matrix(matrix: torch.Tensor, units: list[list[int]]) -> torch.Tensor:
    """(M, M) over heads -> (U, U) over units of heads that go together: sums over both index sets."""
    members = torch.zeros(len(units), len(matrix), dtype=matrix.dtype)
    for row, unit in enumerate(units):
        members[row, unit] = 1.0
    return members @ matrix @ members.T
