"""The MLP of one transformer block: read its weights, gate its neurons, watch them. Nothing here changes a weight.

Shape letters: B batch, T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.model.access import See, attribute, hooked, matrix, watched_input, watched_output
from headwise.model.families import Family, FeedForward
from headwise.model.layout import MlpLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """The weights of one MLP, in this orientation for every family.

    Attributes:
        up: (F, D); ``gate``: (F, D), or None where the MLP has no gate.
        down: (D, F).
        up_bias, gate_bias: (F,) or None; ``down_bias``: (D,) or None.
    """

    up: torch.Tensor
    gate: torch.Tensor | None
    down: torch.Tensor
    up_bias: torch.Tensor | None
    gate_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class MlpView:
    """The MLP of one block.

    Attributes:
        index: position in ``ModelView.mlp``.
        path: dotted name of the block from the root of the model; ``block``: the block itself.
        record: where the block keeps its MLP.
        family: the record of the block's attention; it says how weights are stored and which tokens there are.
        runs: how often one forward of the model passes through it; its hooks see every run.
        residual: whether it is known what the output is added to.
        layout: the neurons that it has; surgery sets it together with the weights.
    """

    def __init__(
        self, index: int, path: str, block: nn.Module, family: Family, record: FeedForward, *, runs: int = 1
    ) -> None:
        self.index = index
        self.path = path
        self.block = block
        self.record = record
        self.family = family
        self.runs = runs
        self.residual = bool(record.residual)
        self.layout = self.count()

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted names of its projections from the root of the model."""
        names = (self.record.up, self.record.gate, self.record.down)
        return tuple(".".join(filter(None, (self.path, name))) for name in names if name)

    @property
    def output(self) -> nn.Module:
        """The projection out of the neurons; its input is what they give, (B, T, F)."""
        module = attribute(self.block, self.record.down)
        assert isinstance(module, nn.Module)
        return module

    def linear(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The down projection as (D, F), and its bias."""
        return matrix(self.output, transposed=self.family.transposed)

    def count(self) -> MlpLayout:
        """The layout that the weights have now, with neurons numbered by position."""
        neurons = self.linear()[0].shape[1]
        return MlpLayout(neurons=tuple(range(neurons)), width=neurons)

    def read(self) -> MlpWeights:
        """The MLP's weights; views of the stored ones where possible."""
        up, up_bias = matrix(attribute(self.block, self.record.up), transposed=self.family.transposed)
        gate, gate_bias = None, None
        if self.record.fused:
            gate, up = up.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        elif self.record.gate:
            gate, gate_bias = matrix(attribute(self.block, self.record.gate), transposed=self.family.transposed)
        down, down_bias = self.linear()
        return MlpWeights(up=up, gate=gate, down=down, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias)

    @contextmanager
    def gate(self, scale: torch.Tensor, instead: torch.Tensor | None = None) -> Iterator[None]:
        """Scale what each neuron gives while the block runs.

        Args:
            scale: (F,), or (B, F) for one gate per sample. Zero is the exact twin of removing the neuron.
            instead: (F,) what a closed neuron gives in place of zero.
        """

        def scaled(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # Some blocks flatten samples and tokens before their MLP: (B * T, F).
            neurons = args[0]
            per_row = neurons.unflatten(0, (len(scale), -1)) if scale.dim() == 2 == neurons.dim() else neurons
            gates = scale if scale.dim() == 1 else scale[:, None]
            gated = per_row * gates if instead is None else instead + (per_row - instead) * gates
            return (gated.reshape(neurons.shape), *args[1:])

        with hooked(self.output.register_forward_pre_hook(scaled)):
            yield

    def watch_neurons(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with what the neurons give, (B, T, F), on every forward."""
        return watched_input(self.output, see)

    def watch_input(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the MLP's input, (B, T, D), on every forward."""
        return watched_input(attribute(self.block, self.record.up), see)

    def watch_output(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the output of the down projection, (B, T, D)."""
        return watched_output(self.output, see)

    def watch_residual(self, see: See) -> AbstractContextManager[None]:
        """Call ``see`` with the residual stream that the output is added to, (B, T, D); never where there is none."""
        if not self.residual:
            return nullcontext()
        return watched_input(attribute(self.block, self.record.residual), see)
