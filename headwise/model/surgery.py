"""The only code that changes a weight. Passes decide; this file acts.

Shape letters: D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from headwise.errors import SurgeryError
from headwise.model.layout import AttentionLayout, DropHeads, EditPlan, Layout
from headwise.model.view import AttentionView, ModelView, Projections, assign, attribute


def apply(model: ModelView, plan: EditPlan) -> None:
    """Make the plan's edits, in order, in place.

    Raises:
        PlanError: an edit does not fit; nothing has been changed.
        SurgeryError: the model did not land where the plan said.
    """
    plan.check(model.layout)
    predicted = plan.predict(model.layout)
    for edit in plan.edits:
        drop_heads(model.attention[edit.layer], edit)
    counted = tuple(view.count() for view in model.attention)
    for view, want, have in zip(model.attention, predicted, counted, strict=True):
        if view.layout != want or (len(have.query), len(have.kv)) != (len(want.query), len(want.kv)):
            raise SurgeryError(
                f"layer {view.index} has {len(have.query)} query and {len(have.kv)} kv heads after surgery",
                expected=f"{len(want.query)} and {len(want.kv)}, as planned",
                fix="this is a bug in headwise; please report it with the model type and the plan",
            )


def drop_heads(view: AttentionView, edit: DropHeads) -> None:
    """Slice removed heads out of all four projections. Exact twin: their gates at zero."""
    layout = edit.apply(view.layout)
    queries = [view.layout.query.index(head) for head in layout.query]
    kvs = [view.layout.kv.index(head) for head in layout.kv]
    old = view.read()
    new = Projections(
        query=old.query[queries],
        key=old.key[kvs],
        value=old.value[kvs],
        output=old.output[:, queries],
        query_bias=_pick(old.query_bias, queries),
        key_bias=_pick(old.key_bias, kvs),
        value_bias=_pick(old.value_bias, kvs),
        output_bias=old.output_bias,
    )
    write(view, new, layout)


def set_output(view: AttentionView, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Replace the output projection.

    Args:
        view: the layer.
        weight: (D, N, H).
        bias: (D,), or None where the layer has none.
    """
    old = view.read()
    if (bias is None) != (old.output_bias is None):
        raise SurgeryError(
            f"layer {view.index}: a bias {'is missing' if bias is None else 'is given'} for the output projection",
            expected="a bias exactly where the original layer has one",
            fix="fold constants only into layers that have an output bias",
        )
    write(view, replace(old, output=weight, output_bias=bias), view.layout)


def reshape(model: ModelView, layout: Layout) -> None:
    """Give every layer the shapes of ``layout``, with zeros in it, so that saved weights can be loaded."""
    for view, entry in zip(model.attention, layout, strict=True):
        old = view.read()
        n, k, h = len(entry.query), len(entry.kv), entry.head_dim
        zeros = Projections(
            query=old.query.new_zeros(n, h, old.query.shape[2]),
            key=old.key.new_zeros(k, h, old.key.shape[2]),
            value=old.value.new_zeros(k, h, old.value.shape[2]),
            output=old.output.new_zeros(old.output.shape[0], n, h),
            query_bias=None if old.query_bias is None else old.query_bias.new_zeros(n, h),
            key_bias=None if old.key_bias is None else old.key_bias.new_zeros(k, h),
            value_bias=None if old.value_bias is None else old.value_bias.new_zeros(k, h),
            output_bias=old.output_bias,
        )
        write(view, zeros, entry)


def write(view: AttentionView, new: Projections, layout: AttentionLayout) -> None:
    """Store projections the way the family stores them, and keep its head counts true."""
    family = view.family
    weights = [w.flatten(0, 1) for w in (new.query, new.key, new.value)]
    biases = [None if b is None else b.flatten() for b in (new.query_bias, new.key_bias, new.value_bias)]
    if family.fused:
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        _store(view, family.query, torch.cat(weights), bias)
    else:
        for path, weight, bias in zip((family.query, family.key, family.value), weights, biases, strict=True):
            _store(view, path, weight, bias)
    _store(view, family.output, new.output.flatten(1), new.output_bias)
    for path, count in family.bookkeeping.items():
        assign(view.module, path, count(layout))
    view.layout = layout


def _store(view: AttentionView, path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Put a weight of shape (out, in) into the projection at ``path``, whatever its class calls its sizes."""
    module: nn.Module = attribute(view.module, path)
    out_features, in_features = weight.shape
    stored = weight.T if view.family.transposed else weight
    old = module.get_parameter("weight")
    trained = old.requires_grad
    module.register_parameter("weight", nn.Parameter(stored.to(old.dtype).contiguous().clone(), trained))
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias.to(old.dtype).clone(), trained))
    sizes = {"out_features": out_features, "in_features": in_features, "nf": out_features, "nx": in_features}
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _pick(bias: torch.Tensor | None, heads: list[int]) -> torch.Tensor | None:
    return None if bias is None else bias[heads]
