"""Gates that say how much a kv head needs all tokens, found on calibration text (DuoAttention, arXiv 2410.10819).

Every head gives ``gate * full + (1 - gate) * streaming`` attention. The gates of all kv heads start at 1, the model is
frozen, and AdamW makes them small where the final hidden states stay what they are. Nothing is random.

Shape letters: B batch rows, T tokens, D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headwise.calibration.streaming import GateTraining, Span
from headwise.calibration.tasks import Batch, Examples, Task
from headwise.model.access import watched_input
from headwise.model.attend import replaced
from headwise.model.bands import Band
from headwise.model.forward import run, to_torch
from headwise.model.masks import seen_keys
from headwise.model.view import ModelView
from headwise.model.windows import visible_whole


def train_gates(
    view: ModelView,
    task: Task,
    examples: Examples,
    span: Span,
    training: GateTraining,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Find the gates.

    The loss is the squared difference of the final hidden states, relative to their mean square, over the tokens that
    are no padding, and ``training.penalty`` times the mean gate. Mixed heads read the hidden states that mixed heads
    of earlier layers give.

    Args:
        view: a causal model; its weights are not changed.
        task: gives the signal that stands in for hidden states where a model has no output embeddings.
        examples: calibration samples; their batches come in turn, the same order every time.
        span: what a streaming head sees.
        training: how long, and how hard gates are pulled towards 0.
        batch_size: samples per step.
        progress: called with the share of the samples that a finished step stands for.

    Returns:
        Per layer (K,) gates from 0, streams without loss, to 1.
    """
    gates = [torch.ones(len(layer.layout.kv), requires_grad=True) for layer in view.attention]
    optimizer = torch.optim.AdamW(gates, lr=training.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training.steps))
    batches = itertools.cycle(examples.batches(batch_size))
    for step in range(training.steps):
        batch = next(batches)
        with torch.no_grad():
            target = _hidden(view, task, batch)
        with ExitStack() as stack, torch.enable_grad():
            for layer, gate in zip(view.attention, gates, strict=True):
                stack.enter_context(replaced(layer.caller, _Mixed(gate, span, layer.family.bidirectional)))
            lost = (_hidden(view, task, batch) - target).square().mean() / target.square().mean()
            (lost + training.penalty * torch.cat(gates).abs().mean()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for gate in gates:
                gate.clamp_(0.0, 1.0)
        if progress is not None:
            progress(len(examples) * (step + 1) // training.steps - len(examples) * step // training.steps)
    return tuple(gate.detach().double() for gate in gates)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: rising in the first fifth of the steps, falling in the last, at least a tenth."""
    fifth = max(1, steps // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _hidden(view: ModelView, task: Task, batch: Batch) -> torch.Tensor:
    """(tokens, D) final hidden states of real tokens: what the output embeddings read."""
    head: nn.Module | None = getattr(view.module, "get_output_embeddings", lambda: None)()
    if head is None:
        return task.signal(run(view.module, to_torch(batch.inputs)), batch)
    seen: list[torch.Tensor] = []
    with watched_input(head, seen.append):
        run(view.module, to_torch(batch.inputs))
    valid = batch.valid()
    return seen[0].flatten(0, 1) if valid is None else seen[0][torch.as_tensor(valid)]


class _Mixed:
    """Attention of a layer whose kv heads are gated: (K,) gates between full and streaming attention."""

    def __init__(self, gate: torch.Tensor, span: Span, bidirectional: bool) -> None:
        self.gate, self.bidirectional = gate, bidirectional
        self.band = Band(span.sink, span.recent)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """See ``attend``."""
        near = visible_whole(seen_keys(mask), self.band, query.shape[2], key.shape[2], self.bidirectional)
        full, streaming = (
            sdpa_attention_forward(module, query, key, value, seen, **options)[0] for seen in (mask, near)
        )
        gates = self.gate.repeat_interleave(query.shape[1] // key.shape[1])[:, None]
        return gates * full + (1 - gates) * streaming
