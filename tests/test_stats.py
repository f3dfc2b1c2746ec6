"""Statistics against values computed by hand, the slow and obvious way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import HEADS, LAYERS, VOCABULARY, WIDTH, make_model
from torch import nn

from headwise.calibration.data import Table
from headwise.calibration.stats import Stat, collect
from headwise.calibration.tasks import Examples, Task, make_task
from headwise.calibration.tasks.heads import MultiOutputOptions
from headwise.calibration.tasks.language import LanguageOptions
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint
from headwise.model.forward import run, to_torch
from headwise.model.view import ModelView

DATA = {"path": "unused.npz"}


def language_examples(view: ModelView) -> tuple[Task, Examples]:
    """Four documents of different lengths, so that there is padding."""
    generator = np.random.default_rng(0)
    rows = [
        {"input_ids": generator.integers(3, VOCABULARY, n), "attention_mask": np.ones(n, dtype=np.int64)}
        for n in (9, 4, 6, 9)
    ]
    task = make_task(LanguageOptions(type="language-modeling", data=DATA))
    return task, Examples.of(rows, source="made up", padding={"input_ids": 0, "attention_mask": 0})


def classifier_examples(module: nn.Module, rows: int = 6) -> tuple[Task, Examples]:
    spec = MultiOutputOptions.model_validate(
        {
            "type": "multi-output",
            "data": DATA,
            "outputs": {"digit": {"type": "classification"}, "parity": {"type": "classification"}},
        }
    )
    task = make_task(spec)
    generator = np.random.default_rng(0)
    columns = {
        "tokens": generator.normal(size=(rows, 5, WIDTH)).astype(np.float32),
        "digit": generator.integers(0, 3, rows),
        "parity": generator.integers(0, 2, rows),
    }
    checkpoint = Checkpoint(module=module, source="tiny", kind="module", digest="", factory="conftest:two_heads")
    return task, task.encode(Table.of(columns, "made up"), checkpoint)


def single_rows(examples: Examples) -> Iterator[dict[str, torch.Tensor]]:
    """Every row alone: no padding, nothing to mask."""
    for row in examples.rows:
        yield to_torch({name: array[None] for name, array in row.items()})


def test_contribution_and_mean_leave_padding_out() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = language_examples(view)
    stats = collect(view, task, examples, {Stat.CONTRIBUTION, Stat.HEAD_MEAN}, batch_size=2)
    for layer in view.attention:
        seen: list[torch.Tensor] = []
        with layer.watch_heads(lambda heads, seen=seen: seen.append(heads[0])), torch.no_grad():
            for inputs in single_rows(examples):
                run(view.module, inputs)
        tokens = torch.cat(seen).double()
        assert torch.allclose(stats[Stat.HEAD_MEAN][layer.index], tokens.mean(0), atol=1e-6)
        parts = torch.einsum("tnh,dnh->tnd", tokens, layer.read().output.double())
        expected = parts.abs().sum(-1).mean(0)
        assert torch.allclose(stats[Stat.CONTRIBUTION][layer.index], expected, rtol=1e-4)


def test_statistics_do_not_depend_on_the_batch_size() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    one, many = (
        collect(view, task, examples, {Stat.CONTRIBUTION, Stat.LOSS_GRADIENT}, batch_size=size) for size in (1, 4)
    )
    for layer in range(LAYERS):
        assert torch.allclose(one[Stat.CONTRIBUTION][layer], many[Stat.CONTRIBUTION][layer], rtol=1e-4)
        left, right = one[Stat.LOSS_GRADIENT][layer].abs().mean(0), many[Stat.LOSS_GRADIENT][layer].abs().mean(0)
        assert torch.allclose(left, right, rtol=1e-3, atol=1e-8)


def test_loss_gradients_are_those_of_finite_differences() -> None:
    view = ModelView.of(make_model("torch").double())
    task, examples = classifier_examples(view.module, rows=3)
    examples = Examples.of(
        [{"tokens": row["tokens"].astype(np.float64)} for row in examples.rows], source="x", labels=examples.labels
    )
    for layer in view.attention:
        assert layer.read().query.dtype == torch.float64
    (batch,) = examples.batches(8)
    gates = [torch.ones(3, HEADS, dtype=torch.float64) for _ in view.attention]

    def loss() -> torch.Tensor:
        from contextlib import ExitStack

        with ExitStack() as stack, torch.no_grad():
            for layer in view.attention:
                stack.enter_context(layer.gate(gates[layer.index]))
            return task.loss(run(view.module, to_torch(batch.inputs)), batch, examples)

    stats = collect(view, task, examples, {Stat.LOSS_GRADIENT})
    step = 1e-5
    for layer in range(LAYERS):
        for head in range(HEADS):
            gates[layer][:, head] += step
            up = loss()
            gates[layer][:, head] -= 2 * step
            down = loss()
            gates[layer][:, head] += step
            expected = (up - down) / (2 * step)
            assert torch.allclose(stats[Stat.LOSS_GRADIENT][layer][:, head], expected, atol=1e-6)


def test_gauss_newton_is_the_average_of_jacobian_products() -> None:
    module = make_model("torch")
    view = ModelView.of(module)
    task, examples = classifier_examples(module, rows=2)
    rows = []
    for inputs, sample in zip(single_rows(examples), range(2), strict=True):
        (batch,) = Examples.of([examples.rows[sample]], source="x", facts=examples.facts).batches(1)

        def signal(flat: torch.Tensor, inputs: dict[str, torch.Tensor] = inputs, batch: object = batch) -> torch.Tensor:
            from contextlib import ExitStack

            with ExitStack() as stack:
                for layer, gates in zip(view.attention, flat.split(HEADS), strict=True):
                    stack.enter_context(layer.gate(gates))
                return task.signal(run(module, inputs), batch)[0]

        jacobian = torch.autograd.functional.jacobian(signal, torch.ones(HEADS * LAYERS))
        rows.append(jacobian.double())
    expected = sum(j.T @ j for j in rows) / 2
    estimate = collect(view, task, examples, {Stat.GAUSS_NEWTON}, draws=3000)[Stat.GAUSS_NEWTON][0]
    error = (estimate - expected).norm() / expected.norm()
    assert error < 0.1
    assert torch.allclose(estimate, estimate.T)


def test_the_self_distillation_gradient_is_not_what_gauss_newton_measures() -> None:
    """The score of heads from the gradient of the distance to oneself is zero; the Gauss-Newton diagonal is not."""
    module = make_model("torch")
    view = ModelView.of(module)
    task, examples = classifier_examples(module)
    matrix = collect(view, task, examples, {Stat.GAUSS_NEWTON})[Stat.GAUSS_NEWTON][0]
    assert (matrix.diagonal() > 0).all()


def test_the_same_seed_gives_the_same_numbers() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    first, second, other = (
        collect(view, task, examples, {Stat.GAUSS_NEWTON}, seed=seed)[Stat.GAUSS_NEWTON][0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_progress_counts_every_sample() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, rows=7)
    counted: list[int] = []
    collect(view, task, examples, {Stat.HEAD_MEAN}, batch_size=3, progress=counted.append)
    assert sum(counted) == 7
    assert len(counted) == 3


def test_numbers_that_are_not_finite_are_refused() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    examples.rows[0]["tokens"][0, 0] = np.inf  # type: ignore[index]
    with pytest.raises(DataError, match="is not finite"):
        collect(view, task, examples, {Stat.CONTRIBUTION})
