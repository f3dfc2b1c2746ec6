"""Surgery on MLPs.

Shape letters: D model width, F neurons.
"""

from __future__ import annotations

from dataclasses import replace

from headwise.model.edits import DropNeurons
from headwise.model.layout import MlpLayout
from headwise.model.mlp import MlpView
from headwise.model.projections import pick
from headwise.model.writing import write_mlp


def drop_neurons(view: MlpView, edit: DropNeurons) -> None:
    """Slice removed neurons out of all projections. Exact twin: their gates at zero."""
    layout = edit.apply(view.layout)
    gone = set(edit.neurons)
    kept = [position for position, neuron in enumerate(view.layout.neurons) if neuron not in gone]
    old = view.read()
    new = replace(
        old,
        up=old.up[kept],
        gate=pick(old.gate, kept),
        down=old.down[:, kept],
        up_bias=pick(old.up_bias, kept),
        gate_bias=pick(old.gate_bias, kept),
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
