"""Keys and values of one or several layers as functions of one input, and the weights that a latent gives them.

Shape letters: D model width, N query heads, K kv heads, H head_dim, r rank of the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.calibration.latent import Block, JointLatent
from headwise.calibration.stats import HeadStats, Stat
from headwise.model.latent import LatentProjections
from headwise.model.latent_surgery import LatentWeights, affine, latent_biases
from headwise.model.projections import Projections
from headwise.model.view import AttentionView
from headwise.passes.kv_weights import error_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A layer whose keys and values are to be computed from a latent of some input x.

    Attributes:
        layer: the layer.
        old: its weights.
        key: (K, H, D) such that keys are about ``key`` times x and a constant; ``value`` likewise.
        key_mean: (K, H) mean key; ``value_mean`` likewise.
        key_weights: (K, H, H) how errors count, see ``calibration.merge``; ``value_weights``.
        keeps: whether keys, and values, keep a bias behind the latent; see ``latent_biases``.
    """

    layer: AttentionView
    old: Projections
    key: torch.Tensor
    value: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_weights: torch.Tensor
    value_weights: torch.Tensor
    keeps: tuple[bool, bool]

    @classmethod
    def of(cls, layer: AttentionView, stats: HeadStats, translator: torch.Tensor | None = None) -> Reader:
        """Prepare a layer.

        Args:
            layer: the layer.
            stats: with the moments of its inputs.
            translator: (D, D + 1) that computes the layer's input from x, its last column a constant; None where x is
                the layer's input.
        """
        old, moment = layer.read(), stats[Stat.INPUT_MOMENT][layer.index]
        key_weights, value_weights = error_weights(old, stats[Stat.QUERY_MOMENT][layer.index])
        mean = moment[-1, :-1]
        key, value = old.key.double(), old.value.double()
        key_mean, value_mean = key @ mean, value @ mean
        if old.key_bias is not None:
            key_mean = key_mean + old.key_bias.double()
        if old.value_bias is not None:
            value_mean = value_mean + old.value_bias.double()
        if translator is not None:
            key, value = key @ translator[:, :-1], value @ translator[:, :-1]
        return cls(
            layer=layer,
            old=old,
            key=key,
            value=value,
            key_mean=key_mean,
            value_mean=value_mean,
            key_weights=key_weights,
            value_weights=value_weights,
            keeps=latent_biases(layer),
        )

    @property
    def blocks(self) -> tuple[Block, Block]:
        """Keys and values."""
        return Block(heads=self.key, weights=self.key_weights), Block(heads=self.value, weights=self.value_weights)

    def unweighted(self) -> tuple[Block, Block]:
        """The same where all errors count alike."""
        parts = []
        for heads in (self.key, self.value):
            identity = torch.eye(heads.shape[1], dtype=torch.float64).repeat(len(heads), 1, 1)
            parts.append(Block(heads=heads, weights=identity))
        return parts[0], parts[1]

    def biases(
        self, down: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, mean: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Biases of keys and values and what the output bias gains, so that all are right on average.

        Args:
            down: (r, D), or None where the latent is x.
            key: (K, H, r) from the latent; ``value`` likewise.
            value: see ``key``.
            mean: (D,) mean of x; None where constants stay as they are.
        """
        if mean is None:
            return self.old.key_bias, self.old.value_bias, None
        latent = mean if down is None else down @ mean
        key_left, value_left = self.key_mean - key @ latent, self.value_mean - value @ latent
        keeps_key, keeps_value = self.keeps
        if keeps_value:
            return key_left if keeps_key else None, value_left, None
        group = self.old.output.shape[1] // len(value_left)
        per_query = value_left.repeat_interleave(group, dim=0)
        folded = torch.einsum("dnh,nh->d", self.old.output.double(), per_query)
        return key_left if keeps_key else None, None, folded


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentProblem:
    """Several readers of one input, and the latents that serve them all.

    Attributes:
        readers: the layers; the first computes the latent from its own input.
        mean: (D,) mean of that input; None where a reader has no place for constants.
        latent: the latents of all ranks.
    """

    readers: tuple[Reader, ...]
    mean: torch.Tensor | None
    latent: JointLatent

    @classmethod
    def of(
        cls, readers: Sequence[Reader], moment: torch.Tensor, *, data: bool, weighted: bool, balanced: bool
    ) -> LatentProblem:
        """Args:
        readers: the layers.
        moment: (D + 1, D + 1) second moment of the first one's input, with a 1 behind it.
        data: look at inputs; otherwise all directions of the input count alike.
        weighted: weight errors by queries and output projections.
        balanced: give keys and values of every layer the same say.
        """
        mean = moment[-1, :-1] if all(reader.keeps[1] or affine(reader.layer) for reader in readers) else None
        second = moment[:-1, :-1] if mean is None else moment[:-1, :-1] - torch.outer(mean, mean)
        if not data:
            second = torch.eye(len(second), dtype=torch.float64)
        blocks = [block for reader in readers for block in (reader.blocks if weighted else reader.unweighted())]
        return cls(readers=tuple(readers), mean=mean, latent=JointLatent(blocks, second, balanced=balanced))

    @property
    def width(self) -> int:
        """D."""
        return self.readers[0].key.shape[2]

    @property
    def full(self) -> int:
        """The rank at which nothing is lost."""
        return min(self.width, len(self.latent.energy))

    def solve(self, rank: int) -> tuple[LatentWeights, ...]:
        """The numbers of every reader's edit; of full width, the latent is the input itself."""
        down: torch.Tensor | None = None
        ups: tuple[torch.Tensor, ...]
        if rank == self.width:
            ups = tuple(heads for reader in self.readers for heads in (reader.key, reader.value))
        else:
            down, ups = self.latent.factor(rank)
        found = []
        for index, reader in enumerate(self.readers):
            key, value = ups[2 * index : 2 * index + 2]
            key_bias, value_bias, output_bias = reader.biases(down, key, value, self.mean)
            projections = LatentProjections(
                owns=index == 0,
                down=down if index == 0 else None,
                key=key,
                value=value,
                key_bias=key_bias,
                value_bias=value_bias,
            )
            found.append(LatentWeights(projections=projections, output_bias=output_bias))
        return tuple(found)
