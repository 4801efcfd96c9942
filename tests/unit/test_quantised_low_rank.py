"""Codes plus a low-rank part of one weight: against the alternation written out, and what it must not do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.factor import Factors
from spectrim.linalg.normal_float import Form, from_normal, round_to_normal
from spectrim.linalg.quantised_low_rank import (
    CodesAndFactors,
    codes_and_factors,
    errors_of_forms,
    importance_of,
    low_rank_part,
    weighted_error,
)

FORM = Form(bits=2, block=8, scale_bits=4, scale_block=16)
shapes = pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighed(seed: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return normal(seed, *shape), normal(seed + 100, *shape).square() * normal(seed + 200, 1, shape[1]).exp()


def product_of(factors: Factors) -> Tensor:
    return factors.left @ factors.right


def slow(weight: Tensor, fisher: Tensor, rank: int, rounds: int) -> list[tuple[Tensor, float]]:
    """Q + L and its error after each round, with SVDs and inverses as the paper has them."""
    a, b = fisher.mean(1).sqrt()[:, None], fisher.mean(0).sqrt()[None]
    codes, seen = torch.zeros_like(weight), []
    for _ in range(rounds):
        u, s, vt = torch.linalg.svd(a * (weight - codes) * b, full_matrices=False)
        low = ((u[:, :rank] * s[:rank]) @ vt[:rank]) / a / b
        codes = from_normal(round_to_normal(weight - low, FORM), FORM, torch.float64)
        seen.append((codes + low, float((fisher * (weight - codes - low).square()).sum())))
    return seen


def stands_for(found: CodesAndFactors) -> Tensor:
    return from_normal(found.rounded, FORM, torch.float64) + product_of(found.factors)


@shapes
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_alternation_up_to_the_first_rise(shape, seed):
    weight, fisher = weighed(seed, shape)
    seen = slow(weight, fisher, 3, 30)
    stop = next((k for k in range(1, 30) if seen[k][1] >= seen[k - 1][1]), 30)
    expected, error = seen[stop - 1]
    found = codes_and_factors(weight, FORM, 3, importance_of(fisher), iterations=30)
    torch.testing.assert_close(stands_for(found), expected, rtol=1e-8, atol=1e-10)
    assert found.error == pytest.approx(error, rel=1e-9)


@given(seed=st.integers(0, 500), rank=st.integers(0, 12))
def test_errors_are_those_reported_and_more_rounds_never_raise_them(seed, rank):
    weight, fisher = weighed(seed, (12, 16))
    importance = importance_of(fisher)
    errors = []
    for iterations in (1, 2, 5, 20):
        found = codes_and_factors(weight, FORM, rank, importance, iterations=iterations)
        assert found.error == pytest.approx(weighted_error(weight - stands_for(found), importance), rel=1e-8, abs=1e-18)
        assert found.factors.left.shape == (12, rank)
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)


@shapes
def test_a_metric_of_rank_one_is_solved_exactly(shape):
    """No small change of the factors lowers the error."""
    weight = normal(1, *shape)
    fisher = normal(2, shape[0], 1).exp() * normal(3, 1, shape[1]).exp()
    importance = importance_of(fisher)
    best = low_rank_part(weight, 4, importance)
    least = weighted_error(weight - product_of(best), importance)
    root = fisher.sqrt()
    s = torch.linalg.svdvals(root * weight)
    assert least == pytest.approx(float(s[4:].square().sum()), rel=1e-9)


@shapes
def test_full_rank_leaves_nothing_and_rank_0_is_plain_rounding(shape):
    weight, fisher = weighed(5, shape)
    importance = importance_of(fisher)
    whole = codes_and_factors(weight, FORM, min(shape), importance, iterations=5)
    torch.testing.assert_close(stands_for(whole), weight, rtol=0, atol=1e-9)
    none = codes_and_factors(weight, FORM, 0, importance, iterations=5)
    torch.testing.assert_close(
        stands_for(none), from_normal(round_to_normal(weight, FORM), FORM, torch.float64), rtol=0, atol=0
    )


def test_weighing_and_a_low_rank_part_lower_the_weighted_error():
    """Over ten weights together: of single ones weighing loses some, since blocks take their scale from all columns."""

    def error(seed: int, rank: int, *, weigh: bool) -> float:
        weight, fisher = weighed(seed, (24, 32))
        importance = importance_of(fisher if weigh else torch.ones_like(fisher))
        found = codes_and_factors(weight, FORM, rank, importance, iterations=20)
        return weighted_error(weight - stands_for(found), importance_of(fisher))

    sums = [
        sum(error(seed, rank, weigh=weigh) for seed in range(10)) for rank, weigh in ((4, True), (4, False), (0, True))
    ]
    assert sums[0] < 0.95 * sums[1]
    assert sums[1] < 0.95 * sums[2]


def test_no_information_counts_all_alike_and_dead_rows_divide_by_nothing():
    weight, fisher = weighed(7, (8, 12))
    assert bool((importance_of(torch.zeros(8, 12)).each == 1).all())
    fisher[3], fisher[:, 5] = 0, 0
    found = codes_and_factors(weight, FORM, 2, importance_of(fisher), iterations=5)
    assert bool(torch.isfinite(stands_for(found)).all())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_the_menu_holds_errors_of_the_first_round(rank, size):
    """`size`: Fisher information of a real model is far below 1."""
    weight, fisher = weighed(8, (16, 40))
    importance = importance_of(size * fisher)
    forms = [FORM._replace(bits=bits, block=block) for bits in (2, 3, 4, 8) for block in (8, 16)]
    first = [codes_and_factors(weight, form, rank, importance, iterations=1).error for form in forms]
    assert errors_of_forms(weight, forms, rank, importance).tolist() == pytest.approx(first, rel=1e-3)
