"""Scales and zeros in codes of their own: against loops over single groups, the rule against the solver written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.bilevel import (
    Bilevel,
    BilevelRule,
    Levels,
    dequantise_bilevel,
    round_statistics,
    row_blocks,
    statistics_of,
)
from spectrim.linalg.columns import DAMPING, gptq, inverse_root, solve_columns
from spectrim.linalg.quantise import Grid, as_stored, code_of, dequantise, fit_grid, level_of


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, outputs: int = 10, inputs: int = 48) -> tuple[Tensor, Tensor]:
    x = normal(seed + 1, 4 * inputs, inputs) @ normal(seed + 2, inputs, inputs)
    return normal(seed, outputs, inputs), x.mT @ x / len(x)


def slow_levels(values: Tensor, bits: int, rows: int) -> Tensor:
    """What statistics (O, G) become, one at a time: the nearest of all levels of their block."""
    found = torch.empty_like(values)
    for o in range(values.shape[0]):
        for g in range(values.shape[1]):
            block = values[o // rows * rows : o // rows * rows + rows, g]
            low = as_stored(block.min())
            step = as_stored((block.max() - low).clamp(min=0) / (2**bits - 1))
            levels = low + step * torch.arange(2**bits, dtype=values.dtype)
            found[o, g] = levels[(levels - values[o, g]).abs().argmin()]
    return found


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("outputs", "rows"), [(12, 4), (10, 4), (3, 3), (5, 1), (7, 16)])
def test_statistics_go_to_the_nearest_level_of_their_block(bits, outputs, rows):
    values = normal(bits, outputs, 3).abs()
    levels = round_statistics(values, bits, rows)
    assert levels.steps.shape == levels.lows.shape == (row_blocks(outputs, rows), 3)
    assert torch.equal(as_stored(levels.steps), levels.steps)
    assert torch.equal(as_stored(levels.lows), levels.lows)
    expected = slow_levels(values, bits, rows)
    torch.testing.assert_close(
        (statistics_of(levels, rows) - values).abs(), (expected - values).abs(), rtol=1e-9, atol=1e-12
    )


@given(seed=st.integers(0, 1000), rows=st.integers(1, 9), bits=st.integers(2, 8))
def test_statistics_miss_by_half_a_step_and_what_bfloat16_takes(seed, rows, bits):
    values = normal(seed, 8, 2).abs()
    levels = round_statistics(values, bits, rows)
    missed = (statistics_of(levels, rows) - values).abs()
    steps = levels.steps.repeat_interleave(rows, 0)[:8]
    assert bool((missed <= 0.5 * steps + 2.0**-8 * values.amax()).all())


def test_blocks_of_equal_statistics_have_no_steps():
    levels = round_statistics(torch.full((6, 2), 0.75, dtype=torch.float64), 3, 4)
    assert not levels.steps.any()
    assert torch.equal(statistics_of(levels, 4), torch.full((6, 2), 0.75, dtype=torch.float64))


def test_a_weight_is_its_scale_times_its_distance_from_zero():
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scales = Levels(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8), torch.tensor([[0.5, 1.0]]), torch.ones(1, 2))
    zeros = Levels(torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8), torch.full((1, 2), 0.25), torch.ones(1, 2))
    found = dequantise_bilevel(Bilevel(codes, scales, zeros), 2)
    for o in range(2):
        for i in range(4):
            g = i // 2
            scale = [0.5, 1.0][g] * int(scales.codes[o, g]) + 1
            zero = 0.25 * int(zeros.codes[o, g]) + 1
            assert float(found[o, i]) == scale * (int(codes[o, i]) - zero)


def slow_bilevel(weight: Tensor, gram: Tensor, bits: int, group: int, statistic_bits: int, rows: int) -> Tensor:
    """Values: after each column the inverse of what is left of the Gram matrix, formed anew; no blocks."""
    now, values = weight.clone(), torch.empty_like(weight)
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    grid = Grid(torch.empty(0), torch.empty(0))
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % group == 0:
            wanted = fit_grid(now[:, j : j + group], bits, symmetric=False)
            scale = slow_levels(wanted.scale[:, None], statistic_bits, rows)[:, 0]
            zero = (wanted.scale * wanted.zero / scale).clamp(0, 2**bits - 1)
            grid = Grid(scale, slow_levels(zero[:, None], statistic_bits, rows)[:, 0])
        values[:, j] = level_of(code_of(now[:, j], grid, bits), grid)
        now[:, j:] -= torch.outer((now[:, j] - values[:, j]) / inverse[0, 0], inverse[0])
    return values


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group", "block"), [(16, 16), (8, 48), (48, 16), (16, 8)])
def test_blocked_equals_the_unblocked_oracle(bits, group, block):
    weight, gram = problem(bits)
    rule = BilevelRule(weight, bits, group, statistic_bits=3, rows=4)
    rounded = solve_columns(weight, inverse_root(gram), rule, block=block)
    torch.testing.assert_close(rounded, slow_bilevel(weight, gram, bits, group, 3, 4), rtol=1e-9, atol=1e-9)
    assert torch.equal(dequantise_bilevel(rule.result(), 4), rounded)


def test_small_groups_with_rounded_scales_lose_less_than_large_groups_of_more_bytes():
    """16 bits of statistics for each group of 16 weights would cost 1.25 bits; rounded they cost 0.6."""
    weight, gram = problem(5, 32, 64)
    weight *= torch.exp(normal(6, 64))  # columns of different sizes, which large groups do not fit
    rule = BilevelRule(weight, 3, 8, statistic_bits=3, rows=16)
    small = solve_columns(weight, inverse_root(gram), rule)
    large = dequantise(gptq(weight, gram, 3, 64, symmetric=False), 3)
    lost = [float(((weight - found) @ gram * (weight - found)).sum()) for found in (small, large)]
    assert lost[0] < 0.6 * lost[1]


def test_rows_of_zeros_stay_zero():
    weight, gram = problem(7, 8, 16)
    weight[2] = 0
    rule = BilevelRule(weight, 3, 8, statistic_bits=3, rows=1)
    assert not solve_columns(weight, inverse_root(gram), rule)[2].any()
