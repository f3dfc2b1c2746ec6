"""Importance: pure functions from weights or statistics to one number per query head or neuron; higher is more.

Shape letters: D model width, N query heads of a layer, K kv heads, H head_dim, F neurons, S samples, M heads of all
layers.
"""

from __future__ import annotations

import torch

from headwise.model.mlp import MlpWeights
from headwise.model.projections import Projections


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


def neuron_contribution(weights: MlpWeights, size: torch.Tensor) -> torch.Tensor:
    """(F,) mean L1 norm of what a neuron adds to the layer output.

    Args:
        weights: of the MLP.
        size: (F,) mean absolute values of the neurons.
    """
    return size * weights.down.double().abs().sum(0)


def neuron_weight_norm(weights: MlpWeights) -> torch.Tensor:
    """(F,) product of the norms of what goes into a neuron (and its gate) and of what comes out of it."""
    length = torch.linalg.vector_norm
    norms: torch.Tensor = length(weights.up.double(), dim=1) * length(weights.down.double(), dim=0)
    return norms if weights.gate is None else norms * length(weights.gate.double(), dim=1)
