"""The edits that let keys and values come from a latent, or from another layer. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from headwise.errors import PlanError
from headwise.model.layout import AttentionLayout
from headwise.model.window_edits import refuse_streaming


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentKV:
    """Compute keys and values of one layer from a latent of ``rank`` numbers per token; heads stay as they are.

    Attributes:
        layer: index of the attention layer.
        rank: numbers per token. As many as the layer's input has are that input itself.
        rotary, rotary_heads, unrotated: of a layer with a kv cache, see ``AttentionLayout``.
    """

    type: ClassVar[str] = "latent-kv"
    layer: int
    rank: int
    rotary: int = 0
    rotary_heads: int = 1
    unrotated: int = 0

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless the rank is one and the heads have keys and values of their own."""
        _refuse(self.layer, layout)
        if self.rank < 1:
            raise PlanError(
                f"layer {self.layer} would have a latent of {self.rank} numbers",
                expected="at least 1",
                fix="raise the rank or the budget",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        return replace(
            layout,
            latent=self.rank,
            rotary=self.rotary,
            rotary_heads=self.rotary_heads,
            unrotated=self.unrotated,
        )

    def to_json(self) -> dict[str, Any]:
        names = ("rank", "rotary", "rotary_heads", "unrotated") if self.unrotated or self.rotary else ("rank",)
        return {"type": self.type, "layer": self.layer, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatentKV:
        return cls(**{name: int(value) for name, value in data.items() if name != "type"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareLayers:
    """Let one layer read what an earlier layer, the owner, computed for keys and values.

    Attributes:
        layer: index of the attention layer that loses its own.
        owner: index of the layer that is read.
        rank: numbers of the owner's latent, from which this layer computes keys and values of its own; 0 where it
            takes the owner's keys and values as they are.
        unrotated: of a layer with a kv cache that reads a latent, see ``AttentionLayout``.
    """

    type: ClassVar[str] = "share-layers"
    layer: int
    owner: int
    rank: int
    unrotated: int = 0

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless the owner comes first and the heads have keys and values of their own."""
        _refuse(self.layer, layout)
        if not 0 <= self.owner < self.layer:
            raise PlanError(
                f"layer {self.layer} would read from layer {self.owner}",
                expected="an earlier layer",
                fix="let owners come before the layers that read them",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        return replace(layout, latent=self.rank, owner=self.owner, unrotated=self.unrotated)

    def to_json(self) -> dict[str, Any]:
        names = ("owner", "rank", "unrotated") if self.unrotated else ("owner", "rank")
        return {"type": self.type, "layer": self.layer, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShareLayers:
        return cls(**{name: int(value) for name, value in data.items() if name != "type"})


def _refuse(layer: int, layout: AttentionLayout) -> None:
    refuse_compressed(layer, layout)
    refuse_streaming(layer, layout)
    if layout.clustered:
        raise PlanError(
            f"the heads of layer {layer} are clustered already",
            expected="a layer whose heads have keys of their own",
            fix="put latent-kv and share-layers in the place of cluster-heads, not behind it",
        )


def refuse_compressed(layer: int, layout: AttentionLayout) -> None:
    """Raise PlanError for a layer whose keys and values come from a latent, from another layer, or of some tokens."""
    if layout.tokens is not None:
        raise PlanError(
            f"the heads of layer {layer} keep {layout.tokens.keep:g} of the tokens already",
            expected="a layer that attends to all tokens",
            fix="put prune-tokens behind the other attention passes of the recipe, once",
        )
    if layout.compressed:
        raise PlanError(
            f"keys and values of layer {layer} come from a latent or from another layer already",
            expected="a layer whose heads have keys and values of their own",
            fix="put latent-kv and share-layers behind the other attention passes of the recipe, once",
        )
