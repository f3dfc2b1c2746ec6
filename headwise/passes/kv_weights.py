"""The key and value heads of one layer, prepared for merging: biases folded or carried along, errors weighted.

Shape letters: D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.calibration.energy import GroupEnergy
from headwise.calibration.merge import Merged, missed
from headwise.model.projections import Projections
from headwise.model.shared_kv import SharedKV, ValueHeads
from headwise.model.view import AttentionView


@dataclass(frozen=True, slots=True, kw_only=True)
class KVWeights:
    """One layer's kv heads as merging sees them.

    Attributes:
        key: (K, H, D), or (K, H, D + 1) with the bias as last column where it is carried along; ``value`` likewise.
        key_moment: second moment of what ``key`` multiplies: centred where the bias was folded; ``value_moment``.
        key_weights: (K, H, H) how errors count, see ``calibration.merge``; ``value_weights``.
        mean: (D + 1,) mean input, with the 1 behind it.
        old: the layer's weights.
        fold_key: the key bias is dropped, which no query can see: it adds the same to every score of a query.
        fold_value: the value bias moves into the output bias, which is exact because attention weights sum to one.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_moment: torch.Tensor
    value_moment: torch.Tensor
    key_weights: torch.Tensor
    value_weights: torch.Tensor
    mean: torch.Tensor
    old: Projections
    fold_key: bool
    fold_value: bool

    @classmethod
    def of(
        cls, layer: AttentionView, moment: torch.Tensor, query_moment: torch.Tensor, *, fold: bool, weighted: bool
    ) -> KVWeights:
        """Prepare a layer.

        Args:
            layer: the layer.
            moment: (D + 1, D + 1) second moment of the input of keys and values with a 1 behind it.
            query_moment: the same for the input of queries.
            fold: fold biases where that is exact.
            weighted: weight errors by queries and output projection; otherwise all directions count the same.
        """
        old = layer.read()
        fold_key = fold and not (layer.family.rotary or layer.family.qk_norm or layer.family.soft_cap)
        fold_value = fold and old.output_bias is not None
        key, key_moment = _prepared(old.key, old.key_bias, moment, fold_key)
        value, value_moment = _prepared(old.value, old.value_bias, moment, fold_value)
        key_weights, value_weights = error_weights(old, query_moment)
        if not weighted:
            identity = torch.eye(key.shape[1], dtype=torch.float64)
            key_weights = value_weights = identity.repeat(len(key), 1, 1)
        return cls(
            key=key,
            value=value,
            key_moment=key_moment,
            value_moment=value_moment,
            key_weights=key_weights,
            value_weights=value_weights,
            mean=moment[-1].clone(),
            old=old,
            fold_key=fold_key,
            fold_value=fold_value,
        )

    def energies(self, rotated: int) -> tuple[GroupEnergy, GroupEnergy]:
        """What groups of these keys lose, ``rotated`` coordinates of which are turned by position, and of values."""
        return (
            GroupEnergy(self.key, self.key_moment, self.key_weights, rotated=rotated),
            GroupEnergy(self.value, self.value_moment, self.value_weights, rotated=0),
        )

    def assemble(self, keys: Sequence[Merged], values: Sequence[Merged], groups: Sequence[Sequence[int]]) -> SharedKV:
        """The numbers of the edit from one merged key and value head per group."""
        width = self.old.key.shape[2]
        position = {head: (g, m) for g, group in enumerate(groups) for m, head in enumerate(group)}
        places = [position[head] for head in range(len(self.old.key))]
        key, value = (torch.stack([m.shared for m in merged]) for merged in (keys, values))
        value_maps = torch.stack([values[g].maps[m] for g, m in places])
        left = torch.stack([self._missed(merged, list(group)) for merged, group in zip(values, groups, strict=True)])
        return SharedKV(
            key=key[..., :width],
            value=value[..., :width],
            key_bias=_bias(key, width, self.old.key_bias),
            value_bias=_bias(value, width, self.old.value_bias),
            key_maps=torch.stack([keys[g].maps[m] for g, m in places]),
            value_maps=value_maps,
            output_bias=self._output_bias(value, value_maps, [g for g, _ in places]) if self.fold_value else None,
            missed=ValueHeads(weight=left[..., :width], bias=_bias(left, width, self.old.value_bias)),
        )

    def _missed(self, merged: Merged, group: list[int]) -> torch.Tensor:
        return missed(merged, self.value[group], self.value_moment, self.value_weights[group])

    def _output_bias(self, value: torch.Tensor, maps: torch.Tensor, groups: list[int]) -> torch.Tensor:
        """What the old value heads give on average beyond what their maps of the shared heads give."""
        old, x = self.old, self.mean[:-1]
        had = old.value.double() @ x
        if old.value_bias is not None:
            had = had + old.value_bias.double()
        missing = had - (maps @ (value @ x)[groups][..., None])[..., 0]
        per_query = missing.repeat_interleave(old.output.shape[1] // len(missing), dim=0)
        return torch.einsum("dnh,nh->d", old.output.double(), per_query)


def _prepared(
    heads: torch.Tensor, bias: torch.Tensor | None, moment: torch.Tensor, fold: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads and the second moment of what they multiply."""
    weights, mean = heads.double(), moment[-1, :-1]
    if fold:
        return weights, moment[:-1, :-1] - torch.outer(mean, mean)
    if bias is None:
        return weights, moment[:-1, :-1]
    return torch.cat([weights, bias.double()[..., None]], dim=-1), moment


def error_weights(old: Projections, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, H, H) second moments of the queries that read each key head, and of the outputs that read each value head."""
    query = old.query.double()
    bias = torch.zeros(query.shape[:2], dtype=torch.float64) if old.query_bias is None else old.query_bias.double()
    query = torch.cat([query, bias[..., None]], dim=-1)
    per_query = query @ moment @ query.mT
    per_output = torch.einsum("dnh,dni->nhi", old.output.double(), old.output.double())
    kvs = len(old.key)
    return per_query.unflatten(0, (kvs, -1)).sum(1), per_output.unflatten(0, (kvs, -1)).sum(1)


def _bias(shared: torch.Tensor, width: int, old: torch.Tensor | None) -> torch.Tensor | None:
    """The shared heads' bias: carried along as last column, zero where it was folded, None where there is none."""
    if old is None:
        return None
    return shared[..., -1] if shared.shape[-1] > width else shared.new_zeros(shared.shape[:2])
