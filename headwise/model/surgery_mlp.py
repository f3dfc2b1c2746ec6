"""Surgery on MLPs.

Shape letters: D model width, F neurons.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from headwise.model.access import attribute
from headwise.model.mlp import MlpView, MlpWeights
from headwise.model.neurons import DropNeurons, MlpLayout
from headwise.model.surgery_store import store


def drop_neurons(view: MlpView, edit: DropNeurons) -> None:
    """Slice removed neurons out of all projections. Exact twin: their gates at zero."""
    layout = edit.apply(view.layout)
    gone = set(edit.neurons)
    kept = [position for position, neuron in enumerate(view.layout.neurons) if neuron not in gone]
    old = view.read()
    new = replace(
        old,
        up=old.up[kept],
        gate=_pick(old.gate, kept),
        down=old.down[:, kept],
        up_bias=_pick(old.up_bias, kept),
        gate_bias=_pick(old.gate_bias, kept),
    )
    write_mlp(view, new, layout)


def reshape_mlp(view: MlpView, layout: MlpLayout) -> None:
    """Give an MLP the shapes of ``layout``, with zeros in it, so that saved weights can be loaded."""
    old, count = view.read(), len(layout.neurons)
    zeros = replace(
        old,
        up=old.up.new_zeros(count, old.up.shape[1]),
        gate=None if old.gate is None else old.gate.new_zeros(count, old.gate.shape[1]),
        down=old.down.new_zeros(old.down.shape[0], count),
        up_bias=None if old.up_bias is None else old.up_bias.new_zeros(count),
        gate_bias=None if old.gate_bias is None else old.gate_bias.new_zeros(count),
    )
    write_mlp(view, zeros, layout)


def write_mlp(view: MlpView, new: MlpWeights, layout: MlpLayout) -> None:
    """Store the weights the way the family stores them."""
    record = view.record
    up, up_bias = new.up, new.up_bias
    if record.fused:
        assert new.gate is not None
        up = torch.cat([new.gate, up])
        up_bias = None if up_bias is None or new.gate_bias is None else torch.cat([new.gate_bias, up_bias])
    elif new.gate is not None:
        store(attribute(view.block, record.gate), new.gate, new.gate_bias, transposed=view.transposed)
    store(attribute(view.block, record.up), up, up_bias, transposed=view.transposed)
    store(view.output, new.down, new.down_bias, transposed=view.transposed)
    view.layout = layout


def _pick(tensor: torch.Tensor | None, kept: list[int]) -> torch.Tensor | None:
    return None if tensor is None else tensor[kept]
