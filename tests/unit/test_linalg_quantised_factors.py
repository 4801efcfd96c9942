"""Both parts of a low-rank weight in few bits, against least squares and minimisation written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.columns import gptq
from spectrim.linalg.factor import Factors, balance
from spectrim.linalg.quantise import Rounded, dequantise
from spectrim.linalg.quantised_factors import (
    BLOCKS,
    moment_behind,
    refit_rows,
    round_factors,
    round_pivots,
    round_rows,
    size_of_terms,
    spread,
)

OUTPUTS, INPUTS, RANK = 14, 18, 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) @ normal(seed + 1, size, size)
    return x.mT @ x / len(x)


def uneven(seed: int, outputs: int = OUTPUTS, inputs: int = INPUTS, rank: int = RANK) -> Factors:
    """Factors whose product has a spectrum that falls by 30 from end to end, in an arbitrary basis."""
    size = torch.logspace(0, -1.5, rank, dtype=torch.float64)
    left, right = torch.linalg.qr(normal(seed, outputs, rank)).Q, torch.linalg.qr(normal(seed + 1, inputs, rank)).Q.mT
    turn = normal(seed + 2, rank, rank)
    return Factors(left @ turn, torch.linalg.solve(turn, size[:, None] * right))


def loss(missing: Tensor, gram: Tensor, outputs: Tensor | None = None) -> float:
    weighed = missing if outputs is None else outputs @ missing
    return float((weighed @ gram * missing).sum())


def as_it_is(matrix: Tensor, _moment: Tensor) -> tuple[Tensor, Tensor]:
    return matrix, matrix


def to_grid(matrix: Tensor, _moment: Tensor) -> tuple[Tensor, Tensor]:
    rounded = (matrix * 4).round() / 4
    return rounded, rounded


def by_columns(bits: int):
    """The column solver, with what it stands for kept."""

    def rounding(matrix: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        found: Rounded = gptq(matrix, moment, bits, 0, symmetric=False, search=True)
        values = dequantise(found, bits, torch.float64)
        return values, values

    return rounding


@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_spreading_keeps_the_product_and_makes_terms_small(seed, rank):
    """Between the nuclear norm's bound, which is the least there is, and what balanced factors have."""
    given_ = uneven(seed, rank=rank)
    found, product = spread(given_), given_.left @ given_.right
    torch.testing.assert_close(found.left @ found.right, product, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.left.mT @ found.left, found.right @ found.right.mT, rtol=1e-8, atol=1e-8)
    singular = torch.linalg.svdvals(product)[:rank]
    least = float(singular.sum() ** 2 / rank)
    assert least * (1 - 1e-9) <= float(size_of_terms(found))
    assert float(size_of_terms(given_)) >= least * (1 - 1e-9)
    torch.testing.assert_close(size_of_terms(balance(given_)), singular.square().sum(), rtol=1e-8, atol=0)


def test_a_rotation_is_worth_something_where_terms_differ():
    given_ = uneven(3, 64, 80, 32)
    assert float(size_of_terms(spread(given_))) < 0.6 * float(size_of_terms(balance(given_)))


@pytest.mark.parametrize("weighted", [False, True])
def test_refitted_rows_are_least_squares(weighted):
    """Against lstsq on B^1/2 U_q, column by column of the weight."""
    left, right = uneven(1)
    rounded = (left * 2).round() / 2
    outputs = covariance(5, OUTPUTS) if weighted else torch.eye(OUTPUTS, dtype=torch.float64)
    root = torch.linalg.cholesky(outputs).mT
    expected = torch.linalg.lstsq(root @ rounded, root @ left @ right).solution
    found = refit_rows(left, rounded, right, outputs @ rounded, ridge=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    pulled = refit_rows(left, rounded, right, outputs @ rounded, ridge=1e12)
    torch.testing.assert_close(pulled, right, rtol=1e-6, atol=1e-6)


def test_rows_that_are_left_make_up_for_those_that_are_rounded():
    """Row by row against the minimum of tr(M D A D^T) over the rows that are left, as one system over all entries."""
    rank, inputs = 4, 5
    right, gram, between = normal(2, rank, inputs), covariance(3, inputs), covariance(4, rank)
    damped = between + 0.01 * between.diagonal().mean() * torch.eye(rank, dtype=torch.float64)
    whole = torch.kron(damped, gram)  # of D in row-major order
    rounded = torch.empty_like(right)
    now = right.clone()
    for row in range(rank):
        rounded[row] = (now[row] * 4).round() / 4
        done = (row + 1) * inputs
        fixed = (right - rounded).flatten()[:done]
        best = -torch.linalg.solve(whole[done:, done:], whole[done:, :done] @ fixed)
        now[row + 1 :] = right[row + 1 :] - best.reshape(-1, inputs)
    found = torch.cat(round_rows(right, gram, between, to_grid, size=1))
    torch.testing.assert_close(found, rounded, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 127, 128, 129])
def test_blocks_hold_every_row_once(rank):
    right = normal(1, rank, 7)
    parts = round_rows(right, covariance(2, 7), covariance(3, rank), as_it_is)
    torch.testing.assert_close(torch.cat(parts), right, rtol=1e-12, atol=1e-12)
    assert 1 <= len(parts) <= BLOCKS


def test_without_correlation_between_rows_blocks_do_not_show():
    right, gram = normal(1, RANK, INPUTS), covariance(2, INPUTS)
    between = torch.diag(torch.rand(RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    one, many = (torch.cat(round_rows(right, gram, between, to_grid, size=size)) for size in (RANK, 1))
    assert torch.equal(one, many)


@pytest.mark.parametrize("basis", ["rotated", "balanced"])
def test_without_rounding_nothing_changes(basis):
    given_ = uneven(7)
    left, right = round_factors(given_, covariance(8, INPUTS), as_it_is, torch.cat, basis=basis)
    torch.testing.assert_close(left @ right, given_.left @ given_.right, rtol=1e-9, atol=1e-9)
    rows, coefficients = normal(9, RANK, INPUTS), normal(10, OUTPUTS - RANK, RANK)
    kept_rows, kept = round_pivots(rows, coefficients, covariance(8, INPUTS), as_it_is, torch.cat)
    torch.testing.assert_close(kept_rows, rows, rtol=1e-12, atol=1e-12)
    assert torch.equal(kept, coefficients)


@pytest.mark.parametrize("bits", [3, 4])
def test_both_parts_together_lose_less_than_each_rounded_for_itself(bits):
    outputs, inputs, rank = 72, 60, 48
    gram, rounding = covariance(11, inputs), by_columns(bits)
    ours, plain = 0.0, 0.0
    for seed in range(4):
        given_ = uneven(20 + seed, outputs, inputs, rank)
        product = given_.left @ given_.right
        left, right = round_factors(given_, gram, rounding, torch.cat)
        ours += loss(product - left @ right, gram)
        u, v = balance(given_)
        plain += loss(product - rounding(u, moment_behind(v, gram))[0] @ rounding(v, gram)[0], gram)
    assert ours < 0.9 * plain


@pytest.mark.parametrize("bits", [3, 4])
def test_pivot_parts_together_lose_less_than_each_rounded_for_itself(bits):
    outputs, inputs, rank = 72, 60, 48
    gram, rounding = covariance(11, inputs), by_columns(bits)
    eye = torch.eye(rank, dtype=torch.float64)
    ours, plain = 0.0, 0.0
    for seed in range(4):
        rows, coefficients = normal(seed, rank, inputs), 0.5 * normal(seed + 9, outputs - rank, rank)
        product = torch.cat([rows, coefficients @ rows])
        kept_rows, kept = round_pivots(rows, coefficients, gram, rounding, torch.cat)
        ours += loss(product - torch.cat([eye, kept]) @ kept_rows, gram)
        kept_rows, kept = rounding(rows, gram)[0], rounding(coefficients, moment_behind(rows, gram))[0]
        plain += loss(product - torch.cat([eye, kept]) @ kept_rows, gram)
    assert ours < 0.9 * plain


def test_outputs_that_count_more_are_kept_better():
    """Tenfold at most: with weights that tell outputs apart by thousands V' grows, and rounding it costs more."""
    gram, outputs = covariance(31, INPUTS), torch.diag(torch.logspace(0.5, -0.5, OUTPUTS, dtype=torch.float64))
    weighed = even = 0.0
    for seed in range(8):
        given_ = uneven(32 + seed)
        product = given_.left @ given_.right
        for metric in (outputs, None):
            left, right = round_factors(given_, gram, by_columns(3), torch.cat, outputs=metric)
            lost = loss(product - left @ right, gram, outputs)
            weighed, even = (weighed + lost, even) if metric is not None else (weighed, even + lost)
    assert weighed < even


@pytest.mark.parametrize("rank", [1, RANK])
def test_zeros_and_dead_inputs_are_no_error(rank):
    gram = covariance(1, INPUTS)
    gram[3], gram[:, 3] = 0, 0
    for factors in (
        Factors(torch.zeros(OUTPUTS, rank).double(), torch.zeros(rank, INPUTS).double()),
        uneven(2, rank=rank),
    ):
        for moment in (gram, torch.zeros_like(gram)):
            for part in round_factors(factors, moment, by_columns(4), torch.cat):
                assert bool(torch.isfinite(part).all())


def test_pivots_of_full_rank_have_no_coefficients():
    rows, none = normal(1, OUTPUTS, INPUTS), torch.empty(0, OUTPUTS, dtype=torch.float64)
    kept_rows, kept = round_pivots(rows, none, covariance(2, INPUTS), by_columns(8), torch.cat)
    assert kept.shape == (0, OUTPUTS)
    torch.testing.assert_close(kept_rows, rows, rtol=0.05, atol=0.05)
