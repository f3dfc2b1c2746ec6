"""Convert attention to multi-head latent attention: keys and values of all heads from one small latent per token."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from headwise.calibration.latent import spread_rank
from headwise.calibration.rotary import RotaryParts
from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.edits import EditPlan, refuse_clustered
from headwise.model.latent import latent_cost
from headwise.model.latent_edits import LatentKV
from headwise.model.latent_surgery import LatentWeights
from headwise.model.latent_swap import RotaryLatent
from headwise.model.surgery import Payloads
from headwise.model.view import AttentionView, ModelView
from headwise.passes.base import Pass
from headwise.passes.latent_rotary import (
    RotarySplit,
    refuse_cached,
    refuse_turned,
    rest_reader,
    rotary_latent,
    turned_latent,
    turned_reader,
)
from headwise.passes.latent_weights import LatentProblem, Reader
from headwise.passes.recovery import Recovery


class LatentKVPass(Pass):
    """Compute keys and values of all heads of a layer from one latent (MLA); the heads themselves stay."""

    name: ClassVar[str] = "latent-kv"
    summary: ClassVar[str] = "keys and values of all heads from one small latent per token (MHA or GQA to MLA)"
    paper: ClassVar[str] = "arXiv 2502.07864, 2603.17946, 2407.21118"

    rank: int | tuple[int, ...] | None = None
    """Numbers per token of the latent: one for all layers, or one per layer. A layer in which a latent of this size
    would lose nothing takes no more than it needs."""
    energy: float | None = Field(default=None, gt=0, lt=1)
    """Instead of rank: every layer takes the smallest latent that keeps this share of its keys and values."""
    budget: float | None = Field(default=None, gt=0, lt=1)
    """Instead of rank: latents of all layers together have this share of the numbers that keys and values have, spread
    to where one more number gains most."""
    round_to: int = Field(default=1, ge=1)
    """Ranks by energy or budget are multiples of this, at sizes that kernels like; 8 is a good choice. A layer whose
    largest useful rank is no multiple may keep that."""
    method: Literal["outputs", "weights"] = "outputs"
    """What the latent keeps: the principal components of keys and values on calibration data, or of their weights."""
    weighted: bool = True
    """Weight errors of keys and values by what queries and output projection make of them."""
    balanced: bool = True
    """Give keys and values the same say, whatever their sizes."""
    route: Literal["merge", "heads", "rebuild"] = "merge"
    """Of decoders with rotary positions: ``merge`` keeps one rotary key for all heads, in a basis of principal
    components over heads (TransMLA); ``heads`` keeps pairs of coordinates of every head (MHA2MLA). ``rebuild`` has no
    rotary key: keys of all heads come from the latent and are rotated then (Palu), the most accurate for its bytes,
    but nothing can be absorbed."""
    rotary: int | None = Field(default=None, ge=2)
    """Numbers per token of the rotary keys of a layer; without it as many as one head has, or 2 for every head."""
    fold: int = Field(default=1, ge=1)
    """Neighbouring frequencies that share components under ``route: merge`` (FreqFold); above 1 it is approximate."""
    basis: Literal["complex", "real"] = "complex"
    """How ``route: merge`` mixes heads: with complex numbers, which can turn them against each other, or with real
    ones, as the paper does."""
    select: Literal["change", "norm"] = "change"
    """What makes a component worth its rotation: how much of the scores rotation changes over ``distance`` tokens, or
    its share in the scores."""
    frequencies: Literal["best", "every"] = "best"
    """Which frequencies the rotary keys have: those of the components that are worth most, or each equally often, as
    the layout of DeepSeek-V3 asks for."""
    distance: int = Field(default=256, ge=2)
    """Tokens of a typical sequence, for ``select: change``."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    refit_mlp: bool = False
    """With refit: the down projections of the MLPs behind them too, in the order in which all of them run. They make
    good a part of what attention could not, the more the less is kept; this takes as many calibration tokens as an MLP
    has neurons, and several times as long."""
    ridge: float = Field(default=0.1, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared feature."""
    reconstruct: int = Field(default=0, ge=0)
    """With refit: how often every attention layer sees the calibration samples in a reconstruction by gradient descent,
    which also fits queries and keys."""

    @model_validator(mode="after")
    def _one_size(self) -> LatentKVPass:
        if sum(given is not None for given in (self.rank, self.energy, self.budget)) != 1:
            raise ValueError("give one of rank, energy and budget")
        if self.rank is not None and self.round_to > 1:
            raise ValueError("rank says the numbers themselves, round_to is for energy and budget")
        if self.route == "rebuild" and self.rotary is not None:
            raise ValueError("route: rebuild has no rotary keys beside the latent")
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        if any(rank is not None and rank < 1 for rank in ranks):
            raise ValueError("a latent has at least one number per token")
        return self

    def requires(self, view: ModelView) -> None:
        for layer in view.attention:
            refuse_clustered(layer.index, layer.layout)
            if layer.caches:
                refuse_turned(layer) if self.route == "rebuild" else refuse_cached(layer)

    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat.INPUT_MOMENT, Stat.QUERY_MOMENT})

    def recovery(self) -> Recovery:
        return Recovery.of_attention(refit=self.refit, mlp=self.refit_mlp, ridge=self.ridge, epochs=self.reconstruct)

    def by_layer(self, view: ModelView) -> tuple[Pass | None, ...]:
        if self.budget is not None:
            raise PlanError(
                "latent-kv: a budget is spread over all layers together",
                expected="rank or energy, by which every layer gets its latent without knowing the others",
                fix="set rank to one number, or to one per layer: `headwise plan` shows those of a budget",
            )
        layers = len(view.attention)
        ranks = self._wanted(layers) if self.rank is not None else [None] * layers
        return tuple(self.model_copy(update={"rank": rank}) for rank in ranks)

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        solved = [self._problem(view, layer, stats) for layer in view.attention]
        problems = [problem for problem, _ in solved]
        ranks = self._ranks(view, problems, sum(0 if p is None else p.rotary.shape[:2].numel() for _, p in solved))
        edits, notes = [], {}
        for layer, (problem, parts), rank in zip(view.attention, solved, ranks, strict=True):
            rotary: dict[str, int] = {}
            if parts is not None:
                heads, width, _ = parts.rotary.shape
                plain = parts.rest.shape[1]
                rotary = {"rotary": heads * width, "rotary_heads": heads, "unrotated": plain}
            elif layer.caches:
                rotary = {"unrotated": layer.layout.head_dim}
            edits.append(LatentKV(layer=layer.index, rank=rank, **rotary))
            notes[layer.index] = describe_latent(layer, problem, rank)
        return EditPlan(edits=tuple(edits), notes=notes)

    def payloads(self, view: ModelView, stats: HeadStats, plan: EditPlan) -> Payloads:
        found: dict[int, LatentWeights | RotaryLatent] = {}
        for position, edit in enumerate(plan.edits):
            if isinstance(edit, LatentKV):
                layer = view.attention[edit.layer]
                problem, parts = self._problem(view, layer, stats)
                (weights,) = problem.solve(edit.rank)
                if parts is not None:
                    found[position] = rotary_latent(layer, parts, weights)
                else:
                    found[position] = turned_latent(view, layer, weights) if layer.caches else weights
        return found

    def _problem(
        self, view: ModelView, layer: AttentionView, stats: HeadStats
    ) -> tuple[LatentProblem, RotaryParts | None]:
        """The latents of a layer, and of a layer with a kv cache what stays beside them."""
        parts = None if not layer.caches or self.route == "rebuild" else self._split().parts(view, layer, stats)
        if parts is not None:
            reader = rest_reader(layer, stats, parts)
        else:
            reader = Reader.of(layer, stats)
            reader = turned_reader(reader) if layer.caches else reader
        moment, data = stats[Stat.INPUT_MOMENT][layer.index], self.method == "outputs"
        return LatentProblem.of([reader], moment, data=data, weighted=self.weighted, balanced=self.balanced), parts

    def _split(self) -> RotarySplit:
        return RotarySplit(
            merged=self.route == "merge",
            numbers=self.rotary,
            fold=self.fold,
            basis=self.basis,
            select=self.select,
            distance=self.distance,
            every=self.frequencies == "every",
        )

    def _ranks(self, view: ModelView, problems: list[LatentProblem], rotary: int) -> list[int]:
        """Numbers per latent; ``rotary`` numbers of all layers are taken already."""
        full = [problem.full for problem in problems]
        if self.energy is not None:
            found = [p.latent.rank_for(self.energy) for p in problems]
            return [min(-(-r // self.round_to) * self.round_to, limit) for r, limit in zip(found, full, strict=True)]
        if self.budget is not None:
            numbers = round(self.budget * sum(layer.kv_width for layer in view.layout.attention)) - rotary
            if numbers < sum(min(self.round_to, limit) for limit in full):
                raise PlanError(
                    f"budget {self.budget} leaves {numbers} numbers per token for {len(problems)} latents",
                    expected="at least one in every layer" if self.round_to == 1 else f"{self.round_to} in every layer",
                    fix="raise the budget, or lower rotary" + ("" if self.round_to == 1 else " or round_to"),
                )
            return spread_rank([problem.latent.energy for problem in problems], numbers, full, self.round_to)
        return [min(rank, limit) for rank, limit in zip(self._wanted(len(problems)), full, strict=True)]

    def _wanted(self, layers: int) -> tuple[int, ...]:
        """The rank that was asked for, per layer."""
        assert self.rank is not None, "validated: one of the three is given"
        wanted = self.rank if isinstance(self.rank, tuple) else (self.rank,) * layers
        if len(wanted) != layers:
            raise PlanError(
                f"rank has {len(wanted)} entries",
                expected=f"one per attention layer: {layers}",
                fix="give one number for all layers, or one per layer",
            )
        return wanted


def describe_latent(layer: AttentionView, problem: LatentProblem, rank: int) -> str:
    """What a latent keeps and costs, in words."""
    cost = latent_cost(layer.layout, problem.width, rank)
    return (
        f"loses {problem.latent.lost(rank):.1%} of keys and values; multiply-accumulates per token for them "
        f"{cost['dense']:,} before, {cost['unabsorbed']:,} now; absorbed {cost['absorbed']:,}, but "
        f"{cost['absorbed_pair']:,} instead of {cost['pair']:,} per pair of tokens"
    )
