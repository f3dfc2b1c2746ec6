"""What it costs when the readers of a kv head see the first and the last tokens only.

Shape letters: B batch rows, T query tokens, S key tokens, D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headwise.model.bands import Band
from headwise.model.view import AttentionView
from headwise.model.windows import visible_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class GateTraining:
    """How gates on kv heads are found, see ``calibration.stream_gates``.

    Attributes:
        steps: of AdamW, one batch each.
        penalty: weight of the mean gate beside the relative squared difference of the final hidden states.
        rate: learning rate.
    """

    steps: int
    penalty: float
    rate: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What a streaming head sees: the first ``sink`` tokens of a text and the last ``recent``, its own included.

    In a bidirectional layer it sees as many of the next tokens.

    Attributes:
        sink, recent: see above.
        training: how gates are found; None where nobody asks for them.
    """

    sink: int
    recent: int
    training: GateTraining | None = None


class WindowSums:
    """Running sums over the attention weights of one layer.

    Attributes:
        cost: (K,) sum over valid tokens of the squared change of the layer output when the readers of a kv head stream.
        tokens: valid query tokens so far.
    """

    def __init__(self, layer: AttentionView, span: Span) -> None:
        self.span = span
        self._bidirectional = layer.family.bidirectional
        self.cost = torch.zeros(len(layer.layout.kv), dtype=torch.float64)
        self.tokens = 0
        self._output = layer.read().output.unflatten(1, (len(layer.layout.kv), -1))

    @contextmanager
    def watched(self, layer: AttentionView, mask: torch.Tensor | None) -> Iterator[None]:
        """Add what ``layer`` computes while the block runs; ``mask`` is (B, T), true at valid tokens, or None."""

        def see(weights: torch.Tensor, values: torch.Tensor) -> None:
            self._add(weights.detach(), values.detach(), mask)

        with layer.watch_weights(see):
            yield

    def _add(self, weights: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        rows, _, tokens, _ = weights.shape
        valid = torch.ones(rows, tokens, dtype=torch.bool) if mask is None else mask
        band = Band(self.span.sink, self.span.recent)
        seen = visible_whole(mask, band, tokens, tokens, self._bidirectional)
        lost = (weights * ~seen).sum(-1, keepdim=True)
        left = weights * seen
        # A real token sees itself: some weight is left. Where none is lost, the sum must not differ from 1 by rounding.
        spread = left / torch.where(lost > 0, left.sum(-1, keepdim=True).clamp_min(1e-12), 1.0)
        change = (spread - weights) @ values
        groups = change.transpose(1, 2)[valid].unflatten(1, (len(self.cost), -1))
        written = torch.einsum("tkgh,dkgh->tkd", groups, self._output)
        self.cost += written.square().sum((0, 2)).double()
        self.tokens += int(valid.sum())
