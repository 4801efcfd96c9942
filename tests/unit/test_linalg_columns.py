"""The column solver against optimal brain surgery written out, one column and one inverse after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.columns import DAMPING, gptq, inverse_root, solve_columns
from spectrim.linalg.fallback import listening
from spectrim.linalg.quantise import Grid, code_of, dequantise, fit_grid, level_of, round_to_nearest
from spectrim.linalg.solver import SolverError
from spectrim.linalg.sparse24 import PruneRule, from_half, sparsegpt, two_of_four, wanda

signs = pytest.mark.parametrize("symmetric", [True, False])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, outputs: int = 10, inputs: int = 48) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs."""
    x = normal(seed + 1, 4 * inputs, inputs) @ normal(seed + 2, inputs, inputs)
    return normal(seed, outputs, inputs), x.mT @ x / len(x)


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    change = weight - rounded
    return float((change @ gram * change).sum())


def slow_gptq(weight: Tensor, gram: Tensor, bits: int, group: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Codes and values: after each column the inverse of what is left of the Gram matrix, formed anew; no blocks."""
    now, inputs = weight.clone(), weight.shape[1]
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    hessian = damped(gram)
    grid = Grid(torch.empty(0), torch.empty(0))
    for j in range(inputs):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % group == 0:
            grid = fit_grid(now[:, j : j + group], bits, symmetric=symmetric)
        codes[:, j] = code_of(now[:, j], grid, bits)
        values[:, j] = level_of(codes[:, j], grid)
        error = (now[:, j] - values[:, j]) / inverse[0, 0]
        now[:, j:] -= torch.outer(error, inverse[0])
    return codes, values


@signs
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group", "block"), [(16, 16), (16, 48), (8, 16), (16, 8), (48, 16), (16, 24), (16, 1)])
def test_blocked_equals_the_unblocked_oracle(bits, symmetric, group, block):
    """Codes are whole numbers: equal means equal. Groups inside blocks, blocks inside groups, and neither."""
    weight, gram = problem(bits)
    codes, values = slow_gptq(weight, gram, bits, group, symmetric=symmetric)
    rounded = gptq(weight, gram, bits, group, symmetric=symmetric, block=block)
    assert torch.equal(rounded.codes.double(), codes)
    assert torch.equal(dequantise(rounded, bits), values)


def slow_sparsegpt(weight: Tensor, gram: Tensor) -> Tensor:
    now, inputs = weight.clone(), weight.shape[1]
    values = torch.empty_like(weight)
    hessian = damped(gram)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    mask = torch.empty(0)
    for j in range(inputs):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % 4 == 0:
            mask = two_of_four((now[:, j : j + 4] / upper[j : j + 4]).square())
        values[:, j] = now[:, j] * mask[:, j % 4]
        now[:, j:] -= torch.outer((now[:, j] - values[:, j]) / inverse[0, 0], inverse[0])
    return values


def test_pruning_equals_the_unblocked_oracle_and_beats_wanda():
    weight, gram = problem(7)
    expected = slow_sparsegpt(weight, gram)
    found = from_half(sparsegpt(weight, gram))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert loss(weight, found, gram) < 0.7 * loss(weight, from_half(wanda(weight, gram)), gram)


@pytest.mark.parametrize("block", [4, 12, 48, 128])
def test_the_block_size_does_not_show(block):
    weight, gram = problem(8)
    upper = inverse_root(gram)
    one, other = (solve_columns(weight, upper, PruneRule(weight), block=b) for b in (1, block))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 1000), inputs=st.integers(1, 20), damping=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_root_is_upper_triangular_and_gives_the_inverse(seed, inputs, damping):
    _, gram = problem(seed, 1, inputs)
    upper = inverse_root(gram, damping=damping)
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    product = upper.mT @ upper @ damped(gram, damping)
    torch.testing.assert_close(product, torch.eye(inputs, dtype=torch.float64), rtol=0, atol=1e-8)


@signs
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibration_pays(bits, symmetric):
    """Inputs as correlated as these leave round-to-nearest several times the error."""
    weight, gram = problem(3, 32, 64)
    calibrated = dequantise(gptq(weight, gram, bits, 32, symmetric=symmetric), bits)
    nearest = dequantise(round_to_nearest(weight, bits, 32, symmetric=symmetric), bits)
    assert loss(weight, calibrated, gram) < (0.7 if bits == 2 else 0.5) * loss(weight, nearest, gram)


@signs
def test_independent_inputs_leave_nothing_to_make_up_for(symmetric):
    weight = normal(4, 6, 32)
    gram = torch.diag(normal(5, 32).exp())
    calibrated = gptq(weight, gram, 3, 8, symmetric=symmetric)
    nearest = round_to_nearest(weight, 3, 8, symmetric=symmetric)
    assert torch.equal(calibrated.codes, nearest.codes)
    assert torch.equal(calibrated.scales, nearest.scales)


@given(seed=st.integers(0, 200), power=st.integers(-30, 30))
def test_the_scale_of_the_inputs_does_not_show(seed, power):
    weight, gram = problem(seed, 4, 16)
    assert torch.equal(
        gptq(weight, gram, 3, 8, symmetric=True).codes,
        gptq(weight, gram * 4.0**power, 3, 8, symmetric=True).codes,
    )


def test_few_tokens_and_dead_inputs_are_no_error():
    weight, _ = problem(9, 5, 24)
    x = normal(10, 6, 24)
    x[:, 3] = 0
    gram = x.mT @ x / 6
    found = dequantise(gptq(weight, gram, 4, 8, symmetric=True), 4)
    assert bool(torch.isfinite(found).all())
    nothing = torch.zeros_like(gram)
    assert torch.equal(
        gptq(weight, nothing, 4, 8, symmetric=True).codes, round_to_nearest(weight, 4, 8, symmetric=True).codes
    )


def test_a_gram_matrix_that_is_none_is_damped_more_and_told_or_refused():
    gram = torch.eye(6, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.2
    with listening() as told:
        upper = inverse_root(gram)
    assert bool(torch.isfinite(upper).all())
    assert [fallback.way for fallback in told] == ["damping 1"]
    with pytest.raises(SolverError, match="up to damping"):
        inverse_root(torch.full((3, 3), float("nan"), dtype=torch.float64).fill_diagonal_(1.0))


def test_a_searched_grid_lowers_the_error_at_two_bits():
    weight, gram = problem(11, 32, 64)
    plain, searched = (dequantise(gptq(weight, gram, 2, 32, symmetric=True, search=s), 2) for s in (False, True))
    assert loss(weight, searched, gram) < loss(weight, plain, gram)
