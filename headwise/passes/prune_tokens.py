"""Token pruning per layer and per head: queries meet the keys that matter to their head, and the rest as one."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from headwise.calibration.stats import HeadStats, Stat
from headwise.calibration.token_curves import ENDS, SHARES
from headwise.errors import PlanError
from headwise.model.edits import EditPlan, refuse_clustered
from headwise.model.limits import why_not_pruned
from headwise.model.token_budget import Rest, Score, TokenBudget
from headwise.model.token_edits import KeepTokens
from headwise.model.view import AttentionView, ModelView
from headwise.passes.base import Pass
from headwise.passes.recovery import Recovery

_ENCODER: tuple[Score, int, int, Rest] = ("pooled", 8, 0, "fuse")
_DECODER: tuple[Score, int, int, Rest] = ("window", 16, 16, "drop")
"""What score, queries, last and rest are where a recipe leaves them out."""


class PruneTokens(Pass):
    """Let every head attend to the tokens that it attends to most, a share of each sample or prompt (after PLPHP)."""

    name: ClassVar[str] = "prune-tokens"
    summary: ClassVar[str] = (
        "every head keeps its own share of the tokens, in decoders of a prompt's (PLPHP), or tokens leave on the way"
    )
    paper: ClassVar[str] = "arXiv 2502.14504"

    keep: float | tuple[float, ...] | None = None
    """Share of the tokens whose keys and values a head keeps, in a decoder of the tokens of a prompt: one for all
    layers, or one per layer; 1 leaves a layer as it is. Steps of 0.001, rounded up to whole tokens. With ``reduce:
    tokens``: the share that goes on behind each layer, or behind the last but one, reached in equal steps."""
    reduce: Literal["keys", "tokens"] = "keys"
    """What gets fewer: the keys of every layer, or the tokens themselves, so that later layers and MLPs shrink too."""
    budget: float | None = Field(default=None, gt=0, lt=1)
    """Instead of keep: the mean share over all layers, spread in eighths so that layer outputs change least."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """With a single keep: layers whose prunable tokens receive much attention keep this much more, others less."""
    alpha: float = Field(default=0.25, ge=0, le=1)
    """With delta: a layer keeps more when its prunable tokens receive at least this share of the attention."""
    beta: float = Field(default=0.1, ge=0, le=1)
    """With delta: it keeps less when they receive less than this share."""
    per: Literal["head", "layer"] = "head"
    """With ``reduce: keys``: every kv head keeps tokens of its own, or all heads of a layer the same ones."""
    score: Score | None = None
    """What a token is worth: the attention that it receives from the mean queries of a few stretches of the sample
    (``pooled``, cheap, the default in encoders), from the last queries (``window``, the default in decoders), from all
    queries (``received``, in an encoder as much work as it saves), from these in all layers so far (``accumulated``),
    or a number by chance (``random``)."""
    queries: int | None = Field(default=None, ge=1)
    """Stretches that ``pooled`` cuts a sample into, 8 by default; queries that ``window`` asks, 16 by default."""
    weighted: bool = True
    """Attention counts as often as the norm of the token's value says."""
    first: int = Field(default=1, ge=0, le=ENDS)
    """Tokens at the beginning that are always kept: the class token, and what heads look at when nothing fits."""
    last: int | None = Field(default=None, ge=0, le=ENDS)
    """Tokens at the end that are always kept, within the share: by default 0 in an encoder, 16 in a decoder."""
    rest: Rest | None = None
    """The tokens that are not kept become one mean key and value per head (``fuse``, the default in encoders), or go
    (``drop``, all that a decoder can do). With ``reduce: tokens`` they become one token, or go, or each becomes one
    with the most similar token that goes on (``merge``)."""
    refit: bool = False
    """Refit the output projections in closed form afterwards."""
    ridge: float = Field(default=0.1, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared head output."""

    @model_validator(mode="after")
    def _one_size(self) -> PruneTokens:
        if (self.keep is None) == (self.budget is None):
            raise ValueError("give either keep or budget")
        shares = self.keep if isinstance(self.keep, tuple) else (1.0 if self.keep is None else self.keep,)
        if not all(0.001 <= share <= 1 for share in shares):
            raise ValueError("keep is a share of the tokens, from 0.001 to 1")
        if self.reduce == "tokens" and {"budget", "delta", "per", "refit"} & self.model_fields_set:
            raise ValueError("budget, delta, per and refit go with reduce: keys")
        if self.reduce == "keys" and self.rest == "merge":
            raise ValueError("rest: merge goes with reduce: tokens")
        if self.delta is not None and not isinstance(self.keep, float):
            raise ValueError("delta goes with one keep for all layers")
        if self.delta is not None and self.beta > self.alpha:
            raise ValueError("beta is the lower threshold: it cannot be above alpha")
        return self

    def needs(self) -> frozenset[Stat]:
        wanted = {Stat.TOKEN_COST: self.budget is not None, Stat.END_ATTENTION: self.delta is not None}
        return frozenset(stat for stat, needed in wanted.items() if needed)

    def recovery(self) -> Recovery:
        return Recovery(fold_mean=False, refit=self.refit, ridge=self.ridge)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        for layer in view.attention:
            self._refuse(layer)
            self._refuse_other_way(layer)
            refuse_clustered(layer.index, layer.layout)
        if self.score == "accumulated":
            _refuse_branches(view, "score: accumulated", "score: received")
        if self.reduce == "tokens":
            return EditPlan(edits=tuple(self._leaving(view)))
        shares, notes = self._shares(view, stats)
        edits = [
            KeepTokens(layer=layer.index, budget=self._budget(share, layer.caches))
            for layer, share in zip(view.attention, shares, strict=True)
            if share < 1
        ]
        if not edits:
            raise PlanError(
                "every layer would keep all tokens",
                expected="a share below 1 in at least one layer",
                fix="lower keep, or leave the pass out",
            )
        return EditPlan(edits=tuple(edits), notes=notes)

    def _leaving(self, view: ModelView) -> list[KeepTokens]:
        """An edit for every layer behind which tokens leave."""
        _refuse_branches(view, "reduce: tokens", "reduce: keys")
        layers = len(view.attention)
        if isinstance(self.keep, tuple):
            shares = self._one_per_layer(self.keep, layers)
        else:
            assert self.keep is not None, "validated: without a budget there is a share"
            steps = max(layers - 1, 1)
            shares = [round(1 - (1 - self.keep) * min(i + 1, steps) / steps, 3) for i in range(layers)]
        edits, before = [], 1.0
        for index, share in enumerate(shares[:-1]):
            if share > before:
                raise PlanError(
                    f"keep grows from {before:g} to {share:g} behind layer {index}",
                    expected="at most the share of the layer before: tokens that left do not come back",
                    fix="give shares that fall from layer to layer",
                )
            if share < before:
                edits.append(KeepTokens(layer=index, budget=self._budget(share, decoder=False)))
            before = share
        if not edits:
            raise PlanError(
                "no token would leave in front of the last layer",
                expected="a share below 1 behind at least one layer but the last",
                fix="lower keep, or set reduce: keys",
            )
        return edits

    def _budget(self, share: float, decoder: bool) -> TokenBudget:
        score, queries, last, rest = _DECODER if decoder else _ENCODER
        return TokenBudget(
            keep=share,
            score=self.score or score,
            shared=self.per == "layer",
            weighted=self.weighted,
            queries=self.queries or queries,
            first=self.first,
            last=last if self.last is None else self.last,
            rest=self.rest or rest,
            stream=self.reduce == "tokens",
            prompt=decoder,
        )

    def _refuse(self, layer: AttentionView) -> None:
        """Raise PlanError for a layer whose tokens cannot be chosen, or not in this way."""
        reason = why_not_pruned(layer)
        if reason:
            raise PlanError(
                f"prune-tokens cannot be applied to layer {layer.index} ({layer.family.name})",
                expected=f"another pass, because {reason}",
                fix="leave the pass out; `headwise inspect` lists what a model cannot have done to it",
            )
        if not layer.caches:
            return
        for option, given, wanted in (
            ("reduce: tokens", self.reduce == "tokens", "keys: every token of a prompt goes through all layers"),
            ("score: pooled", self.score == "pooled", "another score: a mean of rotated queries asks for no place"),
            (f"rest: {self.rest}", self.rest not in (None, "drop"), "drop: a cache holds keys at places of their own"),
        ):
            if given:
                name = option.partition(":")[0]
                raise PlanError(f"{option} in a decoder", expected=f"{name}: {wanted}", fix=f"leave {name} out")

    def _refuse_other_way(self, layer: AttentionView) -> None:
        """Raise PlanError where tokens get fewer in the other way already: heads would not see which ones have left."""
        tokens = layer.layout.tokens
        if tokens is not None and tokens.stream != (self.reduce == "tokens"):
            raise PlanError(
                f"reduce: {self.reduce} behind an earlier prune-tokens with reduce: "
                f"{'tokens' if tokens.stream else 'keys'} (layer {layer.index})",
                expected="one way to make tokens fewer",
                fix="leave one of the two passes out",
            )

    def _shares(self, view: ModelView, stats: HeadStats) -> tuple[list[float], dict[int, str]]:
        """What every layer keeps, and why."""
        layers = len(view.attention)
        if self.budget is not None:
            return _spread(stats[Stat.TOKEN_COST], self.budget), {}
        if isinstance(self.keep, tuple):
            return self._one_per_layer(self.keep, layers), {}
        assert self.keep is not None, "validated: without a budget there is a share"
        if self.delta is None:
            return [self.keep] * layers, {}
        received = [self._prunable(ends) for ends in stats[Stat.END_ATTENTION]]
        signs = [int(share >= self.alpha) - int(share < self.beta) for share in received]
        notes = {index: f"prunable tokens receive {share:.2f} of the attention" for index, share in enumerate(received)}
        return [round(min(1.0, max(0.001, self.keep + sign * self.delta)), 3) for sign in signs], notes

    def _one_per_layer(self, shares: tuple[float, ...], layers: int) -> list[float]:
        if len(shares) != layers:
            raise PlanError(
                f"keep has {len(shares)} entries",
                expected=f"one per attention layer: {layers}",
                fix="give one share for all layers, or one per layer",
            )
        return list(shares)

    def _prunable(self, ends: torch.Tensor) -> float:
        """Share of the attention that goes to tokens which may go."""
        protected = sum(float(ends[end, count - 1]) for end, count in enumerate((self.first, self.last)) if count)
        return max(0.0, 1.0 - protected)


def _refuse_branches(view: ModelView, option: str, instead: str) -> None:
    stacks = {re.sub(r"\d+", "*", layer.path) for layer in view.attention}
    if len(stacks) > 1 or any(layer.runs > 1 for layer in view.attention):
        raise PlanError(
            f"{option} on layers of {', '.join(sorted(stacks))}",
            expected="one stack of layers, each of which runs once",
            fix=f"set {instead}",
        )


def _spread(costs: tuple[torch.Tensor, ...], budget: float) -> list[float]:
    """Shares whose mean is the budget or just below: an eighth less where that adds the least change, until it fits."""
    kept = [SHARES] * len(costs)
    while sum(kept) > budget * SHARES * len(kept):
        added = {
            layer: float(curve[left - 2] - curve[left - 1])
            for layer, (curve, left) in enumerate(zip(costs, kept, strict=True))
            if left > 1
        }
        if not added:
            raise PlanError(
                f"a budget of {budget:g}",
                expected=f"at least 1/{SHARES} of the tokens in every layer",
                fix="raise budget, or give keep",
            )
        kept[min(added, key=lambda layer: (added[layer], layer))] -= 1
    return [count / SHARES for count in kept]
