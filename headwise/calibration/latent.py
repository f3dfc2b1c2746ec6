"""The best latent of few numbers from which several blocks of heads can be computed.

The principal components of all outputs together, each block in units of its own size, and errors weighted by what reads
the block: the same as a singular value decomposition of the weights in the metric of the inputs (arXiv 2502.07864,
2603.17946). Keys and values of one layer, or of several layers that read one input, are such blocks.

Shape letters: D width of the input, J heads of a block, H head_dim, r rank, F = sum of J * H over all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.calibration.merge import roots


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Heads that are computed from the latent.

    Attributes:
        heads: (J, H, D) projection weights.
        weights: (J, H, H) second moment by which errors of each head count, see ``calibration.merge``.
    """

    heads: torch.Tensor
    weights: torch.Tensor


class JointLatent:
    """The latents of all ranks.

    Attributes:
        energy: (F,) what each number of the latent adds, largest first, in units of all blocks together; the sum is 1.
    """

    def __init__(self, blocks: Sequence[Block], moment: torch.Tensor, *, balanced: bool) -> None:
        """Args:
        blocks: the heads.
        moment: (D, D) second moment of the input, centred where constants are taken care of elsewhere.
        balanced: give every block the same total energy; otherwise the larger one has more say.
        """
        self._moment = moment.double()
        stacked, self._inverses = [], []
        for block in blocks:
            forward, inverses = roots(block.weights) if block.weights.numel() else (block.weights,) * 2
            rows = (forward @ block.heads.double()).flatten(0, 1)
            energy = float(torch.einsum("fd,de,fe->", rows, self._moment, rows))
            size = max(energy, 1e-300) ** 0.5 if balanced else 1.0
            stacked.append(rows / size)
            self._inverses.append(inverses * size)
        self._rows = torch.cat(stacked)
        energy, vectors = torch.linalg.eigh(self._rows @ self._moment @ self._rows.T)
        self._vectors = vectors.flip(1)
        found = energy.flip(0).clamp_min(0)
        self.energy = found / found.sum().clamp_min(1e-300)

    def lost(self, rank: int) -> float:
        """Share of the weighted energy that a latent of this rank cannot express."""
        return float(self.energy[rank:].sum())

    def rank_for(self, kept: float) -> int:
        """The smallest rank that keeps this share of the energy."""
        reached = torch.nonzero(self.energy.cumsum(0) >= kept - 1e-12)
        return int(reached[0]) + 1 if len(reached) else len(self.energy)

    def factor(self, rank: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A latent, of mean square 1, and what computes the blocks from it.

        Returns:
            (r, D), and per block (J, H, r), in float64.
        """
        kept = self._vectors[:, :rank]
        down = kept.T @ self._rows
        size = float(torch.einsum("rd,de,re->", down, self._moment, down) / rank) ** 0.5 or 1.0
        ups, start = [], 0
        for inverses in self._inverses:
            heads, H, _ = inverses.shape
            part = kept[start : start + heads * H].unflatten(0, (heads, H))
            ups.append(size * (inverses @ part))
            start += heads * H
        return down / size, tuple(ups)


def spread_rank(latents: Sequence[torch.Tensor], budget: int, most: Sequence[int], step: int = 1) -> list[int]:
    """Numbers per layer, ``budget`` in all, each step given to the layer that gains most by it.

    The gain is the share of the layer's own energy that its next numbers add.

    Args:
        latents: per layer the energies of ``JointLatent``.
        budget: numbers in all.
        most: per layer, how many it can use.
        step: numbers that are given together; every layer gets one step, and may end with less than a whole one only
            where it cannot use more.
    """
    ranks = [min(step, limit) for limit in most]
    while True:
        steps = [min(step, limit - rank) for rank, limit in zip(ranks, most, strict=True)]
        fitting = [i for i, size in enumerate(steps) if size and sum(ranks) + size <= budget]
        if not fitting:
            return ranks
        gains = {i: float(latents[i][ranks[i] : ranks[i] + steps[i]].sum()) / steps[i] for i in fitting}
        best = max(fitting, key=lambda i: (gains[i], -i))
        ranks[best] += steps[best]
