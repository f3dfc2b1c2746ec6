"""Statistics of heads and neurons, collected in one run over the calibration data, or two where means come first.

Shape letters: B batch rows, T tokens, D model width, N query heads of a layer, H head_dim, M heads of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from headwise.calibration.cross import CrossSums
from headwise.calibration.exchange import LARGEST, room
from headwise.calibration.faults import did_not_run, refuse_broken
from headwise.calibration.features import FeatureMoments, output_curvature
from headwise.calibration.maps import MapSums
from headwise.calibration.neurons import NeuronSums
from headwise.calibration.shapes import cost_row
from headwise.calibration.stream_gates import train_gates
from headwise.calibration.streaming import Span, WindowSums
from headwise.calibration.tasks import Batch, Examples, Task
from headwise.calibration.timing import LatencyTable
from headwise.calibration.token_curves import token_curves
from headwise.calibration.tokens import add_moment, valid_key_mask, valid_mask, valid_tokens
from headwise.calibration.units import Draws, Means, unit_gradients
from headwise.calibration.work import count_work
from headwise.model.forward import run, to_torch
from headwise.model.view import AttentionView, ModelView

Progress = Callable[[int], None]


class Stat(StrEnum):
    """What can be measured about heads and neurons; passes name the ones that they need."""

    CONTRIBUTION = "contribution"
    """Per layer (N,): mean over tokens of the L1 norm of the head's part of the layer output (arXiv 2504.21174)."""

    HEAD_MEAN = "head-mean"
    """Per layer (N, H): mean head output over tokens."""

    INPUT_MOMENT = "input-moment"
    """Per layer (D + 1, D + 1): mean over tokens of ``x x^T``, x = the input of keys and values with a 1 behind it."""

    QUERY_MOMENT = "query-moment"
    """The same for the input of queries, which is another sequence where a decoder attends to an encoder."""

    CROSS_MOMENT = "cross-moment"
    """Per layer (D + 1, D + 1): mean of ``x y^T``, y = the same of the earlier layer that ``pairs`` names for it;
    without entries where there is none."""

    MAP_SIMILARITY = "map-similarity"
    """Per layer (N, N): mean over samples of the cosine of two heads' attention weights (arXiv 2403.08058)."""

    EXCHANGE_COST = "exchange-cost"
    """Per layer (N, N): entry (i, j) is the mean over tokens of the squared change of the layer output when head i uses
    the attention weights of head j."""

    REPAIRED_COST = "repaired-cost"
    """The same when the output projection is solved anew for it, see ``calibration.exchange``; before that where the
    products of all layers would not fit in memory."""

    WINDOW_COST = "window-cost"
    """Per layer (K,): mean over tokens of the squared change of the layer output when the readers of a kv head see the
    first and the last tokens only, as many as ``span`` says."""

    STREAM_GATES = "stream-gates"
    """Per layer (K,): how much a kv head needs all tokens, from 0 to 1; see ``calibration.stream_gates``."""

    NEURON_MEAN = "neuron-mean"
    """Per MLP (F,): mean over tokens of what a neuron gives."""

    NEURON_SIZE = "neuron-size"
    """Per MLP (F,): mean over tokens of the absolute value of what a neuron gives."""

    FEATURE_MOMENT = "feature-moment"
    """Per attention layer, then per MLP, (F + 1, F + 1): mean over tokens of ``x x^T``, x = what the projection behind
    heads or neurons reads with a 1 behind it."""

    OUTPUT_CURVATURE = "output-curvature"
    """Per attention layer, then per MLP, (D, D): how much the signal depends on what that projection writes, see
    ``calibration.features``; needs no labels."""

    MACS = "macs"
    """Multiply-accumulates for one sample: of one unit of heads of every attention layer, of one neuron of every MLP,
    and (1,) of the whole model; see ``calibration.work``."""

    UNIT_FISHER = "unit-fisher"
    """Per attention layer (N, N), then per MLP (F,): mean product of a sample's gradients of the loss with respect to
    gates that put means in place of heads and neurons, see ``calibration.units``. Needs labels."""

    UNIT_GAUSS_NEWTON = "unit-gauss-newton"
    """The same shapes: E[J^T J] of the label-free signal, by Hutchinson draws."""

    TOKEN_COST = "token-cost"
    """Per layer (8,): relative squared change of its output when heads keep 1/8, 2/8, ... of the tokens."""
    END_ATTENTION = "end-attention"
    """Per layer (2, 16): share of attention that the first 1, 2, ... tokens receive, and the last."""

    LOSS_GRADIENT = "loss-gradient"
    """Per layer (samples, N): gradient of the sample's task loss with respect to gates on the heads. Needs labels."""

    GAUSS_NEWTON = "gauss-newton"
    """One (M, M) matrix E[J^T J], J = d signal / d gates, by Hutchinson draws; needs no labels."""


GRADIENTS = frozenset({Stat.LOSS_GRADIENT, Stat.GAUSS_NEWTON})
WEIGHTS = frozenset({Stat.MAP_SIMILARITY, Stat.EXCHANGE_COST, Stat.REPAIRED_COST})
MOMENTS = frozenset({Stat.INPUT_MOMENT, Stat.QUERY_MOMENT})
NEURONS = frozenset({Stat.NEURON_MEAN, Stat.NEURON_SIZE})
UNITS = frozenset({Stat.UNIT_FISHER, Stat.UNIT_GAUSS_NEWTON})
LABELLED = frozenset({Stat.LOSS_GRADIENT, Stat.UNIT_FISHER})
RUNS = UNITS | {Stat.OUTPUT_CURVATURE, Stat.STREAM_GATES, Stat.TOKEN_COST, Stat.END_ATTENTION}
"""Statistics that take a run of their own, behind the one for all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """Statistics over one set of samples.

    Attributes:
        values: statistic -> one tensor per layer (``GAUSS_NEWTON``: one tensor in all).
        samples: number of samples.
        digest: digest of the data that they were collected on.
        latency: what layers take on some machine, for passes that are ``timed``.
    """

    values: Mapping[Stat, tuple[torch.Tensor, ...]]
    samples: int
    digest: str
    latency: LatencyTable | None = None

    def __getitem__(self, stat: Stat) -> tuple[torch.Tensor, ...]:
        return self.values[stat]


def collect(
    view: ModelView,
    task: Task,
    examples: Examples,
    needs: Collection[Stat],
    *,
    batch_size: int = 32,
    draws: int = 4,
    seed: int = 0,
    pairs: Mapping[int, int] | None = None,
    span: Span | None = None,
    sequence: int | None = None,
    progress: Progress | None = None,
) -> HeadStats:
    """Run the model over ``examples`` and keep what ``needs`` asks for.

    Args:
        view: the model; its weights are not changed.
        task: reads the model's outputs; gives the loss and the label-free signal.
        examples: calibration samples.
        needs: the statistics to collect.
        batch_size: samples per batch; results do not depend on it beyond rounding.
        draws: random projections of the signal per sample for Gauss-Newton statistics.
        seed: seed of these projections.
        sequence: tokens per sample for ``MACS``; None: 128, or what the model can take.
        pairs: layer -> earlier layer, for ``CROSS_MOMENT``.
        span: what heads see that stream, for ``WINDOW_COST`` and ``STREAM_GATES``.
        progress: called with the number of samples of every finished batch, in the longer run where there are two.

    Raises:
        DataError: a statistic is not finite on these data.
    """
    asked = frozenset(needs)
    units = asked & UNITS
    sums = _Sums(view, asked | ({Stat.HEAD_MEAN, Stat.NEURON_MEAN} if units else set()), draws, seed)
    sums.cross = CrossSums(pairs or {})
    if span is not None and Stat.WINDOW_COST in asked:
        sums.windows = [WindowSums(layer, span) for layer in view.attention]
    for batch in examples.batches(batch_size):
        sums.add(task, examples, batch)
        if progress is not None and not asked & RUNS:
            progress(len(batch.samples))
    values = sums.values(len(examples))
    given: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if units:
        means = Means(heads=values[Stat.HEAD_MEAN], neurons=values[Stat.NEURON_MEAN])
        for stat in sorted(units):
            chosen = Draws(count=draws, seed=seed) if stat == Stat.UNIT_GAUSS_NEWTON else None
            values[stat] = unit_gradients(view, task, examples, means, chosen, **given)
    if Stat.OUTPUT_CURVATURE in asked:
        values[Stat.OUTPUT_CURVATURE] = output_curvature(view, task, examples, seed=seed, **given)
    if asked & {Stat.TOKEN_COST, Stat.END_ATTENTION}:
        values |= dict(zip((Stat.TOKEN_COST, Stat.END_ATTENTION), token_curves(view, examples, **given), strict=True))
    if Stat.STREAM_GATES in asked and span is not None and span.training is not None:
        values[Stat.STREAM_GATES] = train_gates(view, task, examples, span, span.training, **given)
    if Stat.MACS in asked:
        work = count_work(view, to_torch(cost_row(view.module, examples, sequence)))
        values[Stat.MACS] = (torch.tensor(work.heads), torch.tensor(work.neurons), torch.tensor([work.total]))
    refuse_broken(values)
    return HeadStats(values=values, samples=len(examples), digest=examples.digest)


class _Sums:
    """Running sums of the requested statistics over batches."""

    def __init__(self, view: ModelView, needs: frozenset[Stat], draws: int, seed: int) -> None:
        self.view = view
        self.needs = needs
        self.draws = draws
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = [0] * len(view.attention)
        self.contribution = [torch.zeros(len(v.layout.query), dtype=torch.float64) for v in view.attention]
        self.mean = [torch.zeros(len(v.layout.query), v.layout.head_dim, dtype=torch.float64) for v in view.attention]
        self.moments: dict[int, torch.Tensor] = {}
        self.query_moments: dict[int, torch.Tensor] = {}
        self.gradients: list[torch.Tensor] = []
        heads = sum(len(v.layout.query) for v in view.attention)
        self.gauss_newton = torch.zeros(heads, heads, dtype=torch.float64)
        self.weights = [v.read().output for v in view.attention]
        self.cross = CrossSums({})
        self.windows: list[WindowSums] = []
        self.neurons = NeuronSums(view)
        self.features = FeatureMoments(view)
        repaired = Stat.REPAIRED_COST in needs and room(view.attention) <= LARGEST
        cost = Stat.EXCHANGE_COST in needs or (Stat.REPAIRED_COST in needs and not repaired)
        self.maps = [MapSums(v, cost=cost, repaired=repaired) for v in view.attention]

    def add(self, task: Task, examples: Examples, batch: Batch) -> None:
        inputs = to_torch(batch.inputs)
        with_gradient = bool(self.needs & GRADIENTS)
        rows = len(batch.samples) * batch.per_sample
        gates = [torch.ones(rows, len(v.layout.query), requires_grad=with_gradient) for v in self.view.attention]
        with ExitStack() as stack, torch.set_grad_enabled(with_gradient):
            stack.enter_context(self.cross.watched(self.view, batch))
            if self.needs & NEURONS:
                stack.enter_context(self.neurons.watched(batch))
            if Stat.FEATURE_MOMENT in self.needs:
                stack.enter_context(self.features.watched(batch))
            for layer in self.view.attention:
                family = layer.family
                mask = valid_mask(batch, family)
                stack.enter_context(self._watched(layer, mask))
                if self.needs & MOMENTS:
                    keys = valid_key_mask(batch, family)
                    stack.enter_context(layer.watch_input(partial(add_moment, self.moments, layer.index, keys)))
                if Stat.QUERY_MOMENT in self.needs and family.cross:
                    add = partial(add_moment, self.query_moments, layer.index, mask)
                    stack.enter_context(layer.watch_query_input(add))
                if self.needs & WEIGHTS:
                    stack.enter_context(self.maps[layer.index].watched(layer, mask))
                for windows in self.windows[layer.index : layer.index + 1]:
                    stack.enter_context(windows.watched(layer, mask))
                if with_gradient:
                    stack.enter_context(layer.gate(gates[layer.index]))
            outputs = run(self.view.module, inputs)
            if Stat.LOSS_GRADIENT in self.needs:
                loss = task.loss(outputs, batch, examples).sum()
                per_row = self._gate_gradient(loss, gates)
                self.gradients.append(per_row.unflatten(0, (-1, batch.per_sample)).sum(1))
            if Stat.GAUSS_NEWTON in self.needs:
                self._add_gauss_newton(task.signal(outputs, batch), gates)

    @contextmanager
    def _watched(self, layer: AttentionView, mask: torch.Tensor | None) -> Iterator[None]:
        def see(heads: torch.Tensor) -> None:
            tokens = valid_tokens(heads.detach(), mask)
            self.tokens[layer.index] += len(tokens)
            if Stat.HEAD_MEAN in self.needs:
                self.mean[layer.index] += tokens.double().sum(0)
            if Stat.CONTRIBUTION in self.needs:
                # Head by head: all heads at once would hold N copies of the layer output.
                weight = self.weights[layer.index]
                norms = [(tokens[:, n] @ weight[:, n].T).abs().sum().double() for n in range(tokens.shape[1])]
                self.contribution[layer.index] += torch.stack(norms)

        with layer.watch_heads(see):
            yield

    def _gate_gradient(self, value: torch.Tensor, gates: list[torch.Tensor]) -> torch.Tensor:
        """d value / d gates as (rows, M). Rows do not mix in the model, so each row's gradient is its own."""
        gradients = torch.autograd.grad(value, gates, retain_graph=True)
        return torch.cat(gradients, dim=1).double()

    def _add_gauss_newton(self, signal: torch.Tensor, gates: list[torch.Tensor]) -> None:
        for _ in range(self.draws):
            projection = torch.randn(signal.shape, generator=self.generator, dtype=signal.dtype)
            gradient = self._gate_gradient((signal * projection).sum(), gates)
            self.gauss_newton += gradient.T @ gradient / self.draws

    def values(self, samples: int) -> dict[Stat, tuple[torch.Tensor, ...]]:
        """The statistics over so many samples."""
        for layer in self.view.attention:
            if not self.tokens[layer.index]:
                raise did_not_run(layer)
        every: dict[Stat, tuple[torch.Tensor, ...]] = {}
        if Stat.CONTRIBUTION in self.needs:
            every[Stat.CONTRIBUTION] = tuple(s / n for s, n in zip(self.contribution, self.tokens, strict=True))
        if Stat.HEAD_MEAN in self.needs:
            every[Stat.HEAD_MEAN] = tuple(s / n for s, n in zip(self.mean, self.tokens, strict=True))
        if Stat.NEURON_MEAN in self.needs:
            every[Stat.NEURON_MEAN] = self.neurons.mean()
        if Stat.NEURON_SIZE in self.needs:
            every[Stat.NEURON_SIZE] = self.neurons.size()
        if Stat.FEATURE_MOMENT in self.needs:
            every[Stat.FEATURE_MOMENT] = self.features.means()
        both = {Stat.INPUT_MOMENT: self.moments, Stat.QUERY_MOMENT: self.moments | self.query_moments}
        for stat, moments in both.items():
            if stat in self.needs:
                # The last entry counts the tokens.
                every[stat] = tuple(m / m[-1, -1] for _, m in sorted(moments.items()))
        if Stat.CROSS_MOMENT in self.needs:
            every[Stat.CROSS_MOMENT] = self.cross.means(len(self.view.attention))
        if Stat.MAP_SIMILARITY in self.needs:
            every[Stat.MAP_SIMILARITY] = tuple(maps.similarity / maps.rows for maps in self.maps)
        if Stat.EXCHANGE_COST in self.needs:
            every[Stat.EXCHANGE_COST] = tuple(maps.cost / maps.tokens for maps in self.maps)
        if Stat.REPAIRED_COST in self.needs:
            every[Stat.REPAIRED_COST] = tuple(
                (maps.cost if maps.exchange is None else maps.exchange.cost(weight)) / maps.tokens
                for maps, weight in zip(self.maps, self.weights, strict=True)
            )
        if Stat.WINDOW_COST in self.needs:
            every[Stat.WINDOW_COST] = tuple(windows.cost / windows.tokens for windows in self.windows)
        if Stat.LOSS_GRADIENT in self.needs:
            counts = [len(v.layout.query) for v in self.view.attention]
            every[Stat.LOSS_GRADIENT] = torch.cat(self.gradients).split(counts, dim=1)
        if Stat.GAUSS_NEWTON in self.needs:
            every[Stat.GAUSS_NEWTON] = (self.gauss_newton / samples,)
        return every
