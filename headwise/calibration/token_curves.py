"""What it costs when every head of a layer meets a share of the keys only, and how much attention the ends receive.

In a decoder the first half of every sample is a prompt, of which a head keeps a share for the queries behind it; what a
token is worth is said by the last queries of the prompt.

Shape letters: B batch rows, T tokens, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from headwise.calibration.tasks import Examples
from headwise.calibration.tokens import valid_mask
from headwise.model.forward import run, to_torch
from headwise.model.prompt_tokens import prompt_length
from headwise.model.view import AttentionView, ModelView

SHARES = 8
"""Costs are measured at multiples of one eighth of the tokens."""
ENDS = 16
"""Attention is summed over so many tokens at either end of a sample, or of a prompt."""
ASKED = 16
"""Last queries of a prompt that say what its tokens are worth."""


class _Roles(NamedTuple):
    """What the tokens of a batch are for, (B, T) each.

    Attributes:
        asked: their queries say what a token is worth.
        prunable: a head may have to do without them.
        judged: their outputs are compared.
    """

    asked: torch.Tensor
    prunable: torch.Tensor
    judged: torch.Tensor

    @classmethod
    def of(cls, valid: torch.Tensor, *, decoder: bool) -> _Roles:
        """From the tokens that are no padding."""
        if not decoder:
            return cls(valid, valid, valid)
        place, length = valid.cumsum(1), prompt_length(valid.sum(1, keepdim=True))
        prompt = valid & (place <= length)
        return cls(prompt & (place > length - ASKED), prompt, valid & ~prompt)


class _Sums:
    """Running sums of one layer.

    Attributes:
        change: (SHARES,) squared change of the layer output when every kv head keeps 1/8, 2/8, ... of the tokens.
        size: squared layer output.
        ends: (2, ENDS) attention that the first 1, 2, ... tokens receive, and the last.
        queries: queries of all heads that were asked.
        group, decoder: of the layer.
    """

    def __init__(self, layer: AttentionView) -> None:
        self.group, self.decoder = layer.layout.group, layer.caches
        self.output = layer.read().output
        self.change = torch.zeros(SHARES, dtype=torch.float64)
        self.size = torch.zeros((), dtype=torch.float64)
        self.ends = torch.zeros(2, ENDS, dtype=torch.float64)
        self.queries = 0

    def add(self, mask: torch.Tensor | None, weights: torch.Tensor, values: torch.Tensor) -> None:
        """Add one forward pass: weights (B, N, T, T), values (B, N, T, H), and which tokens are valid, (B, T)."""
        rows, _, tokens, _ = weights.shape
        alike = mask is not None and mask.shape == (rows, tokens)
        valid = mask if mask is not None and alike else torch.ones(rows, tokens, dtype=torch.bool)
        roles = _Roles.of(valid, decoder=self.decoder)
        received = (weights * roles.asked[:, None, :, None]).sum(2)
        own = received.unflatten(1, (-1, self.group)).sum(2) * values[:, :: self.group].norm(dim=-1)
        ranks = own.masked_fill(~roles.prunable[:, None], -1).argsort(-1, descending=True).argsort(-1)
        ranks = ranks.repeat_interleave(self.group, dim=1)
        count = roles.prunable.sum(1)
        before = self._written(weights, values)[roles.judged]
        self.size += before.double().square().sum()
        for share in range(1, SHARES):
            kept = ranks < ((count * share + SHARES - 1) // SHARES)[:, None, None]
            kept |= (valid & ~roles.prunable)[:, None]
            left = weights * kept[:, :, None]
            after = self._written(left / left.sum(-1, keepdim=True).clamp_min(1e-30), values)[roles.judged]
            self.change[share - 1] += (after - before).double().square().sum()
        place = valid.cumsum(1)
        for end, distance in enumerate((place, count[:, None] - place + 1)):
            for far in range(ENDS):
                near = (distance <= far + 1) & roles.prunable
                self.ends[end, far] += (received * near[:, None]).double().sum()
        self.queries += int(roles.asked.sum()) * weights.shape[1]

    def _written(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnth,dnh->btd", weights @ values, self.output)


def token_curves(
    view: ModelView, examples: Examples, *, batch_size: int = 32, progress: Callable[[int], None] | None = None
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Measure all layers in one run.

    Args:
        view: the model, whose layers attend to their own tokens.
        examples: calibration samples.
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Returns:
        Per layer (SHARES,): the squared change of the layer output, relative to its square, when every kv head keeps
        1/8, 2/8, ... 8/8 of the tokens. Per layer (2, ENDS): the share of attention that the first 1, 2, ... tokens
        receive, and the last; in a decoder from the last queries of prompts.
    """
    sums = [_Sums(layer) for layer in view.attention]
    for batch in examples.batches(batch_size):
        with ExitStack() as stack, torch.inference_mode():
            for layer, found in zip(view.attention, sums, strict=True):
                add = partial(found.add, valid_mask(batch, layer.family))
                stack.enter_context(layer.watch_weights(add))
            run(view.module, to_torch(batch.inputs))
        if progress is not None:
            progress(len(batch.samples))
    costs = tuple(found.change / found.size.clamp_min(1e-30) for found in sums)
    return costs, tuple(found.ends / max(found.queries, 1) for found in sums)
