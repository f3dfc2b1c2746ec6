"""In which order the units of a layer go, and what each costs when the projection behind them makes up for the others.

Removing the features P of a layer and refitting the rest of its projection W, (D, F), by least squares leaves the error
``tr(M W_P (C^-1)_PP^-1 W_P^T)``, with C the covariance of the features and M how much an error of the output matters.
Units go one after the other, and W and C^-1 are brought up to date after each (optimal brain surgeon; for heads and
neurons arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DAMPING = 1e-2
"""Added to the diagonal of the covariance, in units of its mean: what a fit to finite data cannot make good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The units of one layer in the order in which they go.

    Attributes:
        units: positions of units.
        costs: what each costs behind those before it.
    """

    units: tuple[int, ...]
    costs: tuple[float, ...]


def cheapest_first(costs: torch.Tensor) -> Order:
    """Units, (U,), whose costs add up."""
    order = torch.argsort(costs, stable=True)
    return Order(units=tuple(order.tolist()), costs=tuple(costs[order].tolist()))


def by_growth(matrix: torch.Tensor) -> Order:
    """Units with ``1_Z^T matrix 1_Z`` as the cost of a set Z, (U, U): each next one lets it grow least."""
    growth, left, costs, order = matrix.diagonal().clone(), list(range(len(matrix))), [], []
    while left:
        best = min(left, key=lambda unit: (float(growth[unit]), unit))
        left.remove(best)
        order.append(best)
        costs.append(float(growth[best]))
        growth = growth + 2 * matrix[best]
    return Order(units=tuple(order), costs=tuple(costs))


def by_reconstruction(
    moment: torch.Tensor,
    weight: torch.Tensor,
    curvature: torch.Tensor,
    units: Sequence[Sequence[int]],
    *,
    biased: bool,
    at_once: int = 1,
) -> Order:
    """Units by the error that is left after a refit.

    Args:
        moment: (F + 1, F + 1), see ``calibration.features``.
        weight: (D, F), the projection that reads the features.
        curvature: (D, D), M.
        units: features of every unit, equally many in each.
        biased: the projection has a bias, which takes in the means of what goes.
        at_once: how many units go before the rest is brought up to date.
    """
    mean = moment[-1, :-1] if biased else torch.zeros_like(moment[-1, :-1])
    covariance = moment[:-1, :-1] - torch.outer(mean, mean)
    scale = covariance.diagonal().mean().clamp_min(1e-300)
    damped = covariance + DAMPING * scale * torch.eye(len(covariance), dtype=covariance.dtype)
    places = torch.tensor([list(unit) for unit in units])
    # Unit after unit, so that features of one stand together whatever is left.
    inverse = torch.linalg.inv(damped)[places.flatten()][:, places.flatten()]
    weighted = _root(curvature) @ weight.double()[:, places.flatten()]
    width, left = places.shape[1], list(range(len(units)))
    order: list[int] = []
    costs: list[float] = []
    while left:
        each = _errors(inverse, weighted, width)
        taken = torch.argsort(each, stable=True)[: min(at_once, len(left))]
        gone = (taken[:, None] * width + torch.arange(width)).flatten()
        block = torch.linalg.solve(inverse[gone][:, gone], torch.cat([inverse[gone], weighted[:, gone].T], dim=1))
        error = float((weighted[:, gone].T * block[:, inverse.shape[1] :]).sum())
        shares = each[taken] / each[taken].sum().clamp_min(1e-300)
        order += [left[position] for position in taken.tolist()]
        costs += (max(error, 0.0) * shares).tolist()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[taken] = False
        rest = stays.repeat_interleave(width)
        update = block[:, : inverse.shape[1]][:, rest]
        weighted = weighted[:, rest] - weighted[:, gone] @ update
        inverse = inverse[rest][:, rest] - inverse[rest][:, gone] @ update
        left = [unit for unit, keep in zip(left, stays.tolist(), strict=True) if keep]
    return Order(units=tuple(order), costs=tuple(costs))


def _errors(inverse: torch.Tensor, weighted: torch.Tensor, width: int) -> torch.Tensor:
    """(U,) error of removing each unit alone."""
    if width == 1:
        alone: torch.Tensor = weighted.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
        return alone
    count = len(inverse) // width
    blocks = inverse.unflatten(0, (count, width)).unflatten(2, (count, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    parts = weighted.T.unflatten(0, (count, width))
    errors: torch.Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return errors


def _root(curvature: torch.Tensor) -> torch.Tensor:
    """R with ``R^T R`` the curvature."""
    values, vectors = torch.linalg.eigh(curvature)
    root: torch.Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return root
