"""The numbers of edits that merge kv heads. K kv heads, G shared ones, H head_dim, D model width."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHeads:
    """The value heads of a layer.

    Attributes:
        weight: (K, H, D).
        bias: (K, H), or None where values have no bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def plus(self, maps: torch.Tensor, other: ValueHeads) -> ValueHeads:
        """These heads and ``maps``, (K, H, H), times the other ones, in float64."""
        bias = self.bias
        if bias is not None and other.bias is not None:
            bias = bias.double() + mapped(maps, other.bias)
        return ValueHeads(weight=self.weight.double() + mapped(maps, other.weight), bias=bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedKV:
    """The numbers of a ``ShareKV`` edit.

    Attributes:
        key: (G, H, D) shared key heads, in the order of the edit's groups; ``value``: the same for values.
        key_bias: (G, H), or None where keys have no bias; ``value_bias``: the same for values.
        key_maps: (K, H, H), one per old kv head in storage order: that head's keys are ``key_maps[j]`` times the keys
            of its group, up to what the merge loses; ``value_maps``: the same for values.
        output_bias: (D,) to add to the output bias; None where there is none.
        missed: what the shared value heads miss most of their groups, of which a refit may take something in.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    key_maps: torch.Tensor
    value_maps: torch.Tensor
    output_bias: torch.Tensor | None
    missed: ValueHeads


def mapped(maps: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """(J, H, H) times (J, H, D) or (J, H), in float64."""
    return torch.einsum("jab,jb...->ja...", maps.double(), heads.double())
