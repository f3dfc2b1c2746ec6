"""Merging heads: lossless where a change of basis is all that differs, and never worse than its special cases."""

from __future__ import annotations

import pytest
import torch

from headwise.calibration.merge import Merged, as_complex, as_real, merge_rotary, merge_subspace, pair_matrices

WIDTH, HEAD = 24, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(seed: int = 0, samples: int = 200) -> torch.Tensor:
    x = torch.randn(samples, WIDTH, generator=generator(seed), dtype=torch.float64)
    return x.T @ x / samples


def spd(count: int, seed: int = 1) -> torch.Tensor:
    x = torch.randn(count, HEAD, 2 * HEAD, generator=generator(seed), dtype=torch.float64)
    return x @ x.mT


def rebuilt(merged: Merged) -> torch.Tensor:
    return merged.maps @ merged.shared


def test_heads_that_differ_by_a_basis_merge_losslessly() -> None:
    base = torch.randn(HEAD, WIDTH, generator=generator(2), dtype=torch.float64)
    bases = torch.randn(3, HEAD, HEAD, generator=generator(3), dtype=torch.float64) + 2 * torch.eye(HEAD)
    heads = bases @ base
    merged = merge_subspace(heads, moment(), spd(3))
    assert merged.lost < 1e-12
    assert torch.allclose(rebuilt(merged), heads, atol=1e-8)
    mean = heads.mean(0)
    assert not torch.allclose(mean.expand_as(heads), heads, atol=1e-1), "averaging must fail where merging succeeds"


def test_a_stack_of_low_rank_merges_losslessly() -> None:
    basis = torch.randn(HEAD, WIDTH, generator=generator(4), dtype=torch.float64)
    heads = torch.randn(2, HEAD, HEAD, generator=generator(5), dtype=torch.float64) @ basis
    heads[1, 3:] = 0
    assert torch.allclose(rebuilt(merge_subspace(heads, moment(), spd(2))), heads, atol=1e-8)


def test_the_error_is_the_lost_energy() -> None:
    heads = torch.randn(2, HEAD, WIDTH, generator=generator(6), dtype=torch.float64)
    weights, second = spd(2), moment()
    merged = merge_subspace(heads, second, weights)

    def energy(rows: torch.Tensor) -> float:
        return float(torch.einsum("jab,jad,de,jbe->", weights, rows, second, rows))

    assert energy(heads - rebuilt(merged)) / energy(heads) == pytest.approx(merged.lost, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_shared_head_is_better(seed: int) -> None:
    heads = torch.randn(2, HEAD, WIDTH, generator=generator(seed), dtype=torch.float64)
    weights, second = spd(2, seed), moment(seed)
    merged = merge_subspace(heads, second, weights)
    roots = torch.linalg.cholesky(second)
    for other in (heads[0], heads.mean(0), torch.randn(HEAD, WIDTH, generator=generator(9), dtype=torch.float64)):
        # The best maps onto any other shared head, by least squares in the norm of the data.
        maps = heads @ second @ other.T @ torch.linalg.inv(other @ second @ other.T)
        error = torch.linalg.vector_norm(torch.linalg.cholesky(weights).mT @ (heads - maps @ other) @ roots)
        ours = torch.linalg.vector_norm(torch.linalg.cholesky(weights).mT @ (heads - rebuilt(merged)) @ roots)
        assert ours <= error * (1 + 1e-9)


def test_rotary_heads_that_differ_by_one_number_per_frequency_merge_losslessly() -> None:
    base = torch.randn(HEAD, WIDTH, generator=generator(7), dtype=torch.float64)
    phases = torch.polar(
        torch.rand(3, HEAD // 2, generator=generator(8), dtype=torch.float64) + 0.5,
        6.28 * torch.rand(3, HEAD // 2, generator=generator(9), dtype=torch.float64),
    )
    heads = pair_matrices(phases) @ base
    merged = merge_rotary(heads, moment(), spd(3))
    assert merged.lost < 1e-12
    assert torch.allclose(rebuilt(merged), heads, atol=1e-8)


def test_rotary_maps_commute_with_rotations() -> None:
    heads = torch.randn(2, HEAD, WIDTH, generator=generator(10), dtype=torch.float64)
    maps = merge_rotary(heads, moment(), spd(2)).maps
    rotation = pair_matrices(torch.polar(torch.ones(1, HEAD // 2).double(), torch.tensor([[0.3, 1.1, 2.0]]).double()))
    assert torch.allclose(maps @ rotation, rotation @ maps, atol=1e-12)
    free = merge_subspace(heads, moment(), spd(2)).maps
    assert not torch.allclose(free @ rotation, rotation @ free, atol=1e-3), "a free basis change must not commute"


def test_rotary_merging_loses_more_than_a_free_basis() -> None:
    heads = torch.randn(2, HEAD, WIDTH, generator=generator(11), dtype=torch.float64)
    weights = torch.eye(HEAD, dtype=torch.float64).repeat(2, 1, 1)
    assert merge_rotary(heads, moment(), weights).lost >= merge_subspace(heads, moment(), weights).lost


def test_a_single_head_is_returned_as_itself() -> None:
    heads = torch.randn(1, HEAD, WIDTH, generator=generator(12), dtype=torch.float64)
    for merge in (merge_subspace, merge_rotary):
        assert torch.allclose(rebuilt(merge(heads, moment(), spd(1))), heads, atol=1e-9)


def test_complex_form_round_trips() -> None:
    heads = torch.randn(2, HEAD, WIDTH, dtype=torch.float64)
    assert torch.equal(as_real(as_complex(heads)), heads)


def test_the_shared_head_has_the_size_of_its_members() -> None:
    heads = 1e3 * torch.randn(3, HEAD, WIDTH, generator=generator(13), dtype=torch.float64)
    shared = merge_subspace(heads, moment(), 1e-6 * spd(3)).shared
    sizes = torch.linalg.vector_norm(heads.flatten(1), dim=1)
    assert float(torch.linalg.vector_norm(shared)) == pytest.approx(float(sizes.square().mean().sqrt()), rel=1e-6)
