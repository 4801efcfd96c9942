"""Roots, shrinkage and truncation of metrics, against definitions evaluated without roots."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.factor import decompose
from spectrim.linalg.metric import RELATIVE_FLOOR, diagonal_root, quick_root, root_of, shrink


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, size: int, samples: int) -> Tensor:
    rows = normal(seed, samples, size)
    return rows.mT @ rows / samples


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


# ---------- root_of


@given(seed=st.integers(0, 10_000), size=st.integers(1, 24))
def test_root_times_its_transpose_is_the_covariance_and_dual_is_the_inverse(seed, size):
    c = covariance(seed, size, 3 * size + 2)
    root, dual = root_of(c)
    torch.testing.assert_close(root @ root.mT, c, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dual.mT @ root, eye(size), rtol=0, atol=1e-9)
    torch.testing.assert_close(dual, torch.linalg.inv(root).mT, rtol=1e-6, atol=1e-6 * float(dual.abs().max()))


@pytest.mark.fault(46, 48)
def test_singular_covariance_keeps_its_value_and_gets_a_floor_relative_to_the_largest_eigenvalue():
    rows = normal(3, 4, 10)  # 4 tokens, 10 inputs
    c = rows.mT @ rows
    root, dual = root_of(c)
    largest = float(torch.linalg.matrix_norm(c, 2))
    excess = root @ root.mT - c
    assert float(torch.linalg.matrix_norm(excess, 2)) == pytest.approx(RELATIVE_FLOOR * largest, rel=1e-3)
    assert int(torch.linalg.matrix_rank(root)) == 10
    torch.testing.assert_close(dual.mT @ root, eye(10), rtol=0, atol=1e-9)
    condition = float(torch.linalg.cond(root))
    assert condition == pytest.approx(RELATIVE_FLOOR**-0.5, rel=1e-3)


def test_slightly_indefinite_covariance_is_floored_not_refused():
    q = torch.linalg.qr(normal(5, 6, 6)).Q
    c = q @ torch.diag(torch.tensor([4.0, 2, 1, 0.5, 0.1, -1e-9], dtype=torch.float64)) @ q.mT
    root = root_of(c).root
    assert bool(torch.isfinite(root).all())
    assert torch.linalg.eigvalsh(root @ root.mT)[0].item() == pytest.approx(4 * RELATIVE_FLOOR, rel=1e-3)


@pytest.mark.fault(46)
@pytest.mark.parametrize("c", [torch.zeros(5, 5, dtype=torch.float64), -eye(5)])
def test_root_of_a_covariance_without_any_positive_eigenvalue_is_the_identity(c):
    root, dual = root_of(c)
    assert torch.equal(root, eye(5))
    assert torch.equal(dual, eye(5))


@pytest.mark.fault(49)
@given(exponent=st.integers(-12, 12), seed=st.integers(0, 1000))
def test_scaling_a_covariance_scales_its_root_and_nothing_else(exponent, seed):
    rows = normal(seed, 5, 8)  # singular on purpose: an absolute jitter would show here
    c, factor = rows.mT @ rows, 4.0**exponent  # a power of two squared: exact in floating point
    plain, scaled = root_of(c), root_of(factor * c)
    assert torch.equal(scaled.root, 2.0**exponent * plain.root)
    assert torch.equal(scaled.dual, plain.dual / 2.0**exponent)


def test_root_reads_both_triangles():
    c = covariance(1, 6, 30)
    lopsided = torch.triu(c, 1) * 2 + torch.diag(c.diagonal())  # its symmetric part is c
    torch.testing.assert_close(root_of(lopsided).root, root_of(c).root, rtol=1e-12, atol=1e-12)


# ---------- shrink


@given(seed=st.integers(0, 1000), size=st.integers(1, 12), ratio=st.floats(0, 1))
def test_shrink_keeps_the_trace_and_moves_every_eigenvalue_towards_the_mean(seed, size, ratio):
    c = covariance(seed, size, size + 3)
    shrunk = shrink(c, ratio)
    assert float(shrunk.trace()) == pytest.approx(float(c.trace()), rel=1e-12)
    before, mean = torch.linalg.eigvalsh(c), float(c.trace()) / size
    torch.testing.assert_close(
        torch.linalg.eigvalsh(shrunk), mean + (1 - ratio) * (before - mean), rtol=1e-9, atol=1e-11
    )


def test_shrink_ends():
    c = covariance(2, 7, 20)
    assert torch.equal(shrink(c, 0.0), c)
    torch.testing.assert_close(shrink(c, 1.0), eye(7) * c.trace() / 7)


# ---------- diagonal_root


def test_diagonal_root_is_the_root_of_the_diagonal():
    weights = torch.tensor([4.0, 9.0, 0.25], dtype=torch.float64)
    root, dual = diagonal_root(weights)
    assert torch.equal(root, torch.diag(torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64)))
    torch.testing.assert_close(
        dual, torch.diag(torch.tensor([1 / 2, 1 / 3, 2], dtype=torch.float64)), rtol=1e-15, atol=0
    )


def test_diagonal_root_agrees_with_root_of_the_diagonal_matrix():
    weights = normal(8, 9).square()
    diagonal, full = diagonal_root(weights), root_of(torch.diag(weights))
    torch.testing.assert_close(diagonal.root @ diagonal.root.mT, full.root @ full.root.mT, rtol=1e-12, atol=1e-14)


@pytest.mark.fault(46)
def test_diagonal_root_floors_a_dead_input_and_survives_all_zero():
    root, dual = diagonal_root(torch.tensor([4.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        root, torch.diag(torch.tensor([2.0, (4 * RELATIVE_FLOOR) ** 0.5], dtype=torch.float64)), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(dual @ root, eye(2), rtol=0, atol=1e-12)
    root, dual = diagonal_root(torch.zeros(3, dtype=torch.float64))
    assert torch.equal(root, eye(3))
    assert torch.equal(dual, eye(3))


# ---------- quick_root


@given(seed=st.integers(0, 10_000), size=st.integers(1, 24))
def test_quick_root_is_a_root_with_its_dual(seed, size):
    c = shrink(covariance(seed, size, 2 * size), 0.01)
    root, dual = quick_root(c)
    torch.testing.assert_close(root @ root.mT, c, rtol=1e-9, atol=1e-12 * float(c.abs().max()))
    torch.testing.assert_close(dual.mT @ root, eye(size), rtol=0, atol=1e-9)


@pytest.mark.fault(46)
@pytest.mark.parametrize("samples", [1, 4, 5])
def test_quick_root_of_a_singular_covariance_is_the_eigen_root(samples):
    c = covariance(3, 6, samples)
    for quick, slow in zip(quick_root(c), root_of(c), strict=True):
        assert torch.equal(quick, slow)


def test_the_choice_of_root_does_not_change_a_decomposition():
    left, right = shrink(covariance(1, 7, 30), 0.2), shrink(covariance(2, 5, 30), 0.01)
    weight = normal(3, 7, 5)
    quick = decompose(weight, quick_root(left), quick_root(right))
    slow = decompose(weight, root_of(left), root_of(right))
    torch.testing.assert_close(quick.energy, slow.energy)
    for rank in range(1, 5):
        torch.testing.assert_close(
            quick.left[:, :rank] @ quick.right[:rank], slow.left[:, :rank] @ slow.right[:rank], rtol=1e-7, atol=1e-9
        )
