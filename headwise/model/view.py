"""The same eyes for every model: read heads, gate heads, watch head outputs. Nothing here changes a weight.

Shape letters: B batch, T tokens, D model width, N query heads, K kv heads, H head_dim. In a clustered layer R of the N
query heads have queries and J of the K kv heads have keys; elsewhere R is N and J is K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headwise.errors import PlanError
from headwise.model.access import See, attribute, find, hooked, matrix, watched_input, watched_output
from headwise.model.attend import See as SeeWeights
from headwise.model.attend import bound, watch
from headwise.model.attention import unpack_attention
from headwise.model.families import Family
from headwise.model.finding import Found, backbones, find_by_path, find_by_type, find_mlp, no_attention
from headwise.model.grouped import GroupedAttention
from headwise.model.latent import Borrowed, LatentProjections, read_latent
from headwise.model.latent_attention import PROJECTIONS, LatentAttention, fits
from headwise.model.layout import AttentionLayout, Layout
from headwise.model.lent_cache import Absent
from headwise.model.mlp import MlpView
from headwise.model.projections import Projections
from headwise.model.timm_attention import unpack_timm


class AttentionView:
    """One attention layer.

    Attributes:
        index: position in ``ModelView.attention``; what reports call the layer.
        path: dotted name of the attention module from the root of the model.
        module: the attention module; ``block``: the transformer block around it.
        layout: the heads it has; surgery sets it together with the weights.
        residual: whether ``watch_residual`` sees the residual stream that this layer adds to.
        runs: how often one forward of the model passes through it; its hooks see every run.
    """

    def __init__(self, index: int, found: Found) -> None:
        self.index = index
        self.path = found.path
        self.module = found.module
        self.block = found.block
        self.family = _record(found)
        self.runs = found.runs
        self.residual = True
        self.layout = bound(self.caller) or self._plain_layout()

    @property
    def caller(self) -> nn.Module:
        """The module that calls the attention function."""
        module = attribute(self.module, self.family.caller)
        assert isinstance(module, nn.Module)
        return module

    def _plain_layout(self) -> AttentionLayout:
        """The layout of an unedited module, with heads numbered by position."""
        head_dim = int(attribute(self.module, self.family.head_dim))
        queries = self._matrix(self.output)[0].shape[1] // head_dim
        rows = self._matrix(attribute(self.module, self.family.key))[0].shape[0] // head_dim
        kvs = (rows - queries) // 2 if self.family.fused else rows
        return AttentionLayout(query=tuple(range(queries)), kv=tuple(range(kvs)), head_dim=head_dim)

    def fits(self) -> bool:
        """Whether the weights have the shapes that the layout says."""
        layout, H = self.layout, self.layout.head_dim
        if isinstance(self.module, LatentAttention):
            return fits(self.module, layout)
        if layout.latent:
            found = read_latent(*self._latent_modules(), H)
            return found.key.shape == found.value.shape == (len(layout.kv), H, layout.latent)
        if layout.owner is not None:
            return isinstance(attribute(self.module, self.family.key), Borrowed | Absent)
        rows = [len(heads) * H for heads in (layout.scoring, layout.keyed, layout.kv)]
        family = self.family
        paths = [family.query] if family.fused else [family.query, family.key, family.value]
        have = [self._matrix(attribute(self.module, path))[0].shape[0] for path in paths]
        width = self._matrix(self.output)[0].shape[1]
        return have == ([sum(rows)] if family.fused else rows) and width == len(layout.query) * H

    @property
    def caches(self) -> bool:
        """Whether the layer is run with a kv cache of its own."""
        return self.family.causal and not self.family.decoder

    @property
    def rotated(self) -> int:
        """How many leading coordinates of every head are rotated by their position."""
        return self.family.rotated(getattr(self.module, "config", None), self.layout.head_dim)

    @property
    def direct(self) -> bool:
        """Whether the layer's output is added to the residual stream as it is."""
        return not self.family.between or isinstance(attribute(self.block, self.family.between), nn.Identity)

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

    def projections(self) -> dict[str, torch.Tensor]:
        """Parameter of the attention module, as in its ``state_dict`` -> value, for those of its projections."""
        family, latent = self.family, isinstance(self.module, LatentAttention)
        paths = PROJECTIONS if latent else (family.query, family.key, family.value, family.output)
        parameters = self.module.named_parameters()
        return {name: value.detach() for name, value in parameters if name.startswith(tuple(f"{p}." for p in paths))}

    def read(self) -> Projections:
        """The layer's weights as (heads, head_dim, width); views of the stored ones where possible."""
        family = self.family
        if self.layout.compressed:
            q, qb = self._heads(family.query)
            # Of a latent, or of another layer: there is nothing to slice or merge head by head.
            (k, kb), (v, vb) = (q[:0], None), (q[:0], None)
        elif family.fused:
            weight, bias = self._matrix(attribute(self.module, family.query))
            q, k, v = self._parts(weight)
            qb, kb, vb = (None,) * 3 if bias is None else self._parts(bias)
        else:
            (q, qb), (k, kb), (v, vb) = map(self._heads, (family.query, family.key, family.value))
        output, output_bias = self._matrix(self.output)
        return Projections(
            query=q,
            key=k,
            value=v,
            output=output.unflatten(1, (-1, self.layout.head_dim)),
            query_bias=qb,
            key_bias=kb,
            value_bias=vb,
            output_bias=output_bias,
            further=dict(self._further()),
            latent=self._latent(),
        )

    def _heads(self, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A projection's weight and bias by heads."""
        weight, bias = self._matrix(attribute(self.module, path))
        latent = isinstance(self.module, LatentAttention)
        # Queries of latent attention have a width of their own.
        shape = (len(self.layout.query), -1) if latent else (-1, self.layout.head_dim)
        return weight.unflatten(0, shape), None if bias is None else bias.unflatten(0, shape)

    def _latent(self) -> LatentProjections | None:
        if not self.layout.latent or isinstance(self.module, LatentAttention):
            return None
        return read_latent(*self._latent_modules(), self.layout.head_dim)

    def _latent_modules(self) -> tuple[nn.Module, nn.Module]:
        return attribute(self.module, self.family.key), attribute(self.module, self.family.value)

    def _parts(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a fused matrix or bias, each (heads, H, ...)."""
        layout, H = self.layout, self.layout.head_dim
        parts: tuple[torch.Tensor, ...] = (
            fused.unflatten(0, (-1, 3, H)).unbind(1)
            if self.family.interleaved
            else fused.unflatten(0, (-1, H)).split([len(heads) for heads in (layout.scoring, layout.keyed, layout.kv)])
        )
        return parts

    def _further(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path, axis in self.family.per_head.items():
            parameter = find(self.module, path)
            if isinstance(parameter, nn.Parameter):
                yield path, parameter.detach().movedim(axis, 0).unflatten(0, (len(self.layout.query), -1))

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

    def watch_weights(self, see: SeeWeights) -> AbstractContextManager[None]:
        """Call ``see`` with attention weights, (B, N, T, S), and the values they weigh, (B, N, S, H)."""
        return watch(self.caller, see)

    @contextmanager
    def watch_calls(self, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
        """Call ``see`` with the arguments of every call of the attention module."""
        with hooked(self.module.register_forward_pre_hook(lambda _, *call: see(*call), with_kwargs=True)):
            yield

    def watch_input(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with what keys and values are projected from, (B, S, D), on every forward."""
        return watched_input(attribute(self.module, self.family.key), see)

    def watch_query_input(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with what queries are projected from, (B, T, D), on every forward."""
        return watched_input(attribute(self.module, self.family.query), see)

    def watch_output(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the output of the output projection, (B, T, D), bias included."""
        return watched_output(self.output, see)

    def watch_residual(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the residual stream that the layer's output is added to, (B, T, D); see ``residual``."""
        return watched_input(attribute(self.block, self.family.residual), see)


def _record(found: Found) -> Family:
    """The record of the module that runs a layer now."""
    if isinstance(found.module, LatentAttention):
        return found.family.with_latent()
    return found.family.regrouped() if isinstance(found.module, GroupedAttention) else found.family


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
        """The view of a transformers model, or of a plain module.

        In a plain module, transformers models, ``nn.MultiheadAttention`` and timm's ``Attention`` are found. Packed
        attention is unpacked in place, which leaves the module's function as it is.

        Raises:
            UnsupportedModelError: no family record fits; the message names the model type and the known ones.
        """
        found = [entry for backbone in backbones(module) for entry in find_by_path(module, backbone)]
        if not isinstance(module, PreTrainedModel):
            unpack_attention(module)
            unpack_timm(module)
            found += find_by_type(module)
        if not found:
            raise no_attention(module)
        views = tuple(AttentionView(index, entry) for index, entry in enumerate(found))
        names = {id(child): name for name, child in module.named_modules()}
        mlps: list[MlpView] = []
        seen: set[int] = set()
        for view in views:
            view.residual = bool(view.family.residual) or id(view.block) not in seen
            # Not of the module that runs the layer now, which may store its weights in another way.
            family = found[view.index].family
            record = find_mlp(view.block, family)
            if record is not None and id(view.block) not in seen:
                path = names[id(view.block)]
                mlps.append(MlpView(len(mlps), path, view.block, family, record, runs=view.runs))
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
