"""Scores: pure functions with values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from headwise.model.view import ModelView
from headwise.passes import scores


def test_michel_and_fisher() -> None:
    gradients = torch.tensor([[1.0, -2.0], [-1.0, 4.0]])
    assert scores.michel(gradients).tolist() == [1.0, 3.0]
    assert scores.fisher(gradients).tolist() == [1.0, 10.0]


def test_the_average_of_gradients_would_be_another_score() -> None:
    gradients = torch.tensor([[1.0], [-1.0]])
    assert gradients.mean(0).abs().item() == 0.0
    assert scores.michel(gradients).item() == 1.0


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_weight_norm_does_not_change_under_a_change_of_basis(name: str) -> None:
    weights = ModelView.of(make_model(name)).attention[0].read()
    before = scores.weight_norm(weights)
    width = weights.value.shape[1]
    basis = torch.eye(width) + 0.5 * torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    group = weights.output.shape[1] // weights.value.shape[0]
    value = torch.einsum("ij,kjd->kid", basis, weights.value)
    inverse = torch.linalg.inv(basis)
    output = torch.einsum("dnh,hi->dni", weights.output, inverse)
    from dataclasses import replace

    after = scores.weight_norm(replace(weights, value=value, output=output))
    assert torch.allclose(before, after, rtol=1e-3)
    assert before.shape == (4,)
    assert group == (1 if name == "bert" else 2)


def test_random_is_the_same_for_the_same_seed() -> None:
    first, second = (scores.random(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_unit_matrix_sums_over_members() -> None:
    matrix = torch.arange(16.0).reshape(4, 4)
    grouped = scores.unit_matrix(matrix, [[0, 1], [2, 3]])
    assert grouped.tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]


def test_normalized_scores_have_length_one() -> None:
    assert scores.per_layer_normalized(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert scores.per_layer_normalized(torch.zeros(2)).tolist() == [0.0, 0.0]
