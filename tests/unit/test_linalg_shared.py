"""One basis for several weights: against alternating least squares, and what must not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.shared import SharedFactors, fitted, group_cost, shared_factors


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, size: int, tokens: int = 200) -> Tensor:
    x = normal(seed, tokens, size) @ normal(seed + 1, size, size)
    return x.mT @ x / tokens


def error(weight: Tensor, small: Tensor, metric: Tensor) -> float:
    """E|| (W - W') x ||^2."""
    return float(((weight - small) @ metric * (weight - small)).sum())


def total(weights: list[Tensor], found: SharedFactors, metric: Tensor) -> float:
    return sum(error(w, c @ found.basis, metric) for w, c in zip(weights, found.coefficients, strict=True))


def slow_shared(weights: list[Tensor], metric: Tensor, rank: int, steps: int = 3000) -> float:
    """The least summed error by alternating exact solves for all C_l and for B, entry by entry: no SVD, no root."""
    basis = normal(99, rank, metric.shape[0])
    for _ in range(steps):
        normal_matrix = basis @ metric @ basis.mT
        coefficients = [torch.linalg.solve(normal_matrix, basis @ metric @ w.mT).mT for w in weights]
        left = sum(c.mT @ c for c in coefficients)
        assert isinstance(left, Tensor)
        basis = torch.linalg.solve(left, sum(c.mT @ w for c, w in zip(coefficients, weights, strict=True)))
    return total(weights, SharedFactors(basis, tuple(coefficients)), metric)


@pytest.mark.parametrize(("outputs", "inputs"), [((7, 7), 9), ((5, 8, 3), 6), ((2, 3), 12)])
def test_the_basis_is_the_best_there_is(outputs, inputs):
    weights, metric = [normal(i, o, inputs) for i, o in enumerate(outputs)], gram(50, inputs)
    for rank in (1, 3):
        found = shared_factors(weights, metric, rank)
        assert total(weights, found, metric) == pytest.approx(slow_shared(weights, metric, rank), rel=1e-6)


def slow_coefficients(weight: Tensor, basis: Tensor, x: Tensor) -> Tensor:
    """Each output by least squares on the tokens themselves."""
    rows = [torch.linalg.lstsq(x @ basis.mT, (x @ row)[:, None]).solution[:, 0] for row in weight]
    return torch.stack(rows)


def test_fitted_coefficients_are_least_squares_on_the_tokens():
    weight, basis, x = normal(0, 5, 8), normal(1, 3, 8), normal(2, 60, 8) @ normal(3, 8, 8)
    assert torch.allclose(fitted(weight, basis, x.mT @ x / len(x)), slow_coefficients(weight, basis, x), atol=1e-9)


def test_full_rank_gives_every_weight_back():
    weights, metric = [normal(0, 6, 5), normal(1, 6, 5)], gram(2, 5)
    found = shared_factors(weights, metric, 5)
    for weight, own in zip(weights, found.coefficients, strict=True):
        assert torch.allclose(own @ found.basis, weight, atol=1e-10)


def test_one_weight_alone_is_whitened_svd():
    from spectrim.linalg.factor import decompose, truncate
    from spectrim.linalg.metric import root_of

    weight, metric = normal(0, 6, 9), gram(1, 9)
    found, alone = shared_factors([weight], metric, 4), truncate(decompose(weight, right=root_of(metric)), 4)
    assert torch.allclose(found.coefficients[0] @ found.basis, alone.left @ alone.right, atol=1e-10)


@given(seed=st.integers(0, 200), rank=st.integers(1, 6), layers=st.integers(1, 4))
def test_own_coefficients_are_never_worse_on_own_inputs(seed, rank, layers):
    weights = [normal(seed + i, 4 + i, 7) for i in range(layers)]
    metrics = [gram(1000 + seed + 10 * i, 7) for i in range(layers)]
    found = shared_factors(weights, torch.stack(metrics).mean(0), rank)
    for weight, own, metric in zip(weights, found.coefficients, metrics, strict=True):
        pooled = error(weight, own @ found.basis, metric)
        assert error(weight, fitted(weight, found.basis, metric) @ found.basis, metric) <= pooled * (1 + 1e-9) + 1e-12


@given(seed=st.integers(0, 200), scale=st.sampled_from([1e-6, 1e-2, 1e3, 1e8]))
def test_the_scale_of_the_inputs_changes_nothing(seed, scale):
    weights, metric = [normal(seed, 6, 8), normal(seed + 1, 4, 8)], gram(seed + 2, 8)
    plain, scaled = (shared_factors(weights, g, 3) for g in (metric, metric * scale))
    for one, other in zip(plain.coefficients, scaled.coefficients, strict=True):
        assert torch.allclose(one @ plain.basis, other @ scaled.basis, atol=1e-8)
        assert torch.allclose(
            fitted(weights[0], plain.basis, metric), fitted(weights[0], plain.basis, metric * scale), atol=1e-8
        )


def test_inputs_that_never_fire_and_fewer_tokens_than_inputs():
    weight, basis = normal(0, 5, 8), normal(1, 6, 8)
    assert torch.equal(fitted(weight, basis, torch.zeros(8, 8, dtype=torch.float64)), torch.zeros(5, 6).double())
    x = normal(2, 3, 8)
    few = fitted(weight, basis, x.mT @ x / 3)
    assert bool(torch.isfinite(few).all())
    assert torch.allclose(x @ (few @ basis).mT, x @ weight.mT, atol=1e-8)  # 3 tokens are met exactly with rank 6
    found = shared_factors([weight, weight], x.mT @ x / 3, 3)
    assert torch.allclose(x @ (found.coefficients[1] @ found.basis).mT, x @ weight.mT, atol=1e-6)


def test_cost_counts_the_basis_once():
    ranks = torch.tensor([1, 4])
    assert group_cost([7, 5], 9, ranks).tolist() == [9 + 12, 4 * (9 + 12)]
    found = shared_factors([normal(0, 7, 9), normal(1, 5, 9)], gram(2, 9), 4)
    assert found.basis.numel() + sum(c.numel() for c in found.coefficients) == 4 * (9 + 12)


def test_factors_are_balanced_and_in_the_order_of_the_layers():
    weights = [normal(0, 7, 9), torch.zeros(5, 9, dtype=torch.float64), normal(1, 4, 9)]
    found = shared_factors(weights, gram(2, 9), 5)
    left = torch.cat(found.coefficients)
    assert torch.allclose(left.mT @ left, found.basis @ found.basis.mT, atol=1e-8)
    assert [c.shape for c in found.coefficients] == [(7, 5), (5, 5), (4, 5)]
    assert float(found.coefficients[1].abs().max()) < 1e-10
