"""What heads lose when they become one, for many groups of the heads of one layer.

Shape letters: D input width (with the constant 1 behind it where there is a bias), K heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.calibration.merge import as_complex, pair_power, roots


class GroupEnergy:
    """The part of a group's weighted energy that no shared head can express, as ``calibration.merge`` counts it.

    The data are multiplied once; a group then costs the eigenvalues of a small matrix.

    Attributes:
        total: weighted energy of all heads.
    """

    def __init__(self, heads: torch.Tensor, moment: torch.Tensor, weights: torch.Tensor, *, rotated: int) -> None:
        """Args:
        heads: (K, H, D) projection weights.
        moment: (D, D) second moment of the input.
        weights: (K, H, H) how errors of each head count.
        rotated: leading coordinates of a head that rotary positions turn, in pairs; 0 or H where all are alike.
        """
        self._grams: list[torch.Tensor] = []
        free = slice(rotated, None)
        if rotated:
            turned = slice(None, rotated)
            size = pair_power(weights[:, turned, turned]).sqrt()
            self._add((size[..., None] * as_complex(heads[:, turned])).transpose(0, 1)[:, :, None], moment)
        if rotated < heads.shape[1]:
            self._add((roots(weights[:, free, free])[0] @ heads[:, free].double())[None], moment)
        self.total = sum(float(torch.einsum("pkwkw->", gram).real) for gram in self._grams)

    def _add(self, heads: torch.Tensor, moment: torch.Tensor) -> None:
        """Heads in P parts that do not mix, each of width w: (P, K, w, D)."""
        flat = heads.flatten(1, 2)
        gram = flat @ moment.to(flat.dtype) @ flat.mH
        count, width = heads.shape[1:3]
        self._grams.append(gram.unflatten(2, (count, width)).unflatten(1, (count, width)))

    def lost(self, group: Sequence[int]) -> float:
        """Energy that the best shared head of these heads, given by position, cannot express."""
        lost, members = 0.0, list(group)
        for gram in self._grams:
            part = gram[:, members][:, :, :, members].flatten(3).flatten(1, 2)
            lost += float(torch.linalg.eigvalsh(part)[:, : -gram.shape[2]].clamp_min(0).sum())
        return lost
