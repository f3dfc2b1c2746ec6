"""What projections read, and how much outputs depend on what they write: against values computed the obvious way."""

from __future__ import annotations

import pytest
import torch
from conftest import LAYERS, WIDTH, make_model
from test_stats import classifier_examples, language_examples, single_rows

from headwise.calibration.stats import Stat, collect
from headwise.calibration.tasks import Examples
from headwise.model.access import hooked, watched_input
from headwise.model.forward import run, to_torch
from headwise.model.view import ModelView


def test_feature_moments_are_means_over_real_tokens() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = language_examples(view)
    found = collect(view, task, examples, {Stat.FEATURE_MOMENT}, batch_size=2)[Stat.FEATURE_MOMENT]
    for index, layer in enumerate((*view.attention, *view.mlp)):
        seen: list[torch.Tensor] = []
        with watched_input(layer.output, lambda t, seen=seen: seen.append(t[0])), torch.no_grad():
            for inputs in single_rows(examples):
                run(view.module, inputs)
        tokens = torch.cat(seen).double()
        ones = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1)
        assert torch.allclose(found[index], ones.T @ ones / len(ones), atol=1e-5)


def test_curvature_is_the_average_of_jacobian_products() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = classifier_examples(view.module, rows=2)
    repeated = Examples.of(examples.rows * 1500, source="x", facts=examples.facts)
    found = collect(view, task, repeated, {Stat.OUTPUT_CURVATURE}, batch_size=100)[Stat.OUTPUT_CURVATURE]
    layers = (*view.attention, *view.mlp)
    assert [tuple(t.shape) for t in found] == [(WIDTH, WIDTH)] * 2 * LAYERS
    for index in (0, LAYERS + 1, 2 * LAYERS - 1):
        expected = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for row in examples.rows:
            (batch,) = Examples.of([row], source="x", facts=examples.facts).batches(1)

            def signal(shift: torch.Tensor, batch: object = batch, index: int = index) -> torch.Tensor:
                hook = layers[index].output.register_forward_hook(lambda _, __, result: result + shift)
                with hooked(hook):
                    return task.signal(run(view.module, to_torch(batch.inputs)), batch)[0]  # type: ignore[attr-defined]

            tokens = batch.inputs["tokens"].shape[1]
            jacobian = torch.autograd.functional.jacobian(signal, torch.zeros(1, tokens, WIDTH)).double()
            expected += torch.einsum("kotd,kote->de", jacobian, jacobian) / len(examples.rows)
        assert (found[index] - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("family", ["albert", "opt", "whisper", "timm", "clip"])
def test_every_layer_has_a_curvature(family: str) -> None:
    """Layers that run twice, flatten their tokens, or belong to another sequence or to images."""
    from test_passes import samples

    view = ModelView.of(make_model(family))
    task, examples = samples(view, family)
    found = collect(view, task, examples, {Stat.OUTPUT_CURVATURE, Stat.FEATURE_MOMENT})
    for curvature, moment, layer in zip(
        found[Stat.OUTPUT_CURVATURE], found[Stat.FEATURE_MOMENT], (*view.attention, *view.mlp), strict=True
    ):
        assert float(curvature.diagonal().min()) > 0
        assert len(moment) == layer.linear()[0].shape[1] + 1
