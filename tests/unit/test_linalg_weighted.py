"""Low rank with a weight for every entry, against closed forms, a slow oracle and the definition."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, decompose, truncate
from spectrim.linalg.metric import diagonal_root
from spectrim.linalg.weighted import damped, weighted_error, weighted_factors

SOLVERS = ("als", "adam", "adam-sgd")
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, shape: tuple[int, int] = (14, 11), rank: int = 4) -> tuple[Tensor, Tensor, Factors]:
    """Weight, uneven weights of its entries, and the plain SVD's factors to start from."""
    weight, weights = normal(seed, *shape), (2 * normal(seed + 1, *shape)).exp()
    return weight, weights, truncate(decompose(weight), rank)


def slow_als(weight: Tensor, weights: Tensor, start: Factors, sweeps: int) -> Tensor:
    """One lstsq for each row and column, with the roots of the weights multiplied in."""
    left, right = start.left.clone(), start.right.clone()
    for _ in range(sweeps):
        for i in range(len(weight)):
            root = weights[i].sqrt()
            left[i] = torch.linalg.lstsq((right * root).mT, (weight[i] * root)[:, None]).solution[:, 0]
        for j in range(weight.shape[1]):
            root = weights[:, j].sqrt()
            right[:, j] = torch.linalg.lstsq(left * root[:, None], (weight[:, j] * root)[:, None]).solution[:, 0]
    return left @ right


def test_als_equals_the_slow_oracle():
    weight, weights, start = problem()
    for sweeps in (1, 3):
        fast = weighted_factors(weight, weights, start, solver="als", iterations=sweeps, tolerance=0.0)
        assert torch.allclose(fast.left @ fast.right, slow_als(weight, weights, start, sweeps), atol=1e-6)


def test_the_error_is_the_sum_over_entries():
    weight, weights, start = problem()
    product = start.left @ start.right
    by_hand = sum(float(weights[i, j] * (weight[i, j] - product[i, j]) ** 2) for i in range(14) for j in range(11))
    assert weighted_error(weight, weights, start) == pytest.approx(by_hand, rel=1e-12)


@every_solver
def test_weights_of_rank_one_lead_to_their_closed_form(solver):
    """I_ij = r_i c_j is the one case that an SVD solves: diagonal metrics on both sides."""
    weight = normal(3, 14, 11)
    rows, columns = normal(4, 14).exp(), normal(5, 11).exp()
    weights = rows[:, None] * columns
    optimum = truncate(decompose(weight, diagonal_root(rows), diagonal_root(columns)), 4)
    start = truncate(decompose(weight), 4)
    found = weighted_factors(weight, weights, start, solver=solver, iterations=400, tolerance=1e-7)
    least, first = (weighted_error(weight, weights, factors) for factors in (optimum, start))
    assert least <= weighted_error(weight, weights, found) <= least + 0.02 * (first - least)
    again = weighted_factors(weight, weights, optimum, solver=solver, iterations=50)
    assert weighted_error(weight, weights, again) == pytest.approx(least, rel=1e-9)  # nothing better is near


@every_solver
def test_the_error_never_rises_above_the_start_and_falls_where_there_is_something_to_gain(solver):
    weight, weights, start = problem()
    before = weighted_error(weight, weights, start)
    after = [
        weighted_error(
            weight, weights, weighted_factors(weight, weights, start, solver=solver, iterations=n, tolerance=0.0)
        )
        for n in (1, 2, 5, 20, 60)
    ]
    assert all(error <= before * (1 + 1e-12) for error in after)
    assert after == sorted(after, reverse=True)
    assert after[-1] < 0.8 * before


@every_solver
def test_units_do_not_matter(solver):
    weight, weights, start = problem()
    plain = weighted_factors(weight, weights, start, solver=solver, iterations=25)
    scaled = weighted_factors(
        1e3 * weight, 1e-6 * weights, Factors(start.left * 1e5, start.right * 1e-2), solver=solver, iterations=25
    )
    assert torch.allclose(scaled.left @ scaled.right, 1e3 * (plain.left @ plain.right), rtol=1e-6, atol=1e-6)


@every_solver
def test_an_exact_start_and_a_zero_weight_are_returned_as_they_are(solver):
    weight, weights, _ = problem()
    exact = truncate(decompose(weight), 11)
    assert weighted_factors(weight, weights, exact, solver=solver, iterations=5) is exact
    nothing = Factors(torch.zeros(14, 2).double(), torch.zeros(2, 11).double())
    assert weighted_factors(weight * 0, weights, nothing, solver=solver, iterations=5) is nothing


def test_damping_keeps_entries_without_weight_near_the_weight():
    """Half of the entries never saw a gradient: undamped, the product is free there and goes anywhere."""
    weight, weights, start = problem(7)
    weights[:, :5] = 0
    assert torch.equal(damped(torch.zeros(3, 3).double(), 0.1), torch.ones(3, 3).double())

    def unseen(damping: float) -> float:
        found = weighted_factors(weight, damped(weights, damping), start, solver="als", iterations=30, tolerance=0.0)
        return float((weight - found.left @ found.right)[:, :5].square().mean())

    assert unseen(0.1) < unseen(1e-3) < unseen(1e-9)
    assert unseen(0.1) < 2 * float(weight[:, :5].square().mean())
