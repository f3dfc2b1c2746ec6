"""Clustered head attention: alike heads use the attention weights of one of them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import ClusterHeads, ClusterOnline, Edit, EditPlan
from headwise.model.latent_edits import refuse_compressed
from headwise.model.view import AttentionView, ModelView
from headwise.passes.base import Pass
from headwise.passes.clustering import Clusters, by_cost, by_similarity, elbow
from headwise.passes.recovery import Recovery


class ClusterHeadsPass(Pass):
    """Cluster the query heads of every layer; a representative's attention weights serve its whole cluster (CHAI)."""

    name: ClassVar[str] = "cluster-heads"
    summary: ClassVar[str] = "heads with alike attention use one head's queries, keys and scores; values stay (CHAI)"
    paper: ClassVar[str] = "arXiv 2403.08058"

    clusters: int | tuple[int, ...] | Literal["elbow"] | None = None
    """Clusters per layer: one number for all layers (layers that have fewer heads keep theirs), one per layer, or
    ``elbow``: where the error curve of the layer bends."""
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Instead of clusters: the share of all query heads that lose their queries, taken where it costs least."""
    affinity: Literal["output", "maps"] = "output"
    """What makes heads alike: the change of the layer output when one uses the attention weights of the other, after
    the refit where there is one; or the cosine between attention maps (average linkage, as in the paper). The
    representative is the medoid."""
    membership: Literal["static", "online"] = "static"
    """Clusters fixed beforehand, so that queries and keys of the members go; or found anew for every sample from its
    first 5 tokens, as in the paper: only scores are saved. Online is for decoders, with ``affinity: maps``."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    refit_mlp: bool = True
    """With refit: the down projections of the MLPs behind them too, in the order in which all of them run. They make
    good a part of what attention could not, and take as many calibration tokens as they have neurons."""
    reconstruct: int = Field(default=4, ge=0)
    """With refit: how often every attention layer sees the calibration samples in a reconstruction by gradient descent,
    which also fits the queries and keys that a whole cluster uses."""
    ridge: float = Field(default=0.1, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared feature; the fewer the
    calibration samples, the stronger it should be."""

    @model_validator(mode="after")
    def _one_size(self) -> ClusterHeadsPass:
        if (self.clusters is None) == (self.ratio is None):
            raise ValueError("give either clusters or ratio")
        counts = self.clusters if isinstance(self.clusters, tuple) else (self.clusters,)
        if any(isinstance(count, int) and count < 1 for count in counts):
            raise ValueError("every layer keeps at least one cluster")
        if self.membership == "online" and self.affinity != "maps":
            raise ValueError("membership: online clusters by attention maps: set affinity: maps")
        return self

    def requires(self, view: ModelView) -> None:
        for layer in view.attention:
            refuse_compressed(layer.index, layer.layout)

    def needs(self) -> frozenset[Stat]:
        by_maps = self.affinity == "maps"
        # Maps say who is alike; how many clusters a layer gets is decided by cost all the same.
        priced = not by_maps or self.ratio is not None or self.clusters == "elbow"
        wanted = {Stat.MAP_SIMILARITY: by_maps, self._cost: priced}
        return frozenset(stat for stat, needed in wanted.items() if needed)

    @property
    def _cost(self) -> Stat:
        return Stat.REPAIRED_COST if self.refit else Stat.EXCHANGE_COST

    def recovery(self) -> Recovery:
        return Recovery.of_attention(refit=self.refit, mlp=self.refit_mlp, ridge=self.ridge, epochs=self.reconstruct)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        counts = self._counts(view, stats)
        edits: list[Edit] = []
        for layer, count in zip(view.attention, counts, strict=True):
            query = layer.layout.query
            if count == len(query):
                continue
            if self.membership == "online":
                self._refuse_bidirectional(layer)
                edits.append(ClusterOnline(layer=layer.index, count=count))
                continue
            clusters = self._cluster(layer, stats, count)
            ids = tuple(tuple(query[position] for position in cluster) for cluster in clusters)
            edits.append(ClusterHeads(layer=layer.index, clusters=ids))
        if not edits:
            raise PlanError(
                f"as many clusters as heads in every layer ({counts})",
                expected="fewer clusters than query heads in at least one layer",
                fix="lower clusters, or leave the pass out",
            )
        return EditPlan(edits=tuple(edits))

    def _refuse_bidirectional(self, layer: AttentionView) -> None:
        if not layer.family.causal:
            raise PlanError(
                f"membership: online in layer {layer.index}, where every token sees later ones",
                expected="a causal layer, whose first tokens come before the others",
                fix="set membership: static",
            )

    def _counts(self, view: ModelView, stats: HeadStats) -> list[int]:
        """Clusters of every layer."""
        heads = [len(layer.query) for layer in view.layout.attention]
        if self.ratio is not None:
            return self._spread(view, stats, sum(heads) - round(self.ratio * sum(heads)))
        if self.clusters == "elbow":
            return [elbow(self._errors(layer, stats)) for layer in view.attention]
        assert self.clusters is not None, "validated: without a ratio there are clusters"
        if isinstance(self.clusters, tuple) and len(self.clusters) != len(heads):
            raise PlanError(
                f"clusters has {len(self.clusters)} entries",
                expected=f"one per attention layer: {len(heads)}",
                fix="give one number for all layers, or one per layer",
            )
        wanted = self.clusters if isinstance(self.clusters, tuple) else (self.clusters,) * len(heads)
        return [min(want, count) for want, count in zip(wanted, heads, strict=True)]

    def _spread(self, view: ModelView, stats: HeadStats, budget: int) -> list[int]:
        """Clusters per layer, ``budget`` in all: one fewer where that adds the least error, until it is met."""
        curves = [self._errors(layer, stats) for layer in view.attention]
        counts = [len(curve) for curve in curves]
        if budget < len(counts):
            raise PlanError(
                f"ratio {self.ratio} leaves {budget} representatives for {len(counts)} layers",
                expected="at least one in every layer",
                fix="lower the ratio",
            )
        while sum(counts) > budget:
            added = {
                index: curve[count - 2] - curve[count - 1]
                for index, (curve, count) in enumerate(zip(curves, counts, strict=True))
                if count > 1
            }
            counts[min(added, key=lambda index: (added[index], index))] -= 1
        return counts

    def _errors(self, layer: AttentionView, stats: HeadStats) -> list[float]:
        """Error of 1, 2, ... N clusters: the squared change of the layer output, heads taken one by one."""
        cost = stats[self._cost][layer.index]
        found = []
        for count in range(1, len(cost) + 1):
            clusters = self._cluster(layer, stats, count)
            found.append(sum(float(cost[cluster, cluster[0]].sum()) for cluster in clusters))
        return found

    def _cluster(self, layer: AttentionView, stats: HeadStats, count: int) -> Clusters:
        if self.affinity == "maps":
            return by_similarity(stats[Stat.MAP_SIMILARITY][layer.index], count)
        return by_cost(stats[self._cost][layer.index], count)
