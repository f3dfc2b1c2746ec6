"""The same eyes for every model: read heads, gate heads, watch head outputs. Nothing here changes a weight.

Shape letters: B batch, T tokens, D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headwise.errors import PlanError
from headwise.model.access import See, attribute, hooked, matrix, watched_input, watched_output
from headwise.model.attention import unpack_attention
from headwise.model.families import Family
from headwise.model.finding import backbones, find_by_path, find_by_type, find_mlp, no_attention
from headwise.model.layout import AttentionLayout, Layout
from headwise.model.mlp import MlpView


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """The weights of one attention layer, in this order and shape for every family.

    Attributes:
        query: (N, H, D); ``key`` and ``value``: (K, H, D).
        output: (D, N, H).
        query_bias: (N, H) or None; ``key_bias`` and ``value_bias``: (K, H) or None.
        output_bias: (D,) or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    output_bias: torch.Tensor | None


class AttentionView:
    """One attention layer.

    Attributes:
        index: position in ``ModelView.attention``; what reports call the layer.
        path: dotted name of the attention module from the root of the model.
        module: the attention module; ``block``: the transformer block around it.
        layout: the heads it has; surgery sets it together with the weights.
        residual: whether the block's input is the residual stream that this layer adds to.
    """

    def __init__(self, index: int, path: str, module: nn.Module, block: nn.Module, family: Family) -> None:
        self.index = index
        self.path = path
        self.module = module
        self.block = block
        self.family = family
        self.residual = True
        self.layout = self.count()

    def count(self) -> AttentionLayout:
        """The layout that the weights have now, with heads numbered by position."""
        head_dim = int(attribute(self.module, self.family.head_dim))
        queries = self._matrix(self.output)[0].shape[1] // head_dim
        rows = self._matrix(attribute(self.module, self.family.key))[0].shape[0] // head_dim
        kvs = (rows - queries) // 2 if self.family.fused else rows
        return AttentionLayout(query=tuple(range(queries)), kv=tuple(range(kvs)), head_dim=head_dim)

    @property
    def output(self) -> nn.Module:
        """The output projection; its input is the concatenation of all head outputs, (B, T, N * H)."""
        module = attribute(self.module, self.family.output)
        assert isinstance(module, nn.Module)
        return module

    def _matrix(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight as (out, in), and bias."""
        return matrix(module, transposed=self.family.transposed)

    def linear(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output projection as (D, N * H), and its bias."""
        return self._matrix(self.output)

    def read(self) -> Projections:
        """The layer's weights as (heads, head_dim, width); views of the stored ones where possible."""
        family, heads = self.family, -1
        H = self.layout.head_dim
        if family.fused:
            weight, bias = self._matrix(attribute(self.module, family.query))
            sizes = [H * n for n in (len(self.layout.query), len(self.layout.kv), len(self.layout.kv))]
            weights = weight.split(sizes)
            biases = (None,) * 3 if bias is None else bias.split(sizes)
        else:
            parts = [self._matrix(attribute(self.module, p)) for p in (family.query, family.key, family.value)]
            weights, biases = zip(*parts, strict=True)
        q, k, v = (w.unflatten(0, (heads, H)) for w in weights)
        qb, kb, vb = (None if b is None else b.unflatten(0, (heads, H)) for b in biases)
        output, output_bias = self._matrix(self.output)
        return Projections(
            query=q,
            key=k,
            value=v,
            output=output.unflatten(1, (heads, H)),
            query_bias=qb,
            key_bias=kb,
            value_bias=vb,
            output_bias=output_bias,
        )

    @contextmanager
    def gate(self, scale: torch.Tensor, instead: torch.Tensor | None = None) -> Iterator[None]:
        """Scale each head's contribution while the block runs.

        Args:
            scale: (N,), or (B, N) for one gate per sample. Zero is the exact twin of removing the head.
            instead: (N, H) what a closed head gives in place of zeros.
        """

        def scaled(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            heads = args[0].unflatten(-1, (-1, self.layout.head_dim))
            gates = scale[..., None] if scale.dim() == 1 else scale[:, None, :, None]
            gated = heads * gates if instead is None else instead + (heads - instead) * gates
            return (gated.flatten(-2), *args[1:])

        with hooked(self.output.register_forward_pre_hook(scaled)):
            yield

    def watch_heads(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the head outputs, (B, T, N, H), on every forward."""
        return watched_input(self.output, lambda heads: see(heads.unflatten(-1, (-1, self.layout.head_dim))))

    def watch_input(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with what keys and values are projected from, (B, S, D), on every forward."""
        return watched_input(attribute(self.module, self.family.key), see)

    def watch_output(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with what the layer adds to the residual stream, (B, T, D)."""
        return watched_output(self.output, see)

    def watch_residual(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the block's input, (B, T, D): the residual stream that the layer's output is added to."""
        return watched_input(self.block, see)


class ModelView:
    """A model as a sequence of attention layers and MLPs.

    Attributes:
        module: the model itself.
        attention: one view per attention layer, in the order in which they run.
        mlp: one view per MLP, in the order of their blocks; blocks whose MLP no record describes have none.
    """

    def __init__(self, module: nn.Module, attention: tuple[AttentionView, ...], mlp: tuple[MlpView, ...] = ()) -> None:
        self.module = module
        self.attention = attention
        self.mlp = mlp

    @classmethod
    def of(cls, module: nn.Module) -> ModelView:
        """The view of a transformers model, or of a plain module with such models or ``nn.MultiheadAttention`` inside.

        A plain module's packed attention is unpacked in place, which leaves its function as it is.

        Raises:
            UnsupportedModelError: no family record fits; the message names the model type and the known ones.
        """
        found = [entry for backbone in backbones(module) for entry in find_by_path(module, backbone)]
        if not isinstance(module, PreTrainedModel):
            unpack_attention(module)
            found += find_by_type(module)
        if not found:
            raise no_attention(module)
        views = tuple(AttentionView(index, *entry) for index, entry in enumerate(found))
        names = {id(child): name for name, child in module.named_modules()}
        mlps: list[MlpView] = []
        seen: set[int] = set()
        for view in views:
            view.residual = id(view.block) not in seen
            record = find_mlp(view.block, view.family)
            if view.residual and record is not None:
                mlps.append(MlpView(len(mlps), names[id(view.block)], view.block, view.family, record))
            seen.add(id(view.block))
        return cls(module, views, tuple(mlps))

    @property
    def sublayers(self) -> tuple[AttentionView | MlpView, ...]:
        """Attention layers and MLPs in the order in which they run."""
        last = {id(layer.block): layer.index for layer in self.attention}
        after = {last[id(mlp.block)]: mlp for mlp in self.mlp}
        pairs = ((layer, after.get(layer.index)) for layer in self.attention)
        return tuple(part for pair in pairs for part in pair if part is not None)

    @property
    def layout(self) -> Layout:
        """The heads and neurons that every layer has now, by original id."""
        return Layout(
            attention=tuple(view.layout for view in self.attention), mlp=tuple(view.layout for view in self.mlp)
        )

    def rename(self, layout: Layout) -> None:
        """Give heads and neurons the ids that they had in the original checkpoint.

        A layout without MLPs, as older versions saved them, leaves the neurons as they are.

        Raises:
            PlanError: the counts of ``layout`` are not those of the weights.
        """
        _require_equal(
            [(len(v.layout.query), len(v.layout.kv), v.layout.head_dim) for v in self.attention],
            [(len(entry.query), len(entry.kv), entry.head_dim) for entry in layout.attention],
            "query heads, kv heads, head_dim",
        )
        if layout.mlp:
            _require_equal(
                [len(v.layout.neurons) for v in self.mlp], [len(entry.neurons) for entry in layout.mlp], "neurons"
            )
        for view, entry in zip(self.attention, layout.attention, strict=True):
            view.layout = entry
        for mlp, neurons in zip(self.mlp, layout.mlp, strict=False):
            mlp.layout = neurons


def _require_equal(have: list[Any], want: list[Any], what: str) -> None:
    if have != want:
        raise PlanError(
            f"a layout of {want} ({what})",
            expected=f"{have}, which is what the weights have",
            fix="use the layout that was saved with these weights",
        )
