"""The refit of shared value heads: exact about what it predicts, never worse than refitting the output alone."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from conftest import make_model
from test_passes import samples

from headwise.calibration.refit import OutputFit, fit_output
from headwise.calibration.tasks import Examples, Task
from headwise.calibration.value_refit import ValueFit, _conjugate_gradients, fit_values
from headwise.errors import DataError
from headwise.model import surgery
from headwise.model.shared_kv import SharedKV
from headwise.model.view import ModelView
from headwise.passes.base import make_plan
from headwise.passes.share_kv import ShareKVHeads

LAYERS = (("bert", 0), ("gpt2", 1), ("llama", 0), ("qwen2", 0), ("torch", 0), ("bart", 1), ("bart", 2), ("t5", 2))
"""Also layers of a decoder, which have a cache of keys and values, and those that attend to an encoder."""


def shared(family: str, layer: int = 0) -> tuple[ModelView, ModelView, Examples, SharedKV]:
    """A model with half the kv heads in every layer, the untouched one, and the numbers of one layer's edit."""
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    task, examples = samples(student, family)
    examples = Examples.of(examples.rows * 2, source="x", padding=examples.padding, facts=examples.facts)
    payloads = share(student, task, examples, {"ratio": 0.5})
    return student, teacher, examples, payloads[layer]


def share(view: ModelView, task: Task, examples: Examples, options: dict[str, object]) -> dict[int, SharedKV]:
    pass_ = ShareKVHeads.model_validate(options)
    plan, stats = make_plan(pass_, view, task, examples)
    payloads = dict(pass_.payloads(view, stats, plan))
    surgery.apply(view, plan, payloads)
    return payloads


def fit(family: str, rounds: int, ridge: float = 1e-2) -> tuple[ValueFit, OutputFit]:
    """The refit with values, and the one without."""
    student, teacher, examples, payload = shared(family)
    both = fit_values(student, teacher, 0, payload.missed, examples, ridge=ridge, rounds=rounds)
    return both, fit_output(student, teacher, 0, examples, ridge=ridge)


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_the_error_is_the_predicted_one_and_smaller_than_that_of_the_output_alone(family: str, layer: int) -> None:
    student, teacher, examples, payload = shared(family, layer)
    alone = fit_output(student, teacher, layer, examples, ridge=1e-2)
    found = fit_values(student, teacher, layer, payload.missed, examples, ridge=1e-2, rounds=3)
    assert found.output.before == pytest.approx(alone.before, rel=1e-3)
    assert found.output.after < alone.after < alone.before
    surgery.set_values(student.attention[layer], found.values)
    surgery.set_output(student.attention[layer], found.output.weight, found.output.bias)
    made = fit_output(student, teacher, layer, examples, ridge=1e-2).before
    assert made == pytest.approx(found.output.after, rel=1e-3)


def test_no_round_is_the_refit_of_the_output() -> None:
    both, alone = fit("bert", rounds=0)
    assert torch.allclose(both.output.weight, alone.weight, atol=1e-4)
    assert both.output.after == pytest.approx(alone.after, rel=1e-4)


def test_more_rounds_fit_the_calibration_data_better() -> None:
    errors = [fit("torch", rounds)[0].output.after for rounds in (0, 1, 2, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_a_strong_pull_leaves_everything_as_it_is() -> None:
    student, teacher, examples, payload = shared("torch")
    found = fit_values(student, teacher, 0, payload.missed, examples, ridge=1e6, rounds=3)
    old = student.attention[0].read()
    assert torch.allclose(found.values.weight.float(), old.value, atol=1e-3)
    assert torch.allclose(found.output.weight, old.output.flatten(1), atol=1e-3)


def test_heads_that_miss_nothing_take_nothing_in() -> None:
    view = ModelView.of(make_model("torch"))
    task, examples = samples(view, "torch")
    old = view.attention[0].read()
    for weight in (old.key, old.value, old.key_bias, old.value_bias):
        assert weight is not None
        weight[1:] = weight[0]
    payload = share(view, task, examples, {"kv_heads": (1, 4, 4)})[0]
    assert float(payload.missed.weight.abs().max()) == 0.0
    before = view.attention[0].read().value.clone()
    found = fit_values(view, ModelView.of(make_model("torch")), 0, payload.missed, examples, ridge=0.1, rounds=2)
    assert torch.equal(found.values.weight.float(), before)


def test_what_is_missed_cannot_be_had_from_the_shared_head() -> None:
    _, _, _, payload = shared("torch")
    rows = torch.cat([payload.value, payload.missed.weight], dim=1)
    assert float(torch.linalg.svdvals(rows).min()) > 1e-3


def test_too_few_tokens_are_refused() -> None:
    student, teacher, examples, payload = shared("torch")
    few = Examples.of(examples.rows[:3], source="x", facts=examples.facts)
    with pytest.raises(DataError, match=r"15 calibration tokens for 65 features of layer 0\n.*\n.*rounds: 0"):
        fit_values(student, teacher, 0, payload.missed, few, ridge=0.1, rounds=1)


def test_conjugate_gradients_solve_symmetric_systems() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, goal = root @ root.T + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    found = _conjugate_gradients(lambda x: matrix @ x, goal, torch.zeros(12, dtype=torch.float64))
    assert torch.allclose(found, torch.linalg.solve(matrix, goal), atol=1e-2)
    nothing = torch.zeros(12, dtype=torch.float64)
    assert torch.equal(_conjugate_gradients(torch.zeros_like, nothing, nothing), nothing)


def test_progress_counts_the_samples() -> None:
    student, teacher, examples, payload = shared("bert")
    seen: list[int] = []
    options = MappingProxyType({"ridge": 0.1, "rounds": 1, "batch_size": 7})
    fit_values(student, teacher, 0, payload.missed, examples, progress=seen.append, **options)
    assert sum(seen) == len(examples)
