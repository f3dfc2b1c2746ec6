"""Put weights into attention layers and MLPs the way their families store them; called by surgery only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from headwise.model.access import assign, attribute
from headwise.model.attend import bind
from headwise.model.grouped import GroupedAttention, own_config
from headwise.model.latent import build_latent
from headwise.model.layout import AttentionLayout, MlpLayout
from headwise.model.mlp import MlpView, MlpWeights
from headwise.model.projections import Projections
from headwise.model.view import AttentionView


def write(view: AttentionView, new: Projections, layout: AttentionLayout) -> None:
    """Store projections the way the family stores them, and keep its head counts true."""
    if view.family.ungrouped and (layout.group > 1 or layout.represented):
        _regroup(view)
    family = view.family
    weights = [w.flatten(0, 1) for w in (new.query, new.key, new.value)]
    biases = [None if b is None else b.flatten() for b in (new.query_bias, new.key_bias, new.value_bias)]
    if layout.compressed:
        _store(view.module, family.query, weights[0], biases[0], transposed=family.transposed)
        if new.latent is not None:
            build_latent(view.module, (family.key, family.value), new.latent)
    elif family.fused:
        bias = None if biases[0] is None else _fused(view, [b for b in biases if b is not None])
        _store(view.module, family.query, _fused(view, weights), bias, transposed=family.transposed)
    else:
        for path, weight, bias in zip((family.query, family.key, family.value), weights, biases, strict=True):
            _store(view.module, path, weight, bias, transposed=family.transposed)
    write_output(view, new.output.flatten(1), new.output_bias)
    for path, parts in new.further.items():
        _put(view.module, path, parts.flatten(0, 1).movedim(0, family.per_head[path]))
    for path, count in family.bookkeeping.items():
        if path.startswith("config."):
            own_config(view.module, path.removeprefix("config."), count(layout))
        else:
            assign(view.module, path, count(layout))
    bind(view.caller, layout)
    view.layout = layout


def _regroup(view: AttentionView) -> None:
    """Put a module with separate projections, of any number of heads each, in the place of the original one."""
    view.module = GroupedAttention(view.module, view.layout.head_dim)
    assign(view.block, view.family.attention, view.module)
    view.family = view.family.regrouped()


def separate(view: AttentionView) -> None:
    """Give a layer that stores queries, keys and values in one matrix a module with one each; the function stays."""
    if view.family.fused:
        old = view.read()
        _regroup(view)
        write(view, old, view.layout)


@contextmanager
def separated(view: AttentionView) -> Iterator[None]:
    """The same while the block runs."""
    module, family, layout = view.module, view.family, view.layout
    separate(view)
    try:
        yield
    finally:
        assign(view.block, family.attention, module)
        view.module, view.family, view.layout = module, family, layout


def _fused(view: AttentionView, parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of queries, keys and values as one matrix or bias; the inverse of what the view reads."""
    if not view.family.interleaved:
        return torch.cat(parts)
    heads = [part.unflatten(0, (-1, view.layout.head_dim)) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)


def write_mlp(view: MlpView, new: MlpWeights, layout: MlpLayout) -> None:
    """Store the weights of an MLP the way the family stores them."""
    record, transposed = view.record, view.family.transposed
    up, up_bias = new.up, new.up_bias
    if record.fused:
        assert new.gate is not None, "a fused matrix holds a gate"
        up = torch.cat([new.gate, up])
        up_bias = None if up_bias is None or new.gate_bias is None else torch.cat([new.gate_bias, up_bias])
    elif new.gate is not None:
        _store(view.block, record.gate, new.gate, new.gate_bias, transposed=transposed)
    _store(view.block, record.up, up, up_bias, transposed=transposed)
    write_output(view, new.down, new.down_bias)
    view.layout = layout


def write_output(view: AttentionView | MlpView, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Store an output or down projection, (D, features), and its bias."""
    root, path = (view.block, view.record.down) if isinstance(view, MlpView) else (view.module, view.family.output)
    _store(root, path, weight, bias, transposed=view.family.transposed)


def _store(root: nn.Module, path: str, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool) -> None:
    """Put a weight of shape (out, in) into the projection at ``path``, whatever its class calls its sizes."""
    _put(root, f"{path}.weight", weight.T if transposed else weight)
    if bias is not None:
        _put(root, f"{path}.bias", bias)


def _put(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Replace a parameter by one of another shape, in the type of the old one, and keep its module's sizes true."""
    parent, _, name = path.rpartition(".")
    module: nn.Module = attribute(root, parent)
    # A module in the place of another one has a weight before it has a bias.
    old = module.get_parameter(name) if getattr(module, name) is not None else module.get_parameter("weight")
    module.register_parameter(name, nn.Parameter(tensor.to(old.dtype).contiguous().clone(), old.requires_grad))
    if name == "weight":
        rows, columns = tensor.shape
        sizes = {"out_features": rows, "in_features": columns, "num_embeddings": rows, "embedding_dim": columns}
        # Conv1D of transformers stores (in, out).
        for size, value in {**sizes, "nf": columns, "nx": rows}.items():
            if hasattr(module, size):
                setattr(module, size, value)


@contextmanager
def written(view: AttentionView, weights: Projections, layout: AttentionLayout) -> Iterator[None]:
    """Other weights while the block runs."""
    old, before = view.read(), view.layout
    write(view, weights, layout)
    try:
        yield
    finally:
        write(view, old, before)
