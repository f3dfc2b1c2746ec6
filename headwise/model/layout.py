"""Which heads and neurons every layer has, and the edits that change it. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from headwise.errors import PlanError
from headwise.model.neurons import DropNeurons, MlpLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """The heads of one attention layer, by their ids in the original checkpoint.

    Heads are listed in storage order. Query heads are grouped: with ``n`` query and ``k`` kv heads, the query head at
    position ``i`` reads the kv head at position ``i // (n // k)`` (multi-head attention is ``n == k``, grouped-query
    attention ``n > k``, multi-query attention ``k == 1``).

    Attributes:
        query: original ids of the query heads that are left.
        kv: original ids of the key/value heads that are left.
        head_dim: width of one head.
    """

    query: tuple[int, ...]
    kv: tuple[int, ...]
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return len(self.query) // len(self.kv)

    @property
    def kv_width(self) -> int:
        """Numbers that a kv cache holds for one token of this layer."""
        return 2 * len(self.kv) * self.head_dim

    def units(self) -> tuple[tuple[int, ...], ...]:
        """The smallest sets of query heads that can go: single heads (MHA) or all readers of a kv head (GQA)."""
        size = self.group
        return tuple(self.query[start : start + size] for start in range(0, len(self.query), size))

    def without(self, query: Sequence[int]) -> AttentionLayout:
        """The layout after removing these query heads; a kv head that nobody reads any more goes too."""
        gone = set(query)
        size = self.group
        kept_query = tuple(head for head in self.query if head not in gone)
        readers = [self.query[i * size : (i + 1) * size] for i in range(len(self.kv))]
        kept_kv = tuple(kv for kv, heads in zip(self.kv, readers, strict=True) if not gone.issuperset(heads))
        return replace(self, query=kept_query, kv=kept_kv)

    def to_json(self) -> dict[str, Any]:
        return {"query": list(self.query), "kv": list(self.kv), "head_dim": self.head_dim}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionLayout:
        return cls(query=tuple(data["query"]), kv=tuple(data["kv"]), head_dim=int(data["head_dim"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What every layer of a model has left.

    Attributes:
        attention: one entry per attention layer, in the order of ``ModelView.attention``.
        mlp: one entry per MLP, in the order of ``ModelView.mlp``.
    """

    attention: tuple[AttentionLayout, ...]
    mlp: tuple[MlpLayout, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "attention": [layer.to_json() for layer in self.attention],
            "mlp": [layer.to_json() for layer in self.mlp],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Layout:
        """What ``to_json`` wrote, or the bare list of attention layers that version 0.1.0 saved."""
        if not isinstance(data, Mapping):
            data = {"attention": data, "mlp": ()}
        return cls(
            attention=tuple(AttentionLayout.from_json(entry) for entry in data["attention"]),
            mlp=tuple(MlpLayout.from_json(entry) for entry in data["mlp"]),
        )


def uniform(layers: Sequence[AttentionLayout]) -> bool:
    """Whether all attention layers have the same head counts and widths."""
    return len({(len(layer.query), len(layer.kv), layer.head_dim) for layer in layers}) <= 1


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


Edit = DropHeads | ShareKV | DropNeurons
EDITS: Mapping[str, type[Edit]] = {cls.type: cls for cls in (DropHeads, ShareKV, DropNeurons)}


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
    """What a pass wants to change, and why. Survives a round trip through JSON unchanged."""

    edits: tuple[Edit, ...]
    scores: Scores | None = field(default=None)

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
        return Layout(attention=tuple(attention), mlp=tuple(mlp))

    def to_json(self) -> dict[str, Any]:
        scores = None if self.scores is None else self.scores.to_json()
        return {"edits": [edit.to_json() for edit in self.edits], "scores": scores}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EditPlan:
        edits = tuple(EDITS[edit["type"]].from_json(edit) for edit in data["edits"])
        scores = None if data.get("scores") is None else Scores.from_json(data["scores"])
        return cls(edits=edits, scores=scores)
