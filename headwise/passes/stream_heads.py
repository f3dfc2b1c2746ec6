"""Heads that stream: they see the first and the last tokens only, and their cache does not grow."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from headwise.calibration.stats import HeadStats, Stat
from headwise.calibration.streaming import GateTraining, Span
from headwise.errors import PlanError
from headwise.model.edits import EditPlan, refuse_clustered
from headwise.model.limits import why_not_streaming
from headwise.model.view import ModelView
from headwise.model.window_edits import StreamHeads
from headwise.passes import scores as importance
from headwise.passes.base import Pass
from headwise.passes.recovery import Recovery

Head = tuple[int, int]
"""Index of a layer, and original id of one of its kv heads."""
Score = list[float]
"""What ranks a head, and what ranks it among heads that are equal in that."""


class StreamHeadsPass(Pass):
    """Let the kv heads that need it least see the first and the last tokens only; in an encoder, a band."""

    name: ClassVar[str] = "stream-heads"
    summary: ClassVar[str] = (
        "some kv heads see the first and the nearest tokens only: bounded caches, bands in encoders"
    )
    paper: ClassVar[str] = "arXiv 2410.10819, 2501.01039, 2004.05150"

    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the kv heads of all layers that stream: those with the lowest scores."""
    heads: tuple[tuple[int, ...], ...] | None = None
    """Instead of ratio: per layer the ids of the kv heads that stream."""
    sink: int = Field(default=64, ge=0)
    """First tokens of a text that a streaming head sees."""
    recent: int | tuple[int, ...] = 256
    """Last tokens that a streaming head sees, its query's own included; in an encoder as many next ones, too. Several
    numbers: equal parts of the streaming heads get one each, heads with lower scores smaller ones."""
    score: Literal["statistic", "gates", "random"] = "statistic"
    """How much a kv head needs all tokens: ``statistic``, how much the layer output changes on calibration text when
    its readers stream; ``gates`` between full and streaming attention, trained on calibration text with the model
    frozen (equal gates go by the statistic); ``random``."""
    steps: int = Field(default=100, ge=1)
    """Training steps of the gates, one batch each."""
    penalty: float = Field(default=0.05, gt=0)
    """Pull of the gates towards streaming, beside the relative squared change of the final hidden states."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    ridge: float = Field(default=0.1, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared head output."""
    seed: int = 0
    """Seed of the ``random`` score."""

    @model_validator(mode="after")
    def _fits_together(self) -> StreamHeadsPass:
        if (self.ratio is None) == (self.heads is None):
            raise ValueError("give either ratio or heads")
        if not self._windows or min(self._windows) < 1:
            raise ValueError("recent: at least one number, each 1 or more: a token sees itself")
        return self

    @property
    def _windows(self) -> tuple[int, ...]:
        """Distinct windows, smallest first."""
        return (self.recent,) if isinstance(self.recent, int) else tuple(sorted(set(self.recent)))

    @property
    def _scored(self) -> bool:
        """Whether heads are ranked by what calibration says."""
        return self.score != "random" and (self.heads is None or len(self._windows) > 1)

    def needs(self) -> frozenset[Stat]:
        wanted = {Stat.WINDOW_COST: self._scored, Stat.STREAM_GATES: self._scored and self.score == "gates"}
        return frozenset(stat for stat, needed in wanted.items() if needed)

    def span(self, view: ModelView) -> Span:
        _refuse_fixed(view)
        training = GateTraining(steps=self.steps, penalty=self.penalty) if self.score == "gates" else None
        return Span(sink=self.sink, recent=self._windows[0], training=training)

    def recovery(self) -> Recovery:
        return Recovery(fold_mean=False, refit=self.refit, ridge=self.ridge)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        _refuse_fixed(view)
        scores = self._scores(view, stats)
        chosen = self._given(view) if self.ratio is None else self._lowest(scores, self.ratio)
        ranked = sorted(chosen, key=lambda head: (scores[head], head))
        # Equal parts, and one more for the smaller windows where they do not come out even.
        windows = {head: self._windows[i * len(self._windows) // len(ranked)] for i, head in enumerate(ranked)}
        edits = []
        for layer in view.attention:
            mine = {head: windows[layer.index, head] for head in layer.layout.kv if (layer.index, head) in windows}
            if mine:
                both = layer.family.bidirectional
                edits.append(StreamHeads(layer=layer.index, windows=mine, sink=self.sink, bidirectional=both))
        notes = {layer.index: self._note(layer.index, scores) for layer in view.attention} if self._scored else {}
        return EditPlan(edits=tuple(edits), notes=notes)

    def _scores(self, view: ModelView, stats: HeadStats) -> dict[Head, Score]:
        """How much every kv head needs all tokens; where that is the same, the second number decides."""
        if not self._scored:
            generator = torch.Generator().manual_seed(self.seed)
            costs = first = [importance.random(len(layer.layout.kv), generator) for layer in view.attention]
        else:
            costs = list(stats[Stat.WINDOW_COST])
            first = list(stats[Stat.STREAM_GATES]) if self.score == "gates" else costs
            if not any(bool(layer.any()) for layer in costs):
                raise PlanError(
                    "no head loses anything by a window on the calibration data",
                    expected=f"samples with more than sink + recent = {self.sink + self._windows[0]} tokens",
                    fix="give longer texts, raise task.max_length, or lower sink and recent",
                )
        return {
            (layer.index, head): pair
            for layer, *values in zip(view.attention, first, costs, strict=True)
            for head, *pair in zip(layer.layout.kv, *(tensor.tolist() for tensor in values), strict=True)
        }

    def _lowest(self, scores: dict[Head, Score], ratio: float) -> list[Head]:
        """The heads below the quantile that ``ratio`` is."""
        count = round(ratio * len(scores))
        if not 0 < count < len(scores):
            raise PlanError(
                f"ratio {ratio} of {len(scores)} kv heads lets {count} stream",
                expected="at least one head that streams, and one that sees all tokens",
                fix="raise the ratio" if count == 0 else "lower the ratio",
            )
        return sorted(scores, key=lambda head: (scores[head], head))[:count]

    def _given(self, view: ModelView) -> list[Head]:
        """The heads that the recipe names."""
        lists = self.heads or ()
        known = {(layer.index, head) for layer in view.attention for head in layer.layout.kv}
        chosen = [(layer, head) for layer, heads in enumerate(lists) for head in heads]
        if len(lists) != len(view.attention) or not set(chosen) <= known or len(chosen) != len(set(chosen)):
            raise PlanError(
                f"heads names {[list(heads) for heads in lists]}",
                expected=f"for each of {len(view.attention)} layers a list of some of its kv heads, each once: "
                f"{[list(layer.layout.kv) for layer in view.attention]}",
                fix="number kv heads by their original ids, and write [] for a layer without streaming heads",
            )
        # Encoders have no cache that needs a head with all tokens.
        most = len(known) - any(layer.caches for layer in view.attention)
        if not 0 < len(chosen) <= most:
            raise PlanError(
                f"heads lets {len(chosen)} of {len(known)} kv heads stream",
                expected="at least one head that streams, and in a decoder one that sees all tokens",
                fix="change heads, or leave the pass out",
            )
        return chosen

    def _note(self, layer: int, scores: dict[Head, Score]) -> str:
        listed = ", ".join(f"{head}: {value[0]:.3g}" for (own, head), value in scores.items() if own == layer)
        return f"{self.score} of kv heads {listed}"


def _refuse_fixed(view: ModelView) -> None:
    """Raise PlanError where a layer cannot have heads that stream."""
    for layer in view.attention:
        refuse_clustered(layer.index, layer.layout)
        reason = why_not_streaming(layer)
        if reason:
            raise PlanError(
                f"stream-heads cannot be applied to layer {layer.index} ({layer.family.name})",
                expected=f"another pass, because {reason}",
                fix="leave the pass out; `headwise inspect` lists what a model cannot have done to it",
            )
