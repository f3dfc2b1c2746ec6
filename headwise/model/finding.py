"""Find attention layers and MLPs in a module: by the paths of a family record, or by type in plain modules."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import UnsupportedModelError
from headwise.model.access import attribute
from headwise.model.attention import MultiHeadAttention
from headwise.model.families import FAMILIES, Family, FeedForward, family_of, plain_family, timm_family
from headwise.model.timm_attention import TimmAttention


class Found(NamedTuple):
    """An attention layer.

    Attributes:
        path: from the root.
        module: the attention module; ``block``: the block around it.
        family: the record that describes them.
        runs: how often one forward of the model passes through it.
    """

    path: str
    module: nn.Module
    block: nn.Module
    family: Family
    runs: int = 1


def backbones(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models that a module is or holds: of each outermost one the towers that have a record."""
    models = _outermost(module, lambda child: isinstance(child, PreTrainedModel))
    return [tower for model in models for tower in _outermost(model, _described) or [model]]


def _outermost(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Any]:
    """The modules below a root, itself included, that are wanted and not inside another such module."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for child in root.modules():
        if wanted(child) and id(child) not in inside:
            found.append(child)
            inside.update(map(id, child.modules()))
    return found


def _described(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.config.model_type in FAMILIES


def longest_sequence(module: nn.Module) -> int | None:
    """How many tokens a model can take, or None where nothing in it sets a limit."""
    limits = [family_of(b.config.model_type).longest_sequence(b.config) for b in backbones(module)]
    return min((limit for limit in limits if limit is not None), default=None)


def find_by_path(root: nn.Module, backbone: PreTrainedModel) -> list[Found]:
    """The attention layers that the backbone's family record names, in the order in which they run."""
    family = family_of(backbone.config.model_type)
    root_names = {id(child): name for name, child in root.named_modules()}
    found = []
    for kind in _kinds(backbone, family):
        for index, block in _blocks(backbone, kind):
            layer = attribute(block, kind.attention)
            runs = 1 if kind.runs is None else kind.runs(backbone.config, index)
            found.append(((kind.decoder, index), Found(root_names[id(layer)], layer, block, kind, runs)))
    if not found:
        raise UnsupportedModelError(
            f'no attention layer at "{family.blocks}.{family.attention}" in {type(backbone).__name__}',
            expected=f"the module names that the {family.name} record describes",
            fix="check the transformers version: a renamed module is one line in headwise/model/families",
        )
    # Encoders run before decoders; within a block, layers run in the order of their kinds, which sorting keeps.
    return [layer for _, layer in sorted(found, key=operator.itemgetter(0))]


def _kinds(backbone: PreTrainedModel, family: Family) -> tuple[Family, ...]:
    """The kinds of layers that a backbone can have, with paths from where it begins.

    A lone encoder or decoder begins one step further down. A decoder also has what makes an encoder, so it is tried
    first.
    """
    if any(True for kind in family.kinds for _ in _blocks(backbone, kind)):
        return family.kinds
    for decoder in (True, False):
        half = [kind for kind in family.kinds if kind.decoder == decoder]
        part = [replace(kind, blocks=kind.blocks.partition(".")[2]) for kind in half]
        if part and all(any(True for _ in _blocks(backbone, kind)) for kind in part):
            return tuple(part)
    return ()


def _blocks(backbone: PreTrainedModel, kind: Family) -> Iterator[tuple[tuple[int, ...], nn.Module]]:
    pattern = re.compile(re.escape(kind.blocks).replace(r"\*", r"(\d+)"))
    for name, child in backbone.base_model.named_modules():
        if (match := pattern.fullmatch(name)) and hasattr(child, kind.attention.partition(".")[0]):
            yield tuple(map(int, match.groups())), child


def find_by_type(root: nn.Module) -> list[Found]:
    """Every unpacked ``nn.MultiheadAttention`` and timm ``Attention``; its block is the module that holds it."""
    found: list[Found] = []
    for name, child in root.named_modules():
        if isinstance(child, MultiHeadAttention | TimmAttention):
            block = root.get_submodule(name.rpartition(".")[0])
            family = plain_family(block) if isinstance(child, MultiHeadAttention) else timm_family(child, block)
            found.append(Found(name, child, block, family))
    return found


def find_mlp(block: nn.Module, family: Family) -> FeedForward | None:
    """Where a block keeps its MLP; None where it has none, or one that is not like the record says."""
    records = (family.mlp, *family.other_mlp)
    return next((record for record in records if record is not None and _fits(block, record, family)), None)


def _fits(block: nn.Module, record: FeedForward, family: Family) -> bool:
    if not all(_has(block, path) for path in (record.up, record.gate, record.down) if path):
        return False
    up, down = (attribute(block, path).get_parameter("weight") for path in (record.up, record.down))
    neurons_in, neurons_out = (up.shape[1], down.shape[0]) if family.transposed else (up.shape[0], down.shape[1])
    return bool(neurons_in == neurons_out * (2 if record.fused else 1))


def _has(block: nn.Module, path: str) -> bool:
    try:
        module = attribute(block, path)
    except AttributeError:
        return False
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def no_attention(module: nn.Module) -> UnsupportedModelError:
    """The error for a module in which nothing was found."""
    return UnsupportedModelError(
        f"{type(module).__name__} has no attention layer that headwise knows",
        expected="a transformers model of type "
        + ", ".join(sorted(FAMILIES))
        + ", or nn.MultiheadAttention or timm's Attention inside",
        fix="build the model on nn.MultiheadAttention, or add a family record (CONTRIBUTING.md)",
    )
