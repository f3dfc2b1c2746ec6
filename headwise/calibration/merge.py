"""Merge key/value heads that are alike only up to a change of basis: the arithmetic behind grouped-query conversion.

A key head may be multiplied by any invertible matrix if its query heads are multiplied by the inverse transpose, and a
value head likewise with its part of the output projection. Heads are therefore compared and merged as subspaces: every
member of a group is approximated as ``A_j`` times one shared head, the maps ``A_j`` move into queries and output, and
the error is weighted by what queries and output projection make of it. Rotary positions only leave one complex number
per frequency and head free; the merge then has that form, and stays exact under rotation.

Shape letters: D input width (with the constant 1 behind it where there is a bias), J heads of a group, H head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

_FLOOR = 1e-6
"""Smallest eigenvalue of a weight, relative to the largest: directions that nobody reads stay invertible."""
_NOTHING = 1e-9
"""Energy, relative to that of all heads, below which a merge is lossless and what is left is rounding."""
_ALIGNMENT_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """One shared head for a group.

    Attributes:
        shared: (H, D) weights of the shared head, float64.
        maps: (J, H, H); member j is approximated by ``maps[j] @ shared``.
        lost: share of the group's weighted energy that the shared head cannot express, 0 to 1; NaN where the method
            does not look at energies.
    """

    shared: torch.Tensor
    maps: torch.Tensor
    lost: float


def merge_subspace(heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor) -> Merged:
    """The best shared head of a group in the weighted second norm.

    Args:
        heads: (J, H, D) projection weights.
        moment: (D, D) second moment of the input.
        weights: (J, H, H) second moment by which errors of each head count: of the queries that read a key head, or
            ``W_o^T W_o`` of the columns that read a value head.
    """
    members, width, _ = heads.shape
    forward, inverses = roots(weights)
    stacked = (forward @ heads.double()).flatten(0, 1)
    energy, vectors = torch.linalg.eigh(stacked @ moment.double() @ stacked.T)
    kept = vectors[:, -width:].flip(1)
    shared, maps = kept.T @ stacked, inverses @ kept.unflatten(0, (members, width))
    return _balanced(shared, maps, heads, _lost(energy, width))


def merge_rotary(heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor) -> Merged:
    """The same for key heads under rotary positions, whose pairs are the coordinates ``f`` and ``f + H / 2``.

    Args:
        heads: (J, H, D) key weights.
        moment: (D, D) second moment of the input.
        weights: (J, H, H) second moment of the queries that read each head.

    Returns:
        Maps that scale and rotate every pair by a number of its own, and so commute with the rotary positions.
    """
    pairs = as_complex(heads)
    size = pair_power(weights).sqrt()
    weighted = (size[..., None] * pairs).transpose(0, 1)
    energy, vectors = torch.linalg.eigh(weighted @ moment.to(weighted.dtype) @ weighted.mH)
    kept = vectors[..., -1]
    shared = torch.einsum("fj,fjd->fd", kept.conj(), weighted)
    factors = kept.T / size
    return _balanced(as_real(shared), pair_matrices(factors), heads, _lost(energy, 1))


def merge_keys(heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor, *, rotated: int) -> Merged:
    """The best shared key head where rotary positions turn the first ``rotated`` of the H coordinates.

    Scores are sums over the two parts of a head, so that each part has its own shared head and maps.
    """
    if rotated == 0:
        return merge_subspace(heads, moment, weights)
    turned = merge_rotary(heads[:, :rotated], moment, weights[:, :rotated, :rotated])
    if rotated == heads.shape[1]:
        return turned
    rest = merge_subspace(heads[:, rotated:], moment, weights[:, rotated:, rotated:])
    energies = [_energy(heads[:, part], moment, weights[:, part, part]) for part in _parts(rotated)]
    lost = (turned.lost * energies[0] + rest.lost * energies[1]) / max(sum(energies), 1e-300)
    return _joined(turned, rest, lost)


def merge_mean(heads: torch.Tensor) -> Merged:
    """The mean of the group's weights, the published initialisation of grouped-query attention (arXiv 2305.13245)."""
    shared = heads.double().mean(0)
    return Merged(shared=shared, maps=_identities(heads), lost=math.nan)


def merge_first(heads: torch.Tensor) -> Merged:
    """The group's first head."""
    return Merged(shared=heads[0].double(), maps=_identities(heads), lost=math.nan)


def merge_aligned(heads: torch.Tensor, moment: torch.Tensor, *, rotated: int = 0) -> Merged:
    """The mean after turning every head onto the others (generalised Procrustes, arXiv 2412.20677).

    Args:
        heads: (J, H, D) projection weights.
        moment: (D, D) second moment of the input, so that outputs are aligned rather than weights.
        rotated: coordinates at the front of each head that may only be turned in pairs, as rotary positions ask for.
    """
    if rotated in (0, heads.shape[1]):
        return _aligned(heads, moment, rotary=rotated > 0)
    turned, rest = (_aligned(heads[:, part], moment, rotary=part.start is None) for part in _parts(rotated))
    return _joined(turned, rest, math.nan)


def _aligned(heads: torch.Tensor, moment: torch.Tensor, *, rotary: bool) -> Merged:
    second = moment.double()
    turns = _identities(heads)
    for _ in range(_ALIGNMENT_ROUNDS):
        mean = (turns.mT @ heads.double()).mean(0)
        correlation = heads.double() @ second @ mean.T
        turns = _pair_turns(heads, mean, second) if rotary else _orthogonal(correlation)
    shared = (turns.mT @ heads.double()).mean(0)
    return Merged(shared=shared, maps=turns, lost=math.nan)


def restore_norm(merged: Merged, heads: torch.Tensor) -> Merged:
    """Scale a shared head to the mean norm of its members: averaging heads that differ shrinks them."""
    members = torch.linalg.vector_norm(heads.double().flatten(1), dim=1).mean()
    factor = float(members / torch.linalg.vector_norm(merged.shared).clamp_min(1e-300))
    return replace(merged, shared=factor * merged.shared)


def _parts(rotated: int) -> tuple[slice, slice]:
    """The coordinates of a head that are rotated, and those that are not."""
    return slice(None, rotated), slice(rotated, None)


def _joined(turned: Merged, rest: Merged, lost: float) -> Merged:
    """Two parts of a head as one; neither part's maps mix with the other's."""
    maps = [torch.block_diag(*pair) for pair in zip(turned.maps, rest.maps, strict=True)]
    return Merged(shared=torch.cat([turned.shared, rest.shared]), maps=torch.stack(maps), lost=lost)


def _energy(heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor) -> float:
    """What the errors of a merge are measured against: the weighted second norm of all members."""
    return float(torch.einsum("jab,jad,de,jbe->", weights.double(), heads.double(), moment.double(), heads.double()))


def missed(merged: Merged, heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(H, D) what a shared head misses most of its group, as a head of the same size; zero where it misses nothing.

    Args:
        merged: the shared head.
        heads: (J, H, D) the group, ``moment`` and ``weights`` as for ``merge_subspace``.
        moment: (D, D).
        weights: (J, H, H).
    """
    width = heads.shape[1]
    left = heads.double() - merged.maps @ merged.shared
    stacked = (roots(weights)[0] @ left).flatten(0, 1)
    energy, vectors = torch.linalg.eigh(stacked @ moment.double() @ stacked.T)
    if float(energy[-1]) <= _NOTHING * _energy(heads, moment, weights):
        return torch.zeros_like(merged.shared)
    found: torch.Tensor = vectors[:, -width:].flip(1).T @ stacked
    sizes = [float(torch.linalg.vector_norm(head)) for head in (merged.shared, found)]
    return found * (sizes[0] / max(sizes[1], 1e-300))


def _identities(heads: torch.Tensor) -> torch.Tensor:
    return torch.eye(heads.shape[1], dtype=torch.float64).repeat(len(heads), 1, 1)


def _orthogonal(correlation: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrices nearest to (J, H, H) correlations."""
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.linalg.svd(correlation)
    return parts[0] @ parts[2]


def _pair_turns(heads: torch.Tensor, mean: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The rotation of every pair that brings each head nearest to the mean: a phase per frequency."""
    pairs, target = as_complex(heads), as_complex(mean)
    correlation = torch.einsum("jfd,de,fe->jf", pairs, moment.to(pairs.dtype), target.conj())
    return pair_matrices(correlation / correlation.abs().clamp_min(1e-300))


def as_complex(heads: torch.Tensor) -> torch.Tensor:
    """(..., H, D) -> (..., H / 2, D): coordinates ``f`` and ``f + H / 2`` as real and imaginary part."""
    real, imaginary = heads.double().chunk(2, dim=-2)
    return torch.complex(real, imaginary)


def as_real(pairs: torch.Tensor) -> torch.Tensor:
    """The inverse of ``as_complex``."""
    return torch.cat([pairs.real, pairs.imag], dim=-2)


def pair_matrices(factors: torch.Tensor) -> torch.Tensor:
    """(J, H / 2) complex factors -> (J, H, H) real matrices that multiply the pairs by them."""
    real, imaginary = torch.diag_embed(factors.real), torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([real, -imaginary], dim=-1), torch.cat([imaginary, real], dim=-1)], dim=-2)


def pair_power(weights: torch.Tensor) -> torch.Tensor:
    """(J, H, H) second moments of queries -> (J, H / 2) of their pairs, floored."""
    real, imaginary = weights.diagonal(dim1=1, dim2=2).double().chunk(2, dim=1)
    power = real + imaginary
    return power.clamp_min(_FLOOR * float(power.max()))


def roots(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square roots of (J, H, H) matrices and their inverses, with eigenvalues floored."""
    values, vectors = torch.linalg.eigh(weights.double())
    values = values.clamp_min(_FLOOR * float(values.max())).sqrt()
    forward = vectors @ torch.diag_embed(values) @ vectors.mT
    return forward, vectors @ torch.diag_embed(1 / values) @ vectors.mT


def _lost(energy: torch.Tensor, kept: int) -> float:
    """Share of the eigenvalues (ascending along the last axis) outside the largest ``kept``."""
    total = float(energy.clamp_min(0).sum())
    return float(energy[..., :-kept].clamp_min(0).sum()) / total if total > 0 else 0.0


def _balanced(shared: torch.Tensor, maps: torch.Tensor, heads: torch.Tensor, lost: float) -> Merged:
    """Give the shared head the size of its members, so that half precision sees numbers like those before."""
    size = float(torch.linalg.vector_norm(heads.double())) / len(heads) ** 0.5
    factor = size / max(float(torch.linalg.vector_norm(shared)), 1e-300)
    return Merged(shared=factor * shared, maps=maps / factor, lost=lost)
