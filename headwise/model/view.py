"""The same eyes for every model: read heads, gate heads, watch head outputs. Nothing here changes a weight.

Shape letters: B batch, T tokens, D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headwise.errors import PlanError, UnsupportedModelError
from headwise.model.attention import MultiHeadAttention, unpack_attention
from headwise.model.families import FAMILIES, PLAIN, Family, family_of
from headwise.model.layout import AttentionLayout, Layout

See = Callable[[torch.Tensor], None]


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
        bias = module.bias
        weight = module.get_parameter("weight").detach()
        return weight.T if self.family.transposed else weight, bias.detach() if isinstance(bias, nn.Parameter) else None

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
    def gate(self, scale: torch.Tensor) -> Iterator[None]:
        """Scale each head's contribution while the block runs.

        Args:
            scale: (N,), or (B, N) for one gate per sample. Zero is the exact twin of removing the head.
        """

        def scaled(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            heads = args[0].unflatten(-1, (-1, self.layout.head_dim))
            gates = scale[..., None] if scale.dim() == 1 else scale[:, None, :, None]
            return ((heads * gates).flatten(-2), *args[1:])

        with _hooked(self.output.register_forward_pre_hook(scaled)):
            yield

    @contextmanager
    def watch_heads(self, see: See) -> Iterator[None]:
        """Call ``see`` with the head outputs, (B, T, N, H), on every forward."""

        def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0].unflatten(-1, (-1, self.layout.head_dim)))

        with _hooked(self.output.register_forward_pre_hook(seen)):
            yield

    @contextmanager
    def watch_input(self, see: See) -> Iterator[None]:
        """Call ``see`` with what keys and values are projected from, (B, S, D), on every forward."""

        def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0])

        with _hooked(attribute(self.module, self.family.key).register_forward_pre_hook(seen)):
            yield

    @contextmanager
    def watch_output(self, see: See) -> Iterator[None]:
        """Call ``see`` with what the layer adds to the residual stream, (B, T, D)."""

        def seen(_: nn.Module, __: tuple[Any, ...], result: torch.Tensor) -> None:
            see(result)

        with _hooked(self.output.register_forward_hook(seen)):
            yield

    @contextmanager
    def watch_residual(self, see: See) -> Iterator[None]:
        """Call ``see`` with the block's input, (B, T, D): the residual stream that the layer's output is added to."""

        def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else next(iter(kwargs.values())))

        with _hooked(self.block.register_forward_pre_hook(seen, with_kwargs=True)):
            yield


class ModelView:
    """A model as a sequence of attention layers.

    Attributes:
        module: the model itself.
        attention: one view per attention layer, in the order in which they run.
    """

    def __init__(self, module: nn.Module, attention: tuple[AttentionView, ...]) -> None:
        self.module = module
        self.attention = attention

    @classmethod
    def of(cls, module: nn.Module) -> ModelView:
        """The view of a transformers model, or of a plain module with such models or ``nn.MultiheadAttention`` inside.

        A plain module's packed attention is unpacked in place, which leaves its function as it is.

        Raises:
            UnsupportedModelError: no family record fits; the message names the model type and the known ones.
        """
        found = [entry for backbone in backbones(module) for entry in _find_by_path(module, backbone)]
        if not isinstance(module, PreTrainedModel):
            unpack_attention(module)
            found += _find_by_type(module)
        if not found:
            raise _no_attention(module)
        views = tuple(AttentionView(index, *entry) for index, entry in enumerate(found))
        seen: set[int] = set()
        for view in views:
            view.residual = id(view.block) not in seen
            seen.add(id(view.block))
        return cls(module, views)

    @property
    def layout(self) -> Layout:
        """The heads that every layer has now, by original id."""
        return tuple(view.layout for view in self.attention)

    def rename(self, layout: Layout) -> None:
        """Give the heads the ids that they had in the original checkpoint.

        Raises:
            PlanError: the counts of ``layout`` are not those of the weights.
        """
        have = [(len(v.layout.query), len(v.layout.kv), v.layout.head_dim) for v in self.attention]
        want = [(len(entry.query), len(entry.kv), entry.head_dim) for entry in layout]
        if have != want:
            raise PlanError(
                f"a layout of {want} (query heads, kv heads, head_dim)",
                expected=f"{have}, which is what the weights have",
                fix="use the layout that was saved with these weights",
            )
        for view, entry in zip(self.attention, layout, strict=True):
            view.layout = entry


def attribute(root: Any, path: str) -> Any:
    """``attribute(m, "self.query")`` is ``m.self.query``."""
    return reduce(getattr, path.split("."), root) if path else root


def assign(root: Any, path: str, value: Any) -> None:
    """Set what ``attribute`` reads."""
    parent, _, name = path.rpartition(".")
    setattr(attribute(root, parent), name, value)


@contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


Found = tuple[str, nn.Module, nn.Module, Family]
"""Path from the root, attention module, block around it, and the record that describes them."""


def backbones(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models that a module is or holds, outermost ones only."""
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for child in module.modules():
        if isinstance(child, PreTrainedModel) and id(child) not in inside:
            found.append(child)
            inside.update(map(id, child.modules()))
    return found


def longest_sequence(module: nn.Module) -> int | None:
    """How many tokens a model can take, or None where nothing in it sets a limit."""
    limits = [family_of(b.config.model_type).longest_sequence(b.config) for b in backbones(module)]
    return min((limit for limit in limits if limit is not None), default=None)


def _find_by_path(root: nn.Module, backbone: PreTrainedModel) -> list[Found]:
    """The attention of every block that the backbone's family record names."""
    family = family_of(backbone.config.model_type)
    pattern = re.compile(re.escape(family.blocks).replace(r"\*", r"(\d+)"))
    root_names = {id(child): name for name, child in root.named_modules()}
    blocks = [
        (tuple(map(int, match.groups())), child)
        for name, child in backbone.base_model.named_modules()
        if (match := pattern.fullmatch(name))
    ]
    found: list[Found] = []
    for _, block in sorted(blocks, key=operator.itemgetter(0)):
        layer = attribute(block, family.attention)
        found.append((root_names[id(layer)], layer, block, family))
    if not found:
        raise UnsupportedModelError(
            f'no attention layer at "{family.blocks}.{family.attention}" in {type(backbone).__name__}',
            expected=f"the module names that the {family.name} record describes",
            fix="check the transformers version: a renamed module is one line in headwise/model/families",
        )
    return found


def _find_by_type(root: nn.Module) -> list[Found]:
    """Every unpacked ``nn.MultiheadAttention``; its block is the module that holds it."""
    return [
        (name, child, attribute(root, name.rpartition(".")[0]), PLAIN)
        for name, child in root.named_modules()
        if isinstance(child, MultiHeadAttention)
    ]


def _no_attention(module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} has no attention layer that headwise knows",
        expected="a transformers model of type " + ", ".join(sorted(FAMILIES)) + ", or nn.MultiheadAttention inside",
        fix="build the model on nn.MultiheadAttention, or add a family record (CONTRIBUTING.md)",
    )
