"""The edits that change a layout, and the plans that hold them. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

from headwise.errors import PlanError
from headwise.model.latent_edits import LatentKV, ShareLayers, refuse_compressed
from headwise.model.layout import AttentionLayout, Layout, MlpLayout, from_ranges, ranges
from headwise.model.token_edits import KeepTokens
from headwise.model.window_edits import StreamHeads, refuse_streaming


@dataclass(frozen=True, slots=True, kw_only=True)
class DropHeads:
    """Remove query heads of one layer, and the kv heads that nobody reads afterwards.

    Attributes:
        layer: index of the attention layer.
        query: original ids of the query heads to remove.
    """

    type: ClassVar[str] = "drop-heads"
    layer: int
    query: tuple[int, ...]

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless the edit leaves a layer that can run."""
        refuse_clustered(self.layer, layout)
        unknown = sorted(set(self.query) - set(layout.query))
        if unknown:
            raise PlanError(
                f"layer {self.layer} has no query head {unknown[0]}",
                expected=f"one of {list(layout.query)}",
                fix="plan on the layout that the model has now; heads keep their original ids",
            )
        if len(set(self.query)) == len(layout.query):
            raise PlanError(
                f"layer {self.layer} would keep 0 of {len(layout.query)} query heads",
                expected="at least 1 head in every layer",
                fix="lower the ratio, or set scope: layer so that every layer gives the same share",
            )
        gone = set(self.query)
        left = {len(set(unit) - gone) for unit in layout.units()} - {0}
        if len(left) > 1:
            raise PlanError(
                f"layer {self.layer} would keep groups of {sorted(left)} query heads per kv head",
                expected="the same number of query heads for every kv head that stays",
                fix="remove whole kv groups, or the same number of query heads from every group",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        return layout.without(self.query)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "query": list(self.query)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DropHeads:
        return cls(layer=int(data["layer"]), query=tuple(data["query"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareKV:
    """Let several kv heads of one layer become one, which keeps the id of the first; query heads stay, regrouped.

    Attributes:
        layer: index of the attention layer.
        groups: original ids of the kv heads that become one, in the storage order of the new heads.
    """

    type: ClassVar[str] = "share-kv"
    layer: int
    groups: tuple[tuple[int, ...], ...]

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless every kv head is in one group and all groups have equally many."""
        refuse_clustered(self.layer, layout)
        members = [head for group in self.groups for head in group]
        if sorted(members) != sorted(layout.kv):
            raise PlanError(
                f"layer {self.layer} has kv heads {list(layout.kv)}, the groups hold {members}",
                expected="every kv head in exactly one group",
                fix="plan on the layout that the model has now; heads keep their original ids",
            )
        sizes = sorted({len(group) for group in self.groups})
        if len(sizes) > 1:
            raise PlanError(
                f"layer {self.layer} would have groups of {sizes} kv heads",
                expected="equally many in every group, so that every shared head serves equally many query heads",
                fix=f"choose a number of kv heads that divides {len(layout.kv)}",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        readers = dict(zip(layout.kv, layout.units(), strict=True))
        query = tuple(head for group in self.groups for kv in group for head in readers[kv])
        return replace(layout, query=query, kv=tuple(group[0] for group in self.groups))

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "groups": [list(group) for group in self.groups]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShareKV:
        return cls(layer=int(data["layer"]), groups=tuple(tuple(group) for group in data["groups"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterHeads:
    """Let query heads of one layer use the attention weights of a representative; values and output stay.

    Attributes:
        layer: index of the attention layer.
        clusters: original ids of the query heads of every cluster, its representative first.
    """

    type: ClassVar[str] = "cluster-heads"
    layer: int
    clusters: tuple[tuple[int, ...], ...]

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless every query head is in exactly one cluster."""
        refuse_clustered(self.layer, layout)
        members = [head for cluster in self.clusters for head in cluster]
        if sorted(members) != sorted(layout.query):
            raise PlanError(
                f"layer {self.layer} has query heads {list(layout.query)}, the clusters hold {members}",
                expected="every query head in exactly one cluster",
                fix="plan on the layout that the model has now; heads keep their original ids",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        representative = {head: cluster[0] for cluster in self.clusters for head in cluster}
        if all(head == used for head, used in representative.items()):
            return layout
        return replace(layout, represented=tuple(representative[head] for head in layout.query))

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "clusters": [list(cluster) for cluster in self.clusters]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClusterHeads:
        return cls(layer=int(data["layer"]), clusters=tuple(tuple(cluster) for cluster in data["clusters"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOnline:
    """Let every sample cluster the query heads of one layer by its first tokens; queries, keys and values stay.

    Attributes:
        layer: index of the attention layer.
        count: number of clusters.
    """

    type: ClassVar[str] = "cluster-online"
    layer: int
    count: int

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless there are as many heads."""
        refuse_clustered(self.layer, layout)
        if not 1 <= self.count <= len(layout.query):
            raise PlanError(
                f"{self.count} clusters for the {len(layout.query)} query heads of layer {self.layer}",
                expected=f"1 to {len(layout.query)}",
                fix="plan on the layout that the model has now",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        return layout if self.count == len(layout.query) else replace(layout, online=self.count)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "count": self.count}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClusterOnline:
        return cls(layer=int(data["layer"]), count=int(data["count"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class DropNeurons:
    """Remove neurons of one MLP.

    Attributes:
        layer: index of the MLP.
        neurons: original ids of the neurons to remove.
    """

    type: ClassVar[str] = "drop-neurons"
    layer: int
    neurons: tuple[int, ...]

    def check(self, layout: MlpLayout) -> None:
        """Raise PlanError unless the edit leaves an MLP that can run."""
        unknown = sorted(set(self.neurons) - set(layout.neurons))
        if unknown:
            raise PlanError(
                f"MLP {self.layer} has no neuron {unknown[0]}",
                expected=f"one of {ranges(layout.neurons)}",
                fix="plan on the layout that the model has now; neurons keep their original ids",
            )
        if len(set(self.neurons)) == len(layout.neurons):
            raise PlanError(
                f"MLP {self.layer} would keep 0 of {len(layout.neurons)} neurons",
                expected="at least 1 neuron in every MLP",
                fix="lower the ratio, or set scope: layer so that every layer gives the same share",
            )

    def apply(self, layout: MlpLayout) -> MlpLayout:
        return layout.without(self.neurons)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "neurons": ranges(self.neurons)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DropNeurons:
        return cls(layer=int(data["layer"]), neurons=from_ranges(data["neurons"]))


def refuse_clustered(layer: int, layout: AttentionLayout) -> None:
    """Raise PlanError for a layer in which not every head has queries, keys and values of its own."""
    refuse_compressed(layer, layout)
    refuse_streaming(layer, layout)
    if layout.clustered:
        raise PlanError(
            f"the heads of layer {layer} are clustered already",
            expected="a layer whose heads have queries and keys of their own",
            fix="put cluster-heads behind the other attention passes of the recipe, once",
        )


Edit = (
    DropHeads | ShareKV | ClusterHeads | ClusterOnline | LatentKV | ShareLayers | StreamHeads | KeepTokens | DropNeurons
)
EDITS: Mapping[str, type[Edit]] = {cls.type: cls for cls in get_args(Edit)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The numbers that a decision rests on.

    Attributes:
        name: the score's name, as in a recipe.
        layers: per layer, original query head id -> score; higher is more important.
    """

    name: str
    layers: tuple[Mapping[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layers": [{str(head): value for head, value in layer.items()} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        layers = tuple({int(head): float(value) for head, value in layer.items()} for layer in data["layers"])
        return cls(name=data["name"], layers=layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditPlan:
    """What a pass wants to change, and why. Survives a round trip through JSON unchanged.

    Attributes:
        edits: in the order in which they are made.
        scores: the numbers that the decision rests on.
        notes: layer -> what there is to know about its edit, or why it has none, in words; ``mlp_notes``: of MLPs.
        summary: what there is to know about the plan as a whole; empty where the edits say it all.
    """

    edits: tuple[Edit, ...]
    scores: Scores | None = field(default=None)
    notes: Mapping[int, str] = field(default_factory=dict)
    mlp_notes: Mapping[int, str] = field(default_factory=dict)
    summary: str = ""

    def check(self, layout: Layout) -> None:
        """Raise PlanError, naming the layer, unless every edit can be made in this order."""
        self._walk(layout, check=True)

    def predict(self, layout: Layout) -> Layout:
        """The layout after the edits, without a model. Surgery must land exactly here."""
        return self._walk(layout, check=False)

    def _walk(self, layout: Layout, *, check: bool) -> Layout:
        attention, mlp = list(layout.attention), list(layout.mlp)
        for edit in self.edits:
            layers: list[Any] = mlp if isinstance(edit, DropNeurons) else attention
            if not 0 <= edit.layer < len(layers):
                what = "MLP" if isinstance(edit, DropNeurons) else "layer"
                raise PlanError(
                    f"the plan edits {what} {edit.layer}",
                    expected=f"one from 0 to {len(layers) - 1}",
                    fix="plan on this model, not on another one",
                )
            if check:
                edit.check(layers[edit.layer])
            layers[edit.layer] = edit.apply(layers[edit.layer])
        return replace(layout, attention=tuple(attention), mlp=tuple(mlp))

    def to_json(self) -> dict[str, Any]:
        scores = None if self.scores is None else self.scores.to_json()
        return {
            "edits": [edit.to_json() for edit in self.edits],
            "scores": scores,
            "notes": {str(layer): note for layer, note in self.notes.items()},
            "mlp_notes": {str(layer): note for layer, note in self.mlp_notes.items()},
            "summary": self.summary,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EditPlan:
        edits = tuple(EDITS[edit["type"]].from_json(edit) for edit in data["edits"])
        scores = None if data.get("scores") is None else Scores.from_json(data["scores"])
        notes, mlp_notes = (
            {int(layer): note for layer, note in data.get(name, {}).items()} for name in ("notes", "mlp_notes")
        )
        return cls(edits=edits, scores=scores, notes=notes, mlp_notes=mlp_notes, summary=data.get("summary", ""))
