"""Let layers read the keys and values, or the latent, of an earlier layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from headwise.calibration.cross import translator
from headwise.calibration.stats import HeadStats, Stat
from headwise.errors import PlanError
from headwise.model.access import attribute
from headwise.model.edits import Edit, EditPlan, refuse_clustered
from headwise.model.latent_edits import LatentKV, ShareLayers
from headwise.model.latent_surgery import LentHeads, affine
from headwise.model.surgery import Payloads
from headwise.model.view import AttentionView, ModelView
from headwise.passes.base import Pass
from headwise.passes.latent_rotary import refuse_turned, turned_latent, turned_reader
from headwise.passes.latent_weights import LatentProblem, Reader
from headwise.passes.recovery import Recovery


class ShareLayersPass(Pass):
    """Groups of layers keep one kv state, that of their first layer, the owner (CLA; with a rank, CLLA)."""

    name: ClassVar[str] = "share-layers"
    summary: ClassVar[str] = "several layers read the keys and values, or one latent, of the first of them"
    paper: ClassVar[str] = "arXiv 2405.12981, 2406.09297, 2410.15252"

    factor: int = Field(default=2, ge=2)
    """Layers per group: neighbours of one kind, from the first layer on."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Instead of factor: the layers of every group, its owner first. Layers in no group stay as they are."""
    how: Literal["translate", "mean", "reuse"] = "translate"
    """How the other layers read the owner. ``translate``: a linear map from the owner's input to theirs, found by least
    squares, becomes part of their projections. ``mean``: all use keys and values of the mean weights. ``reuse``: all
    use the owner's."""
    rank: int | None = Field(default=None, ge=1)
    """Translate by way of one latent of so many numbers per group and token; without it, the owner's input is kept."""
    weighted: bool = True
    """Weight errors of keys and values by what queries and output projections make of them."""
    balanced: bool = True
    """Give keys and values of every layer the same say, whatever their sizes."""
    refit: bool = True
    """Refit the output projections in closed form afterwards."""
    refit_mlp: bool = False
    """With refit: the down projections of the MLPs behind them too, in the order in which all of them run. They make
    good a part of what attention could not, the more the less is kept; this takes as many calibration tokens as an MLP
    has neurons, and several times as long."""
    ridge: float = Field(default=0.1, gt=0)
    """Pull of the refit towards the present weights, in units of the mean squared feature."""

    @model_validator(mode="after")
    def _fits_together(self) -> ShareLayersPass:
        if self.rank is not None and self.how != "translate":
            raise ValueError("a rank is that of a latent, from which how: translate computes keys and values")
        return self

    def needs(self) -> frozenset[Stat]:
        return frozenset({Stat.INPUT_MOMENT, Stat.QUERY_MOMENT, Stat.CROSS_MOMENT})

    def recovery(self) -> Recovery:
        return Recovery.of_attention(refit=self.refit, mlp=self.refit_mlp, ridge=self.ridge)

    def for_layers(self, count: int) -> Self:
        left = [tuple(layer for layer in group if layer < count) for group in self.groups or ()]
        return self.model_copy(update={"groups": tuple(group for group in left if len(group) > 1) or None})

    def pairs(self, view: ModelView) -> Mapping[int, int]:
        return {layer: group[0] for group in self._groups(view) for layer in group[1:]}

    def plan(self, view: ModelView, stats: HeadStats) -> EditPlan:
        edits: list[Edit] = []
        notes: dict[int, str] = {}
        for group in self._groups(view):
            owner, *others = (view.attention[layer] for layer in group)
            if self.how != "translate":
                edits += [ShareLayers(layer=other.index, owner=owner.index, rank=0) for other in others]
                continue
            problem = self._problem([owner, *others], stats)
            rank = problem.width if self.rank is None else min(self.rank, problem.full)
            plain = {layer.index: layer.layout.head_dim if layer.caches else 0 for layer in (owner, *others)}
            edits.append(LatentKV(layer=owner.index, rank=rank, unrotated=plain[owner.index]))
            edits += [
                ShareLayers(layer=other.index, owner=owner.index, rank=rank, unrotated=plain[other.index])
                for other in others
            ]
            lost = "" if rank == problem.width else f"; one latent loses {problem.latent.lost(rank):.1%} of them"
            for other in others:
                notes[other.index] = (
                    f"{_explained(other, owner, stats):.1%} of its input follows from the owner's{lost}"
                )
        return EditPlan(edits=tuple(edits), notes=notes)

    def payloads(self, view: ModelView, stats: HeadStats, plan: EditPlan) -> Payloads:
        position = {edit.layer: index for index, edit in enumerate(plan.edits)}
        found: dict[int, object] = {}
        for group in self._groups(view):
            layers = [view.attention[layer] for layer in group]
            if self.how == "mean":
                found |= {position[layer]: mean_heads(layers) for layer in group[1:]}
            if self.how == "translate":
                edit = plan.edits[position[group[0]]]
                assert isinstance(edit, LatentKV)
                weights = self._problem(layers, stats).solve(edit.rank)
                found |= {
                    position[layer.index]: turned_latent(view, layer, part) if layer.caches else part
                    for layer, part in zip(layers, weights, strict=True)
                }
        return found  # type: ignore[return-value]

    def _groups(self, view: ModelView) -> list[tuple[int, ...]]:
        """The groups, checked: all layers of one take the same kind of input."""
        groups = self.groups or self._neighbours(view)
        named, layers = [layer for group in groups for layer in group], len(view.attention)
        if len(named) != len(set(named)) or not set(named) <= set(range(layers)):
            raise PlanError(
                f"groups name layers {sorted(named)}",
                expected=f"layers from 0 to {layers - 1}, every one in one group at most",
                fix="number attention layers as `headwise inspect` does",
            )
        for group in groups:
            self._check(view, group)
        found = [group for group in groups if len(group) > 1]
        if not found:
            raise PlanError(
                "no group has two layers",
                expected="at least one layer that reads another one",
                fix="leave the pass out, or set groups",
            )
        return found

    def _neighbours(self, view: ModelView) -> tuple[tuple[int, ...], ...]:
        kinds: dict[tuple[str, object], list[int]] = {}
        for layer in view.attention:
            kinds.setdefault(_kind(layer), []).append(layer.index)
        return tuple(
            tuple(layers[start : start + self.factor])
            for layers in kinds.values()
            for start in range(0, len(layers), self.factor)
        )

    def _check(self, view: ModelView, group: Sequence[int]) -> None:
        owner, *others = (view.attention[layer] for layer in group)
        for layer in (owner, *others):
            refuse_clustered(layer.index, layer.layout)
            if layer.caches and self.how == "translate":
                refuse_turned(layer)
        for other in others:
            alike = _kind(other) == _kind(owner) and owner.runs == other.runs == 1
            if not alike or other.index < owner.index:
                raise PlanError(
                    f"layer {other.index} ({other.path}) cannot read layer {owner.index} ({owner.path})",
                    expected="an earlier layer of the same stack and kind, both of which run once",
                    fix="set groups to layers of one stack, the earliest first",
                )
            if self.how != "translate" and _heads(other) != _heads(owner):
                raise PlanError(
                    f"layer {other.index} has kv heads of shape {_heads(other)}, layer {owner.index} {_heads(owner)}",
                    expected="as many, as wide ones, because they are used as they are",
                    fix="set how: translate, or groups of layers with equally many kv heads",
                )

    def _problem(self, layers: Sequence[AttentionView], stats: HeadStats) -> LatentProblem:
        owner, *others = layers
        moment = stats[Stat.INPUT_MOMENT][owner.index]
        constant = all(layer.caches or affine(layer) for layer in layers)
        readers = [_reader(owner, stats)]
        for other in others:
            found = translator(stats[Stat.CROSS_MOMENT][other.index], moment, constant=constant)
            readers.append(_reader(other, stats, found))
        return LatentProblem.of(readers, moment, data=True, weighted=self.weighted, balanced=self.balanced)


def _reader(layer: AttentionView, stats: HeadStats, translator: torch.Tensor | None = None) -> Reader:
    reader = Reader.of(layer, stats, translator)
    return turned_reader(reader) if layer.caches else reader


def _kind(layer: AttentionView) -> tuple[str, object]:
    """The same for all layers of one kind in one stack: the path without the block's number, and the window."""
    window = attribute(layer.module, layer.family.window) if layer.family.window else None
    return re.sub(r"\d+", "*", layer.path), window


def _heads(layer: AttentionView) -> tuple[int, int]:
    return len(layer.layout.kv), layer.layout.head_dim


def mean_heads(layers: Sequence[AttentionView]) -> LentHeads:
    """Keys and values of the mean weights (arXiv 2406.09297)."""
    weights = [layer.read() for layer in layers]

    def mean(name: str) -> torch.Tensor | None:
        parts = [getattr(entry, name) for entry in weights]
        return None if parts[0] is None else torch.stack(parts).double().mean(0)

    key, value = mean("key"), mean("value")
    assert key is not None
    assert value is not None
    return LentHeads(key=key, value=value, key_bias=mean("key_bias"), value_bias=mean("value_bias"))


def _explained(layer: AttentionView, owner: AttentionView, stats: HeadStats) -> float:
    """Share of the variance of a layer's input that a linear map of the owner's input gives."""
    cross, moment = stats[Stat.CROSS_MOMENT][layer.index], stats[Stat.INPUT_MOMENT][layer.index]
    found = translator(cross, stats[Stat.INPUT_MOMENT][owner.index], constant=True)
    mean = moment[-1, :-1]
    total = float(moment.diagonal()[:-1].sum() - mean.square().sum())
    given = float((found * cross[:-1]).sum() - mean.square().sum())
    return given / max(total, 1e-300)
