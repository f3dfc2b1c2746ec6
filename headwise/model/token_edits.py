"""The edit that gives an attention layer a budget of tokens. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from headwise.errors import PlanError
from headwise.model.latent_edits import refuse_compressed
from headwise.model.layout import AttentionLayout
from headwise.model.token_budget import TokenBudget
from headwise.model.window_edits import refuse_streaming


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepTokens:
    """Let every kv head of one layer keep a share of the tokens; no weight changes.

    Attributes:
        layer: index of the attention layer.
        budget: how many tokens, and which ones.
    """

    type: ClassVar[str] = "keep-tokens"
    layer: int
    budget: TokenBudget

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless every head has queries, keys and values of its own and sees all tokens."""
        refuse_compressed(self.layer, layout)
        refuse_streaming(self.layer, layout)
        if layout.clustered:
            raise PlanError(
                f"the heads of layer {self.layer} are clustered",
                expected="heads that have queries and keys of their own, by which they choose tokens",
                fix="leave out cluster-heads or prune-tokens",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        return layout if self.budget.keep >= 1 else replace(layout, tokens=self.budget)

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "layer": self.layer, "budget": self.budget.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeepTokens:
        return cls(layer=int(data["layer"]), budget=TokenBudget.from_json(data["budget"]))
