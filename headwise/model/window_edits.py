"""The edit that lets kv heads stream: their readers see the first and the nearest tokens only. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from headwise.errors import PlanError
from headwise.model.layout import AttentionLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamHeads:
    """Let the readers of some kv heads of one layer see the first and the last tokens only.

    Heads move, as whole groups: those that see all tokens come first, then the others, wide windows first.

    Attributes:
        layer: index of the attention layer.
        windows: original id of a kv head -> how many of the last tokens its readers see, their own included.
        sink: first tokens of a text that they see as well.
        bidirectional: whether they see as many of the next tokens.
    """

    type: ClassVar[str] = "stream-heads"
    layer: int
    windows: Mapping[int, int]
    sink: int
    bidirectional: bool = False

    def check(self, layout: AttentionLayout) -> None:
        """Raise PlanError unless the heads are there, have keys of their own and see at least themselves."""
        refuse_streaming(self.layer, layout)
        if layout.clustered or layout.compressed or layout.tokens is not None:
            raise PlanError(
                f"layer {self.layer} is clustered, keeps a share of the tokens, or its keys come from elsewhere",
                expected="a layer whose heads have queries, keys and values of their own, of all tokens",
                fix="put stream-heads in the place of these passes, not behind them",
            )
        unknown = sorted(set(self.windows) - set(layout.kv))
        if unknown:
            raise PlanError(
                f"layer {self.layer} has no kv head {unknown[0]}",
                expected=f"one of {list(layout.kv)}",
                fix="plan on the layout that the model has now; heads keep their original ids",
            )
        smallest = min(self.windows.values(), default=1)
        if smallest < 1 or self.sink < 0:
            raise PlanError(
                f"layer {self.layer} would have a window of {smallest} tokens and {self.sink} first tokens",
                expected="a window of at least 1 token, which is the query's own, and no negative number",
                fix="raise recent or sink",
            )

    def apply(self, layout: AttentionLayout) -> AttentionLayout:
        if not self.windows:
            return layout
        # A window of 0 is none.
        kv = sorted(layout.kv, key=lambda head: (head in self.windows, -self.windows.get(head, 0)))
        readers = dict(zip(layout.kv, layout.units(), strict=True))
        return replace(
            layout,
            query=tuple(head for own in kv for head in readers[own]),
            kv=tuple(kv),
            windows=tuple(self.windows.get(head, 0) for head in kv),
            sink=self.sink,
            bidirectional=self.bidirectional,
        )

    def to_json(self) -> dict[str, Any]:
        windows = {str(head): window for head, window in self.windows.items()}
        both = {"bidirectional": True} if self.bidirectional else {}
        return {"type": self.type, "layer": self.layer, "windows": windows, "sink": self.sink, **both}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamHeads:
        windows = {int(head): int(window) for head, window in data["windows"].items()}
        both = bool(data.get("bidirectional", False))
        return cls(layer=int(data["layer"]), windows=windows, sink=int(data["sink"]), bidirectional=both)


def refuse_streaming(layer: int, layout: AttentionLayout) -> None:
    """Raise PlanError for a layer whose heads stream."""
    if layout.streaming:
        raise PlanError(
            f"heads of layer {layer} stream already",
            expected="a layer whose heads all see all tokens",
            fix="put stream-heads behind the other attention passes of the recipe, once",
        )
