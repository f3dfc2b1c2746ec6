"""Find attention layers and MLPs in a module: by the paths of a family record, or by type in plain modules."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import UnsupportedModelError
from headwise.model.access import attribute
from headwise.model.attention import MultiHeadAttention
from headwise.model.families import FAMILIES, Family, FeedForward, family_of, plain_family, timm_family
from headwise.model.timm_attention import TimmAttention

Found = tuple[str, nn.Module, nn.Module, Family]
"""Path from the root, attention module, block around it, and the record that describes them."""


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


def find_by_type(root: nn.Module) -> list[Found]:
    """Every unpacked ``nn.MultiheadAttention`` and timm ``Attention``; its block is the module that holds it."""
    found: list[Found] = []
    for name, child in root.named_modules():
        block: Any = attribute(root, name.rpartition(".")[0])
        if isinstance(child, MultiHeadAttention):
            found.append((name, child, block, plain_family(block)))
        elif isinstance(child, TimmAttention):
            found.append((name, child, block, timm_family(child, block)))
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
