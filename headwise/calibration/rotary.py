"""Which part of the keys stays rotary when the rest goes through a latent.

A pair of key coordinates is one complex number that its position turns by an angle. Across heads and frequencies, keys
are a vector of such numbers; any change of basis that mixes numbers of one frequency leaves scores as they are if
queries follow. Principal components in such a basis are kept rotary, the others lose their rotation (arXiv
2502.07864). Without a change of basis, pairs of every head are kept as they are (arXiv 2502.14837).

Shape letters: K kv heads, H head_dim, F pairs of a head that positions turn, D input width, C components, R = 2 * kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from headwise.calibration.merge import as_complex, as_real, pair_power

Basis = Literal["real", "complex"]
Select = Literal["norm", "change"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """All components of the rotated part of the keys of one layer.

    Attributes:
        analysis: (C, K, F) complex; component c of keys k is the sum of ``analysis[c] * k``.
        synthesis: (C, K, F) complex; keys are the sum over c of ``synthesis[c]`` times component c.
        frequency: (C,) which frequency turns it.
        head: (C,) the only kv head that it is about, or -1.
        energy: (C,) mean squared share in the scores.
    """

    analysis: torch.Tensor
    synthesis: torch.Tensor
    frequency: torch.Tensor
    head: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryParts:
    """Keys split into rotary ones and the rest.

    Attributes:
        rotary: (M, R, D) weights of the rotary keys.
        frequencies: (M, R / 2).
        rest: (K, P, D) weights of what is left of every head's keys.
        query_maps: (K, P + R, H) from an old query to the parts that meet the rest, and the rotary keys.
    """

    rotary: torch.Tensor
    frequencies: torch.Tensor
    rest: torch.Tensor
    query_maps: torch.Tensor


def merged_components(
    keys: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor, *, fold: int, basis: Basis
) -> Components:
    """Principal components over all heads, and over ``fold`` neighbouring frequencies together.

    Args:
        keys: (K, 2 F, D) weights of the part of the keys that is rotated.
        moment: (D, D) second moment of the input.
        weights: (K, 2 F, 2 F) second moments of the queries that read each head.
        fold: frequencies that share components; above 1 a component turns with one of them, which is not exact.
        basis: mix heads with real numbers, or with complex ones, which can also turn them against each other.
    """
    pairs, size = as_complex(keys), pair_power(weights).sqrt()
    heads, count, _ = pairs.shape
    analysis, synthesis, frequency, energies = [], [], [], []
    for start in range(0, count, fold):
        own = slice(start, min(start + fold, count))
        members = (size[:, own, None] * pairs[:, own]).flatten(0, 1)
        gram = members @ moment.to(members.dtype) @ members.mH
        energy, vectors = torch.linalg.eigh(gram if basis == "complex" else gram.real)
        vectors, energy = vectors.flip(1).to(members.dtype), energy.flip(0)
        width = own.stop - own.start
        for index in range(len(energy)):
            vector = vectors[:, index].unflatten(0, (heads, width))
            forward, back = torch.zeros_like(pairs[..., 0]), torch.zeros_like(pairs[..., 0])
            forward[:, own], back[:, own] = vector.conj() * size[:, own], vector / size[:, own]
            analysis.append(forward)
            synthesis.append(back)
            frequency.append(start + index % width)
            energies.append(energy[index])
    return Components(
        analysis=torch.stack(analysis),
        synthesis=torch.stack(synthesis),
        frequency=torch.tensor(frequency),
        head=torch.full((len(frequency),), -1),
        energy=torch.stack(energies).real,
    )


def head_components(keys: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor) -> Components:
    """Every pair of every head by itself; arguments as for ``merged_components``."""
    pairs, power = as_complex(keys), pair_power(weights)
    heads, count, _ = pairs.shape
    unit = torch.eye(heads * count, dtype=pairs.dtype).unflatten(1, (heads, count))
    size = torch.einsum("kfd,de,kfe->kf", pairs, moment.to(pairs.dtype), pairs.conj()).real
    index = torch.arange(heads * count)
    return Components(
        analysis=unit,
        synthesis=unit,
        frequency=index % count,
        head=index // count,
        energy=(size * power).flatten(),
    )


def importance(components: Components, angles: torch.Tensor, length: int, select: Select) -> torch.Tensor:
    """(C,) what a component is worth being rotary.

    Args:
        components: the components.
        angles: (F,) by how much each frequency turns from one token to the next.
        length: tokens of a sequence.
        select: ``norm``: its share in the scores. ``change``: how much of that share rotation changes, on average over
            the distances of two tokens; slow frequencies hardly turn within a sequence.
    """
    if select == "norm":
        return components.energy
    distance = torch.arange(length, dtype=torch.float64)
    count = length - distance  # pairs of tokens at this distance
    turned = 2 - 2 * torch.cos(angles.double()[:, None] * distance)
    change = (turned * count).sum(1) / count.sum()
    return components.energy * change[components.frequency]


def of_every_frequency(components: Components, worth: torch.Tensor, count: int) -> torch.Tensor:
    """(C,) the same worth where a component is among the ``count`` best of its frequency and head, else -inf."""
    kept = torch.full_like(worth, -torch.inf)
    for head in components.head.unique():
        for frequency in components.frequency.unique():
            own = torch.nonzero((components.head == head) & (components.frequency == frequency))[:, 0]
            best = own[worth[own].argsort(descending=True, stable=True)[:count]]
            kept[best] = worth[best]
    return kept


def keep_rotary(
    keys: torch.Tensor, components: Components, worth: torch.Tensor, numbers: int, rotated: int
) -> RotaryParts:
    """Keep the components that are worth most, ``numbers`` real numbers of them in all.

    Args:
        keys: (K, H, D) weights of the keys, of which the first ``rotated`` coordinates are turned.
        components: of the turned part.
        worth: (C,) see ``importance``.
        numbers: even; where components belong to heads, a multiple of 2 K, so that every head keeps as many.
        rotated: 2 F.
    """
    heads, H, _ = keys.shape
    per_head = bool((components.head >= 0).all())
    groups = range(heads) if per_head else [-1]
    kept = []
    for head in groups:
        order = [int(i) for i in torch.argsort(worth, descending=True, stable=True) if components.head[i] == head]
        # In the order of their frequencies, so that the same choice always gives the same weights.
        kept.append(sorted(order[: numbers // 2 // len(groups)]))
    index = torch.tensor(kept)
    pairs = as_complex(keys[:, :rotated])
    values = torch.einsum("mckf,kfd->mcd", components.analysis[index], pairs)
    expressed = torch.einsum("mckf,mcd->kfd", components.synthesis[index], values)
    rest = torch.cat([as_real(pairs - expressed), keys[:, rotated:].double()], dim=1)
    nothing = numbers == 2 * len(components.energy) and rotated == H
    maps = []
    for head in range(heads):
        factors = components.synthesis[index[head if per_head else 0], head].conj()
        rows = torch.arange(0 if nothing else H)
        if per_head:
            gone = components.frequency[index[head]]
            rows = torch.tensor([i for i in range(H) if i >= rotated or i % (rotated // 2) not in set(gone.tolist())])
        maps.append(torch.cat([torch.eye(H, dtype=torch.float64)[rows.long()], _query_map(factors, H)]))
    query_maps = torch.stack(maps)
    plain = query_maps.shape[1] - numbers // len(groups)
    return RotaryParts(
        rotary=as_real(values),
        frequencies=components.frequency[index],
        rest=query_maps[:, :plain] @ rest,
        query_maps=query_maps,
    )


def _query_map(factors: torch.Tensor, width: int) -> torch.Tensor:
    """(C, F) complex factors of a query's pairs -> (2 C, width) real matrix; coordinates behind the pairs are left."""
    real, imaginary = factors.real, factors.imag
    rows = torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)])
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
