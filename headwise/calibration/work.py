"""What the heads and neurons of every layer cost in multiply-accumulates: counted, by removing one of them.

A formula would have to know what else a family computes for every head, such as the position terms of DeBERTa.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headwise.errors import PlanError
from headwise.model import surgery
from headwise.model.counting import count_macs
from headwise.model.edits import DropHeads, DropNeurons, Edit, EditPlan
from headwise.model.view import ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Multiply-accumulates of one forward pass.

    Attributes:
        total: of the whole model.
        heads: per attention layer, of one of its ``layout.units()``; 0 where none can go.
        neurons: per MLP, of one neuron; 0 where none can go.
    """

    total: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def count_work(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> Work:
    """Count on a copy of the model that has one unit fewer in every layer.

    Args:
        view: the model, which is left as it is.
        inputs: one row.
    """
    fewer = ModelView.of(copy.deepcopy(view.module))
    fewer.rename(view.layout)
    surgery.apply(fewer, _one_each(view))
    before, after = count_macs(view.module, inputs), count_macs(fewer.module, inputs)

    def saved(*paths: str) -> int:
        return sum(before.get(path, 0) - after.get(path, 0) for path in paths)

    return Work(
        total=before[""],
        heads=tuple(saved(layer.path) for layer in view.attention),
        neurons=tuple(saved(*mlp.paths) for mlp in view.mlp),
    )


def _one_each(view: ModelView) -> EditPlan:
    heads = [DropHeads(layer=layer.index, query=layer.layout.units()[0]) for layer in view.attention]
    neurons = [DropNeurons(layer=mlp.index, neurons=mlp.layout.neurons[:1]) for mlp in view.mlp]
    every: list[Edit] = [*heads, *neurons]
    return EditPlan(edits=tuple(edit for edit in every if _possible(EditPlan(edits=(edit,)), view)))


def _possible(plan: EditPlan, view: ModelView) -> bool:
    try:
        plan.check(view.layout)
    except PlanError:
        return False
    return True
