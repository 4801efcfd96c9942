"""Entries kept apart: places in bytes, which ones are kept, and the column solver with outliers written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.columns import DAMPING, UniformRule, inverse_root, solve_columns
from spectrim.linalg.outliers import (
    JUMP,
    Entries,
    OutlierRule,
    entries_at,
    from_gaps,
    largest,
    leave_one_out,
    most_gap_bytes,
    outlier_limit,
    solve_with_outliers,
    to_gaps,
    with_entries,
)
from spectrim.linalg.quantise import Grid, as_stored, code_of, dequantise, fit_grid, level_of


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, outputs: int = 10, inputs: int = 32) -> tuple[Tensor, Tensor]:
    x = normal(seed + 1, 4 * inputs, inputs) @ normal(seed + 2, inputs, inputs)
    return normal(seed, outputs, inputs), x.mT @ x / len(x)


# ---------- places


@given(positions=st.sets(st.integers(0, 5000), max_size=60))
def test_places_come_back_from_their_gaps(positions):
    places = torch.tensor(sorted(positions), dtype=torch.int64)
    stream = to_gaps(places)
    assert stream.dtype == torch.uint8
    assert torch.equal(from_gaps(stream), places)
    assert len(places) <= len(stream) <= most_gap_bytes(5001, len(places))


@given(stream=st.lists(st.integers(0, 255), max_size=50))
def test_any_bytes_give_ascending_places(stream):
    places = from_gaps(torch.tensor(stream, dtype=torch.uint8))
    assert len(places) == sum(byte < JUMP for byte in stream)
    assert bool((places.diff() > 0).all())
    assert not len(places) or int(places[0]) >= 0


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511])
def test_gaps_around_a_jump(gap):
    places = torch.tensor([gap, 2 * gap + 1])
    assert torch.equal(from_gaps(to_gaps(places)), places)
    assert len(to_gaps(places)) == 2 * (1 + gap // JUMP)


def test_one_per_cent_takes_little_more_than_a_byte_each_and_the_bound_is_reached():
    mask = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) < 0.01
    places = mask.nonzero()[:, 0]
    assert 1.05 < len(to_gaps(places)) / len(places) < 1.12
    assert len(to_gaps(torch.tensor([1020]))) == most_gap_bytes(1021, 1) == 5
    assert most_gap_bytes(1000, 0) == 0


def test_entries_take_their_places_and_gradients_reach_both():
    matrix, mask = normal(1, 4, 6).requires_grad_(), normal(2, 4, 6) > 1
    entries = entries_at(normal(3, 4, 6), mask)
    values = entries.values.clone().requires_grad_()
    found = with_entries(matrix, Entries(entries.positions, values))
    assert torch.equal(found[mask], values)
    assert torch.equal(found[~mask], matrix[~mask])
    found.sum().backward()
    assert matrix.grad is not None
    assert torch.equal(matrix.grad, (~mask).double())
    assert values.grad is not None
    assert bool((values.grad == 1).all())


@given(seed=st.integers(0, 1000), count=st.integers(0, 12))
def test_the_largest_are_the_first_of_all_in_order(seed, count):
    scores = torch.randint(4, (3, 4), generator=torch.Generator().manual_seed(seed)).double()
    order = sorted(range(12), key=lambda place: (-float(scores.flatten()[place]), place))
    assert entries_at(scores, largest(scores, count)).positions.tolist() == sorted(order[:count])


# ---------- outliers of the solver


def slow_leave_one_out(groups: Tensor, bits: int, importance: Tensor) -> Tensor:
    gains = torch.empty_like(groups)
    for r in range(groups.shape[0]):
        row = groups[r].tolist()

        def lost(kept: list[int], row: list[float] = row) -> float:
            values = torch.tensor([row[i] for i in kept], dtype=torch.float64)
            grid = fit_grid(values, bits, symmetric=False)
            missed = level_of(code_of(values, grid, bits), grid) - values
            return sum(float(missed[k]) ** 2 * float(importance[i]) for k, i in enumerate(kept))

        everything = list(range(len(row)))
        for i in everything:
            gains[r, i] = lost(everything) - lost([k for k in everything if k != i])
    return gains


@pytest.mark.parametrize("bits", [2, 3])
def test_gains_are_those_of_leaving_each_weight_out(bits):
    groups, importance = normal(4, 5, 7), normal(5, 7).abs()
    found = leave_one_out(groups, bits, importance, symmetric=False)
    torch.testing.assert_close(found, slow_leave_one_out(groups, bits, importance), rtol=1e-9, atol=1e-12)


def test_a_weight_alone_gains_what_it_loses():
    groups = torch.tensor([[3.0], [-2.0]], dtype=torch.float64)
    gains = leave_one_out(groups, 2, torch.ones(1, dtype=torch.float64), symmetric=True)
    grid = Grid(*(part[:, None] for part in fit_grid(groups, 2, symmetric=True)))
    torch.testing.assert_close(gains, (level_of(code_of(groups, grid, 2), grid) - groups).square())


def test_two_weights_at_the_end_of_a_group_hold_it_together():
    groups = torch.tensor([[5.0, 0.1, 5.0, -1.0, -1.0, 0.3]], dtype=torch.float64)
    found = leave_one_out(groups, 2, torch.ones(6, dtype=torch.float64), symmetric=False)
    torch.testing.assert_close(found, slow_leave_one_out(groups, 2, torch.ones(6)))


def slow_spqr(weight: Tensor, gram: Tensor, bits: int, group: int, limit: float) -> tuple[Tensor, Tensor]:
    """Values and outliers: after each column the inverse of what is left of the Gram matrix, formed anew; no blocks."""
    now, values, apart = weight.clone(), torch.empty_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(gram))]
    costs = torch.stack([inverse[0, 0] for inverse in left]).reciprocal()
    grid = Grid(torch.empty(0), torch.empty(0))
    for j in range(weight.shape[1]):
        if j % group == 0:
            here = now[:, j : j + group]
            likely = slow_leave_one_out(here, bits, costs[j : j + group]) > limit
            fitted = here.clone()
            for r in range(len(here)):
                fitted[r, likely[r]] = here[r, ~likely[r]].mean() if bool((~likely[r]).any()) else 0.0
            grid = fit_grid(fitted, bits, symmetric=False)
        rounded = level_of(code_of(now[:, j], grid, bits), grid)
        apart[:, j] = (now[:, j] - rounded).square() * costs[j] > limit
        values[:, j] = torch.where(apart[:, j], as_stored(now[:, j]), rounded)
        now[:, j:] -= torch.outer((now[:, j] - values[:, j]) / left[j][0, 0], left[j][0])
    return values, apart


def with_outliers(seed: int) -> tuple[Tensor, Tensor]:
    """A few weights are many times as large as the others."""
    weight, gram = problem(seed)
    return torch.where(normal(seed + 9, *weight.shape) > 2, 8 * weight, weight), gram


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("group", "block"), [(8, 8), (8, 16), (16, 8), (8, 128)])
def test_the_solver_with_outliers_equals_the_unblocked_oracle(bits, group, block):
    weight, gram = with_outliers(bits)
    upper = inverse_root(gram)
    limit = outlier_limit(weight, upper, 0.1)
    inner = UniformRule(weight, bits, group, symmetric=False)
    rule = OutlierRule(weight, inner, bits, limit)
    found = solve_columns(weight, upper, rule, block=block)
    values, apart = slow_spqr(weight, gram, bits, group, limit)
    assert 0 < int(apart.sum()) < weight.numel() / 4
    assert torch.equal(rule.entries.positions, apart.flatten().nonzero()[:, 0])
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)
    assert torch.equal(with_entries(dequantise(inner.result(), bits), rule.entries), found)


def solved(weight: Tensor, gram: Tensor, limit: float, most: int) -> tuple[Tensor, Entries]:
    inner, entries = solve_with_outliers(
        weight, inverse_root(gram), lambda: UniformRule(weight, 3, 8, symmetric=False), 3, limit, most
    )
    return with_entries(dequantise(inner.result(), 3), entries), entries


def loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    return float(((weight - rounded) @ gram * (weight - rounded)).sum())


def test_none_allowed_is_the_solver_without_and_planted_outliers_are_worth_keeping():
    weight, gram = with_outliers(11)
    inner = UniformRule(weight, 3, 8, symmetric=False)
    plain = solve_columns(weight, inverse_root(gram), inner)
    none, entries = solved(weight, gram, 1e-9, 0)
    assert torch.equal(none, plain)
    assert not len(entries.positions)
    limit = outlier_limit(weight, inverse_root(gram), 0.05)
    few, entries = solved(weight, gram, limit, weight.numel() // 10)
    assert len(entries.positions)
    assert loss(weight, few, gram) < 0.6 * loss(weight, plain, gram)


@pytest.mark.parametrize("most", [1, 4, 20])
def test_no_more_are_kept_than_are_allowed(most):
    weight, gram = with_outliers(12)
    _, entries = solved(weight, gram, 1e-9, most)
    assert 0 < len(entries.positions) <= most
    assert torch.equal(as_stored(entries.values), entries.values)


@given(seed=st.integers(0, 100), power=st.integers(-20, 20))
def test_scales_of_weights_and_inputs_do_not_show(seed, power):
    weight, gram = with_outliers(seed)

    def kept(w: Tensor, g: Tensor) -> list[int]:
        return solved(w, g, outlier_limit(w, inverse_root(g), 0.1), 30)[1].positions.tolist()

    assert kept(weight, gram) == kept(weight, gram * 4.0**power) == kept(weight * 2.0**power, gram)


@pytest.mark.parametrize("outputs", [1, 32])
def test_rows_that_are_all_equal_have_an_end(outputs):
    weight = normal(3, 1, 64).repeat(outputs, 1)
    upper = torch.eye(64, dtype=torch.float64)
    limit = outlier_limit(weight, upper, 0.2)
    assert limit > 0
    _, entries = solve_with_outliers(weight, upper, lambda: UniformRule(weight, 2, 16, symmetric=False), 2, limit, 3)
    assert len(entries.positions) <= 3
