"""Partition the heads of a layer into clusters with a representative each; positions, not ids."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

Clusters = list[list[int]]
"""Positions of the heads of every cluster, its representative first."""


def by_similarity(similarity: torch.Tensor, count: int) -> Clusters:
    """Average-linkage clusters on ``1 - similarity``; the representative is the medoid.

    Args:
        similarity: (N, N) cosine, 1 on the diagonal.
        count: number of clusters, from 1 to N.
    """
    distance = (1 - similarity).clamp_min(0)
    distance = ((distance + distance.T) / 2).fill_diagonal_(0)
    if count == len(distance):
        return [[head] for head in range(count)]
    tree = linkage(squareform(distance.numpy(), checks=False), method="average")
    labels = fcluster(tree, count, criterion="maxclust")
    clusters = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return _ordered([_medoid_first(distance, cluster) for cluster in clusters])


def by_cost(cost: torch.Tensor, count: int) -> Clusters:
    """The representatives with a small sum of costs: representatives dropped one by one, then exchanged while it helps.

    Args:
        cost: (N, N), entry (i, j) what it costs when head i uses the weights of head j; zero on the diagonal.
        count: number of clusters, from 1 to N.
    """
    chosen = list(range(len(cost)))
    while len(chosen) > count:
        chosen = min(([c for c in chosen if c != gone] for gone in chosen), key=lambda left: total(cost, left))
    lowest = total(cost, chosen)
    while True:
        others = [head for head in range(len(cost)) if head not in chosen]
        swaps = [sorted({*chosen, into} - {out}) for out in chosen for into in others]
        best = min(swaps, key=lambda left: total(cost, left), default=chosen)
        if total(cost, best) >= lowest - 1e-12 * max(lowest, 1e-300):
            break
        chosen, lowest = best, total(cost, best)
    nearest = cost[:, chosen].argmin(dim=1).tolist()
    members: dict[int, list[int]] = {head: [] for head in chosen}
    for head, index in enumerate(nearest):
        if head not in members:
            members[chosen[index]].append(head)
    return _ordered([[head, *rest] for head, rest in members.items()])


def total(cost: torch.Tensor, representatives: list[int]) -> float:
    """Sum over heads of the cost with their best representative."""
    return float(cost[:, representatives].min(dim=1).values.sum())


def elbow(errors: list[float]) -> int:
    """The number of clusters at the bend of an error curve: the point farthest below the line between its ends.

    Args:
        errors: error of 1, 2, ... N clusters, falling.
    """
    count = len(errors)
    if count < 3 or errors[0] <= errors[-1]:
        return 1 if errors[0] <= errors[-1] else count
    below = [(errors[0] - error) / (errors[0] - errors[-1]) - index / (count - 1) for index, error in enumerate(errors)]
    return 1 + max(range(count), key=lambda index: (below[index], -index))


def _medoid_first(distance: torch.Tensor, cluster: list[int]) -> list[int]:
    sums = distance[cluster][:, cluster].sum(dim=0).tolist()
    medoid = cluster[sums.index(min(sums))]
    return [medoid, *(head for head in cluster if head != medoid)]


def _ordered(clusters: Clusters) -> Clusters:
    """By the first head of each, so that equal partitions are equal lists."""
    return sorted(clusters, key=min)
