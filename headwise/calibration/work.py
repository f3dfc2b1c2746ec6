"""How many tokens every layer works on, and what its heads and neurons cost in multiply-accumulates.

Counted like ``gates.macs`` counts the exported graph: matrix products and attention; a causal mask lowers nothing.

Shape letters: T query tokens, S key tokens, D model width, H head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from headwise.model.access import watched_input
from headwise.model.forward import run
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What removing one thing from an attention layer or MLP saves, in multiply-accumulates.

    Attributes:
        query: one query head; ``kv``: one kv head; both 0 for an MLP.
        neuron: one neuron; 0 for an attention layer.
    """

    query: int = 0
    kv: int = 0
    neuron: int = 0


def count_tokens(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Per attention layer, then per MLP, (3,): T, S and T * S, summed over all calls in one forward pass of one row.

    An MLP has no keys: its S and T * S are 0.
    """
    layers: tuple[AttentionView | MlpView, ...] = (*view.attention, *view.mlp)
    totals = tuple(torch.zeros(3, dtype=torch.long) for _ in layers)
    keys = [0] * len(layers)

    def projected(index: int, inputs: torch.Tensor) -> None:
        keys[index] = _rows(inputs)

    def mixed(index: int, features: torch.Tensor) -> None:
        queries = _rows(features)
        totals[index].add_(torch.tensor([queries, keys[index], queries * keys[index]]))

    with ExitStack() as stack, torch.inference_mode():
        for index, layer in enumerate(layers):
            if isinstance(layer, AttentionView):
                stack.enter_context(layer.watch_input(partial(projected, index)))
            stack.enter_context(watched_input(layer.output, partial(mixed, index)))
        run(view.module, dict(inputs))
    return totals


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


def work_of(layer: AttentionView | MlpView, tokens: torch.Tensor) -> Work:
    """Costs of one head or neuron of a layer that works on so many tokens, see ``count_tokens``."""
    queries, keys, pairs = tokens.tolist()
    if isinstance(layer, MlpView):
        weights = layer.read()
        inputs = weights.up.shape[1] * (1 if weights.gate is None else 2)
        return Work(neuron=queries * (inputs + weights.down.shape[0]))
    projections = layer.read()
    _, H, D = projections.query.shape
    query = queries * H * (D + projections.output.shape[0]) + 2 * pairs * H
    return Work(query=query, kv=keys * H * (projections.key.shape[2] + projections.value.shape[2]))


def block_macs(view: ModelView, tokens: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of all attention layers and MLPs."""
    total = 0
    layers: tuple[AttentionView | MlpView, ...] = (*view.attention, *view.mlp)
    for layer, counted in zip(layers, tokens, strict=True):
        work = work_of(layer, counted)
        if isinstance(layer, MlpView):
            total += work.neuron * len(layer.layout.neurons)
        else:
            total += work.query * len(layer.layout.query) + work.kv * len(layer.layout.kv)
    return total
