"""Statistics of neurons and gates, against values computed the slow and obvious way."""

from __future__ import annotations

import pytest
import torch
from conftest import HEADS, LAYERS, make_model
from test_stats import classifier_examples, language_examples, single_rows

from headwise.calibration.stats import HeadStats, Stat, collect
from headwise.calibration.tasks import Examples
from headwise.calibration.units import Means, gated
from headwise.errors import PlanError
from headwise.model.forward import run, to_torch
from headwise.model.view import ModelView

MEANS = {Stat.HEAD_MEAN, Stat.NEURON_MEAN}


def means_of(stats: HeadStats) -> Means:
    return Means(heads=stats[Stat.HEAD_MEAN], neurons=stats[Stat.NEURON_MEAN])


def test_neuron_means_and_sizes_leave_padding_out() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = language_examples(view)
    stats = collect(view, task, examples, {Stat.NEURON_MEAN, Stat.NEURON_SIZE}, batch_size=2)
    for mlp in view.mlp:
        seen: list[torch.Tensor] = []
        with mlp.watch_neurons(lambda t, seen=seen: seen.append(t[0])), torch.no_grad():
            for inputs in single_rows(examples):
                run(view.module, inputs)
        tokens = torch.cat(seen).double()
        assert torch.allclose(stats[Stat.NEURON_MEAN][mlp.index], tokens.mean(0), atol=1e-6)
        assert torch.allclose(stats[Stat.NEURON_SIZE][mlp.index], tokens.abs().mean(0), atol=1e-6)


def jacobians(view: ModelView, examples: Examples, task: object, means: Means) -> list[torch.Tensor]:
    """Per sample, d signal / d gates of all heads and neurons, (K, all gates)."""
    sizes = [HEADS] * LAYERS + [48] * LAYERS
    found = []
    for sample in range(len(examples)):
        (batch,) = Examples.of([examples.rows[sample]], source="x", facts=examples.facts).batches(1)

        def signal(flat: torch.Tensor, batch: object = batch) -> torch.Tensor:
            with gated(view, flat.split(sizes), means):
                return task.signal(run(view.module, to_torch(batch.inputs)), batch)[0]  # type: ignore[attr-defined]

        found.append(torch.autograd.functional.jacobian(signal, torch.ones(sum(sizes))).double())
    return found


def test_gauss_newton_is_the_average_of_jacobian_products() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, rows=2)
    stats = collect(view, task, examples, {Stat.UNIT_GAUSS_NEWTON} | MEANS, draws=3000)
    rows = jacobians(view, examples, task, means_of(stats))
    expected = sum(j.T @ j for j in rows) / len(rows)
    found = stats[Stat.UNIT_GAUSS_NEWTON]
    assert [tuple(t.shape) for t in found] == [(HEADS, HEADS)] * LAYERS + [(48,)] * LAYERS
    for layer in range(LAYERS):
        block = slice(HEADS * layer, HEADS * (layer + 1))
        assert (found[layer] - expected[block, block]).norm() < 0.1 * expected[block, block].norm()
        start = HEADS * LAYERS + 48 * layer
        diagonal = expected.diagonal()[start : start + 48]
        assert (found[LAYERS + layer] - diagonal).norm() < 0.1 * diagonal.norm()


def test_fisher_is_the_mean_product_of_loss_gradients() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    stats = collect(view, task, examples, {Stat.UNIT_FISHER} | MEANS, batch_size=4)
    means, rows = means_of(stats), []
    for sample in range(len(examples)):
        labels = {name: values[sample : sample + 1] for name, values in examples.labels.items()}
        one = Examples.of([examples.rows[sample]], source="x", facts=examples.facts, labels=labels)
        (batch,) = one.batches(1)
        gates = [torch.ones(n, requires_grad=True) for n in [HEADS] * LAYERS + [48] * LAYERS]
        with gated(view, gates, means), torch.enable_grad():
            loss = task.loss(run(view.module, to_torch(batch.inputs)), batch, one).sum()
        rows.append([gradient.double() for gradient in torch.autograd.grad(loss, gates)])
    for layer in range(LAYERS):
        heads = torch.stack([row[layer] for row in rows])
        assert torch.allclose(stats[Stat.UNIT_FISHER][layer], heads.T @ heads / len(rows), rtol=1e-4, atol=1e-9)
        neurons = torch.stack([row[LAYERS + layer] for row in rows])
        expected = neurons.square().mean(0)
        assert torch.allclose(stats[Stat.UNIT_FISHER][LAYERS + layer], expected, rtol=1e-4, atol=1e-9)


def test_a_neuron_that_never_changes_costs_nothing() -> None:
    """Its mean is folded into the bias, however large it is; a gate to zero would call it important."""
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    weights = view.mlp[1].read()
    weights.up[5].zero_()
    assert weights.up_bias is not None
    weights.up_bias[5] = 10.0
    costs = collect(view, task, examples, {Stat.UNIT_GAUSS_NEWTON})[Stat.UNIT_GAUSS_NEWTON][LAYERS + 1]
    assert costs[5] < 1e-9 * costs.median()


def test_fisher_of_units_says_what_to_do_without_labels() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module)
    unlabelled = Examples.of(examples.rows, source="x", facts=examples.facts)
    with pytest.raises(PlanError, match="no labels"):
        collect(view, task, unlabelled, {Stat.UNIT_FISHER})


def test_statistics_of_units_do_not_depend_on_the_batch_size_and_follow_the_seed() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = language_examples(view)
    one, other = (collect(view, task, examples, {Stat.UNIT_FISHER}, batch_size=size) for size in (1, 4))
    for left, right in zip(one[Stat.UNIT_FISHER], other[Stat.UNIT_FISHER], strict=True):
        assert torch.allclose(left, right, rtol=1e-3, atol=1e-7)
    first, second, third = (
        collect(view, task, examples, {Stat.UNIT_GAUSS_NEWTON}, seed=seed)[Stat.UNIT_GAUSS_NEWTON][-1]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_progress_is_told_once_per_sample_also_where_means_come_first() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, rows=7)
    counted: list[int] = []
    collect(view, task, examples, {Stat.UNIT_GAUSS_NEWTON}, batch_size=3, progress=counted.append)
    assert sum(counted) == 7
