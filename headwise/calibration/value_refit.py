"""Closed-form refit of shared value heads together with the output projection.

A shared value head was chosen by what it keeps of its members' values. What the layer needs of it also depends on where
its readers look, on the other heads, and on what the output projection makes good. All of that is linear in the values
once the attention weights are given: shared heads may take in what they miss, and they and the output projection are
solved in turn by least squares, on products that are collected once.

Shape letters: D model width, N query heads, K kv heads, H head_dim; F = N * H features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from headwise.calibration.calls import Call
from headwise.calibration.refit import OutputFit, Products, observe, solve, target
from headwise.calibration.tasks import Examples
from headwise.calibration.tokens import valid_mask, valid_tokens
from headwise.model.access import watched_input
from headwise.model.forward import to_torch
from headwise.model.projections import Projections
from headwise.model.shared_kv import ValueHeads
from headwise.model.surgery import other_values
from headwise.model.view import AttentionView, ModelView

_STEPS = 50
_CLOSE = 1e-8
"""Conjugate gradients end after so many steps, or where the squared residual is this part of the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueFit:
    """The solution for one layer: its value heads, and the output projection that goes with them."""

    values: ValueHeads
    output: OutputFit


def fit_values(
    student: ModelView,
    teacher: ModelView,
    layer: int,
    missed: ValueHeads,
    examples: Examples,
    *,
    ridge: float,
    rounds: int,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> ValueFit:
    """Solve ``argmin ||sum_n c_n (V_g + T_g E_g)^T W_n - Y||^2`` in turn over ``T`` and ``W``, in float64.

    ``c_n`` is the mix of inputs that query head n attends to, ``V_g`` the value head that it reads, ``E_g`` what that
    head misses. ``W`` is pulled towards its present value and ``T`` towards zero. ``Y`` is that of ``fit_output``.

    Args:
        student: the edited model; layers before ``layer`` are final.
        teacher: the untouched model.
        layer: which layer to solve.
        missed: ``E``, as heads in the place of the layer's value heads.
        examples: calibration samples; at least 2 F tokens are needed.
        ridge: strength of both pulls, in units of the mean diagonal of what is solved.
        rounds: how often the value heads are solved, each time followed by the output projection.
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Raises:
        DataError: fewer calibration tokens than features.
    """
    old = student.attention[layer].read()
    problem = _Problem(old, kvs=len(missed.weight), ridge=ridge)
    for own, taken, wanted, samples in _tokens(student, teacher, layer, missed, examples, batch_size):
        problem.add(own, taken, wanted)
        if progress is not None:
            progress(samples)
    problem.sums.require_tokens(f"layer {layer}", "set rounds: 0")
    before = problem.error()
    problem.solve_output()
    for _ in range(rounds):
        problem.solve_values()
        problem.solve_output()
    weight = problem.rows[: problem.features].T
    return ValueFit(
        values=ValueHeads(weight=old.value, bias=old.value_bias).plus(problem.taken, missed),
        output=OutputFit(
            layer=layer,
            weight=weight.to(old.output.dtype),
            bias=None if old.output_bias is None else problem.rows[-1].to(old.output.dtype),
            before=before,
            after=problem.error(),
        ),
    )


def _tokens(
    student: ModelView, teacher: ModelView, layer: int, missed: ValueHeads, examples: Examples, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Batch by batch, of the tokens that count: head outputs, what they miss, the target; and how many samples."""
    ours, theirs = student.attention[layer], teacher.attention[layer]
    calls: list[Call] = []
    for batch in examples.batches(batch_size):
        inputs = to_torch(batch.inputs)
        with ours.watch_calls(lambda args, kwargs: calls.append(Call(args, kwargs))):
            own = observe(student, ours, inputs)
        with other_values(ours, missed):
            taken = _repeated(ours, calls.pop())
        wanted = target(ours, own, observe(teacher, theirs, inputs))
        mask = valid_mask(batch, ours.family)
        tokens = [valid_tokens(part, mask).double() for part in (own.features, taken, wanted)]
        yield tokens[0], tokens[1], tokens[2], len(batch.samples)


def _repeated(layer: AttentionView, call: Call) -> torch.Tensor:
    """Head outputs, (B, T, F), for the inputs of a call, without the layers before it."""
    heads: list[torch.Tensor] = []
    with watched_input(layer.output, heads.append), torch.inference_mode():
        call.alone().run(layer.module)
    return heads[0]


class _Problem:
    """The sums of squares of one layer, and the unknowns.

    Attributes:
        rows: (F, D) output projection, with the output bias below where there is one.
        taken: (K, H, H), how much of what they miss the shared heads take in, ``T``.
        sums: of the features, which are all head outputs, what the heads miss, and a constant.
    """

    def __init__(self, old: Projections, *, kvs: int, ridge: float) -> None:
        width, heads, head_dim = old.output.shape
        self.reads = torch.arange(heads) // (heads // kvs)
        self.shape = (heads, head_dim)
        self.features = heads * head_dim
        self.constant = int(old.output_bias is not None)
        self.ridge = ridge
        self.rows = old.output.flatten(1).T.double()
        if old.output_bias is not None:
            self.rows = torch.cat([self.rows, old.output_bias.double()[None]])
        self.first = self.rows
        self.taken = torch.zeros(kvs, head_dim, head_dim, dtype=torch.float64)
        size = 2 * self.features + self.constant
        self.sums = Products(size, width)
        # Set by the first solutions and kept: both unknowns then lower one sum, which begins at the present error.
        self.scale = self.pull = 0.0

    def add(self, own: torch.Tensor, taken: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens of one batch: (tokens, F) twice, and (tokens, D)."""
        self.sums.add(torch.cat([own, taken, own.new_ones(len(own), self.constant)], dim=1), target)

    def error(self) -> float:
        """Squared error relative to the target's energy."""
        return self.sums.error(self._spread() @ self.rows)

    def solve_output(self) -> None:
        """The best output projection for the value heads as they are."""
        spread = self._spread()
        gram, cross = spread.T @ self.sums.gram @ spread, spread.T @ self.sums.cross
        scale = float(gram.diagonal()[: self.features].mean())
        self.scale = self.scale or scale
        ridge = self.ridge * self.scale / scale
        self.rows = solve(gram, cross, self.first, ridge, constant=bool(self.constant))

    def solve_values(self) -> None:
        """The best value heads for the output projection as it is, by conjugate gradients."""
        heads = self.rows[: self.features].unflatten(0, self.shape)
        own = slice(self.features, 2 * self.features)
        products = self.sums.gram[own, own].unflatten(1, self.shape).unflatten(0, self.shape)
        overlap = torch.einsum("nkd,mid->nkmi", heads, heads)
        parts = self.rows[: self.features], torch.zeros_like(self.sums.cross[own]), self.rows[self.features :]
        left = (self.sums.cross - self.sums.gram @ torch.cat(parts))[own].unflatten(0, self.shape)
        goal = self._by_kv(torch.einsum("nkd,nld->nkl", heads, left))
        curvature = torch.einsum("nknk->n", overlap) * torch.einsum("nlnl->n", products)
        self.pull = self.pull or self.ridge * float(curvature.mean()) / self.shape[1] ** 2

        def apply(taken: torch.Tensor) -> torch.Tensor:
            moved = torch.einsum("mij,mjnl->minl", taken[self.reads], products)
            return self._by_kv(torch.einsum("nkmi,minl->nkl", overlap, moved)) + self.pull * taken

        self.taken = _conjugate_gradients(apply, goal, self.taken)

    def _by_kv(self, per_query: torch.Tensor) -> torch.Tensor:
        """Sums over the readers of every kv head."""
        return torch.zeros_like(self.taken).index_add_(0, self.reads, per_query)

    def _spread(self) -> torch.Tensor:
        """From all features to those that the output projection sees: what the heads take in of what they miss."""
        taken = torch.block_diag(*self.taken[self.reads].mT)
        spread = torch.cat([torch.eye(self.features, dtype=torch.float64), taken])
        return torch.block_diag(spread, torch.eye(self.constant, dtype=torch.float64)) if self.constant else spread


def _conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], goal: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Solve ``apply(x) = goal`` for a symmetric positive ``apply``."""
    found, left = start, goal - apply(start)
    step, size = left, float(left.square().sum())
    enough = _CLOSE * float(goal.square().sum())
    for _ in range(_STEPS):
        if size <= enough:
            break
        moved = apply(step)
        length = size / float((step * moved).sum())
        found, left = found + length * step, left - length * moved
        size, last = float(left.square().sum()), size
        step = left + size / last * step
    return found
