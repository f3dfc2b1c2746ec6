"""Layers that get something from the first layer of their stack, one entry per query head: let each compute its own.

In T5 the first layer of a stack looks up a bias for every pair of positions and every head, and hands it on to the
layers behind it. That only fits while all layers have the same heads. With a table of its own in every layer the
function stays what it is, and every layer can lose the heads that it needs least.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from headwise.model.access import assign, find
from headwise.model.view import ModelView

_OWN = "_headwise_own"
"""Set on attention modules that compute their own already."""


def compute_own(model: ModelView) -> None:
    """Let every layer of every stack compute what it was given, in place; the function stays the same."""
    tables: dict[str, nn.Module] = {}
    for layer in model.attention:
        handed = layer.family.handed_on
        if handed is None or getattr(layer.module, _OWN, False):
            continue
        if handed.table:
            table = find(layer.module, handed.table)
            if table is None:
                table = copy.deepcopy(tables[layer.family.blocks])
                assign(layer.module, handed.table, table)
                assign(layer.module, handed.flag, True)
            # Layers come in the order in which they run: the last table seen is that of this layer's stack.
            tables[layer.family.blocks] = table
        layer.module.register_forward_pre_hook(partial(_drop, handed.argument), with_kwargs=True)
        setattr(layer.module, _OWN, True)


def handed_alike(model: ModelView) -> bool:
    """Whether the layers of every stack have the same heads, so that the first one's table would do for all."""
    heads: dict[str, set[tuple[int, ...]]] = {}
    for layer in model.attention:
        if layer.family.handed_on is not None and layer.family.handed_on.table:
            heads.setdefault(layer.family.blocks, set()).add(layer.layout.query)
    return all(len(kept) == 1 for kept in heads.values())


def _drop(argument: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return args, {**kwargs, argument: None}
