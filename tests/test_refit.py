"""The closed-form refit: identities that need no tolerance beyond rounding, and what it may never do."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from test_stats import classifier_examples, language_examples

from headwise.calibration.refit import fit_output
from headwise.calibration.tasks import Examples
from headwise.errors import DataError
from headwise.model import surgery
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.view import ModelView


def both(family: str) -> tuple[ModelView, ModelView, Examples]:
    """Student, teacher, and samples that have padding where the family knows it."""
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    _, examples = classifier_examples(student.module, 24) if family == "torch" else language_examples(student)
    return student, teacher, examples


@pytest.mark.parametrize("family", ["torch", "llama", "gpt2", "bert"])
def test_an_untouched_layer_returns_itself(family: str) -> None:
    student, teacher, examples = both(family)
    fit = fit_output(student, teacher, 1, examples, ridge=1.0) if family == "torch" else None
    if fit is None:
        examples = repeat(examples, 12)
        fit = fit_output(student, teacher, 1, examples, ridge=1.0)
    old = student.attention[1].read()
    assert torch.allclose(fit.weight, old.output.flatten(1), atol=1e-4)
    assert fit.before < 1e-10
    assert (fit.bias is None) == (old.output_bias is None)
    if fit.bias is not None:
        assert torch.allclose(fit.bias, old.output_bias, atol=1e-4)


def repeat(examples: Examples, times: int) -> Examples:
    return Examples.of(examples.rows * times, source="x", padding=examples.padding)


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_the_training_error_never_rises(ridge: float) -> None:
    student, teacher, examples = both("torch")
    for layer in range(3):
        surgery.apply(student, EditPlan(edits=(DropHeads(layer=layer, query=(0, 2)),)))
    for layer in student.attention:
        fit = fit_output(student, teacher, layer.index, examples, ridge=ridge)
        assert fit.after <= fit.before
        surgery.set_output(layer, fit.weight, fit.bias)


def test_a_weaker_ridge_fits_the_calibration_data_better() -> None:
    student, teacher, examples = both("torch")
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=0, query=(1, 3)),)))
    errors = [fit_output(student, teacher, 0, examples, ridge=ridge).after for ridge in (1e-4, 1e-2, 1.0, 100.0)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


def test_removing_a_copy_of_another_head_is_lossless_after_the_refit() -> None:
    student, teacher, examples = both("torch")
    for view in (student, teacher):
        old = view.attention[0].read()
        for tensor in (old.query, old.key, old.value, old.query_bias, old.key_bias, old.value_bias):
            assert tensor is not None
            tensor[3] = tensor[1]
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=0, query=(3,)),)))
    fit = fit_output(student, teacher, 0, examples, ridge=1e-9)
    assert fit.before > 1e-3
    assert fit.after < 1e-10
    merged = teacher.attention[0].read().output[:, [0, 1, 2]].clone()
    merged[:, 1] += teacher.attention[0].read().output[:, 3]
    assert torch.allclose(fit.weight, merged.flatten(1), atol=1e-3)


def test_later_layers_make_up_for_earlier_ones() -> None:
    """The target holds what layer 0 lost, so with strong features layer 1 can correct it."""
    student, teacher, examples = both("torch")
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=0, query=(0, 1, 2)),)))
    fit = fit_output(student, teacher, 1, examples, ridge=1e-3)
    assert fit.before > 1e-4, "layer 1 itself is untouched: only the residual difference can make an error"
    assert fit.after < fit.before


def test_padding_does_not_count() -> None:
    student, teacher, examples = both("llama")
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=0, query=(0, 1)),)))
    examples = repeat(examples, 6)
    batched, single = (fit_output(student, teacher, 0, examples, batch_size=size) for size in (8, 1))
    assert torch.allclose(batched.weight, single.weight, atol=1e-4)
    assert batched.before == pytest.approx(single.before, rel=1e-4)


def test_too_few_tokens_are_refused() -> None:
    student, teacher, _ = both("torch")
    _, few = classifier_examples(student.module, rows=2)
    with pytest.raises(DataError, match=r"10 calibration tokens for 33 features of layer 0"):
        fit_output(student, teacher, 0, few)


def test_no_hook_stays_behind() -> None:
    student, teacher, examples = both("torch")
    fit_output(student, teacher, 0, examples)
    for view in (student, teacher):
        for module in view.module.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
