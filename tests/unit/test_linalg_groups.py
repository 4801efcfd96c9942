"""Groups left out: what they cost, which ones go, and the column solver with them written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.bits import groups_account
from spectrim.linalg.columns import UniformRule, gptq, inverse_root, solve_columns
from spectrim.linalg.groups import (
    BALANCES,
    MOST_SPARSITY,
    SALIENCIES,
    GroupRule,
    Groups,
    bitmap_bytes,
    costliest,
    from_bitmap,
    from_groups,
    group_costs,
    kept_groups,
    to_bitmap,
)
from spectrim.linalg.quantise import Grid, code_of, dequantise, fit_grid, level_of

DAMPING = 0.01
every_saliency = pytest.mark.parametrize("saliency", SALIENCIES)
every_balance = pytest.mark.parametrize("balance", BALANCES)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, outputs: int = 10, inputs: int = 32) -> tuple[Tensor, Tensor]:
    """A weight and the damped second moment of correlated inputs."""
    x = normal(seed + 1, 4 * inputs, inputs) @ normal(seed + 2, inputs, inputs)
    gram = x.mT @ x / len(x)
    return normal(seed, outputs, inputs), gram + DAMPING * gram.diagonal().mean() * torch.eye(inputs).double()


def root(hessian: Tensor) -> Tensor:
    return inverse_root(hessian, damping=1e-12)


# ---------- what a group costs


def without(row: Tensor, gone: list[int], free: list[int], hessian: Tensor) -> float:
    """Least change^T H change when the entries `gone` become 0 and those at `free` may be anything."""
    change = torch.zeros_like(row)
    change[gone] = -row[gone]
    change[free] = -torch.linalg.solve(hessian[free][:, free], hessian[free][:, gone] @ change[gone])
    return float(change @ hessian @ change)


@pytest.mark.parametrize("saliency", ["later", "all"])
def test_a_group_costs_what_is_left_when_other_columns_make_up_for_it(saliency):
    weight, hessian = problem(1, outputs=3)
    found = group_costs(weight, root(hessian), 8, saliency)
    assert found.shape == (3, 4)
    for row in range(3):
        for group in range(4):
            gone = list(range(8 * group, 8 * group + 8))
            free = [j for j in range(32) if j >= gone[-1] + 1 or (saliency == "all" and j < gone[0])]
            assert float(found[row, group]) == pytest.approx(without(weight[row], gone, free, hessian), rel=1e-6)


def test_the_papers_saliency_is_the_mean_of_what_single_weights_cost():
    weight, hessian = problem(2)
    single = weight.square() / torch.linalg.inv(hessian).diagonal()
    torch.testing.assert_close(group_costs(weight, root(hessian), 8, "weights"), single.unflatten(1, (4, 8)).mean(2))


def test_all_are_the_same_in_groups_of_one_weight_and_without_correlation():
    weight, hessian = problem(3)
    torch.testing.assert_close(*(group_costs(weight, root(hessian), 1, s) for s in ("all", "weights")))
    diagonal = hessian.diagonal().diag()
    later, every, single = (group_costs(weight, root(diagonal), 8, s) for s in SALIENCIES)
    torch.testing.assert_close(later, every)
    torch.testing.assert_close(later, 8 * single)


@every_saliency
@given(seed=st.integers(0, 50), power=st.integers(-8, 8))
def test_scales_and_the_order_of_rows_do_not_show(saliency, seed, power):
    weight, hessian = problem(seed)
    mask = costliest(group_costs(weight, root(hessian), 8, saliency), 20, "layer")
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    scaled = group_costs(weight[order] * 2.0**power, root(hessian * 4.0**power), 8, saliency)
    assert torch.equal(costliest(scaled, 20, "layer"), mask[order])


@every_saliency
def test_planted_groups_of_no_consequence_go_first(saliency):
    weight, hessian = problem(4)
    small = torch.rand(10, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    weight *= torch.where(small, 1e-3, 1.0).repeat_interleave(8, 1)
    assert torch.equal(costliest(group_costs(weight, root(hessian), 8, saliency), int((~small).sum()), "layer"), ~small)


# ---------- which ones, and where they stand


@every_balance
@given(seed=st.integers(0, 100), sparsity=st.floats(0, MOST_SPARSITY))
def test_as_many_are_kept_as_are_announced_and_no_dearer_one_goes(balance, seed, sparsity):
    costs = torch.randint(5, (6, 8), generator=torch.Generator().manual_seed(seed)).double()
    kept = kept_groups(6, 64, 8, sparsity, balance)
    mask = costliest(costs, kept, balance)
    assert int(mask.sum()) == kept >= (1 - sparsity) * 48 - 1e-6
    for row in range(6) if balance == "rows" else [slice(None)]:
        inside, outside = costs[row][mask[row]], costs[row][~mask[row]]
        assert not len(outside) or float(inside.min()) >= float(outside.max())
    if balance == "rows":
        assert len(set(mask.sum(1).tolist())) == 1


@given(mask=st.lists(st.booleans(), min_size=15, max_size=15))
def test_a_mask_comes_back_from_its_bitmap(mask):
    marked = torch.tensor(mask).reshape(3, 5)
    bitmap = to_bitmap(marked)
    assert bitmap.dtype == torch.uint8
    assert bitmap.shape == (bitmap_bytes(3, 5),) == (2,)
    assert torch.equal(from_bitmap(bitmap, 3, 5), marked)


@given(outputs=st.integers(1, 300), groups=st.integers(1, 300), sparsity=st.floats(0, MOST_SPARSITY))
def test_a_bitmap_takes_no_more_than_any_index_of_a_byte_for_each_kept_group(outputs, groups, sparsity):
    for balance in BALANCES:
        assert bitmap_bytes(outputs, groups) <= kept_groups(outputs, groups, 1, sparsity, balance)


def test_bits_of_the_papers_setting():
    """4 bits, half of the groups of 16: a bitmap where the paper's layout has column indices of 16 bits (3.125)."""
    account = groups_account(64, 1024, 4, 16, kept=2048, symmetric=False)
    assert account.bits_a_weight(64 * 1024) == (4 + 1 + 4 / 16) / 2 + 1 / 16 == 2.6875
    assert account.bits_a_weight(64 * 1024) - 1 / 16 + 8 * 2 * 2048 / (64 * 1024) == 3.125


def test_groups_stand_where_the_mask_says_and_gradients_reach_them():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    dense = from_groups(Groups(values, mask))
    assert dense.tolist() == [[1, 2, 0, 0, 3, 4], [0, 0, 0, 0, 5, 6]]
    (dense * torch.arange(12.0).reshape(2, 6)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 1], [4, 5], [10, 11]]


# ---------- groups left out by the solver


def slow_gqsa(weight: Tensor, hessian: Tensor, bits: int, size: int, mask: Tensor) -> Tensor:
    """After each column the inverse of what is left of the Gram matrix, formed anew; no blocks."""
    now, values = weight.clone(), torch.zeros_like(weight)
    grid = Grid(torch.empty(0), torch.empty(0))
    for j in range(weight.shape[1]):
        if j % size == 0:
            grid = fit_grid(now[:, j : j + size], bits, symmetric=False)
        for i in range(len(weight)):
            if mask[i, j // size]:
                own = Grid(grid.scale[i], grid.zero[i])
                values[i, j] = level_of(code_of(now[i, j], own, bits), own)
        inverse = torch.linalg.inv(hessian[j:, j:])
        now[:, j:] -= torch.outer((now[:, j] - values[:, j]) / inverse[0, 0], inverse[0])
    return values


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("size", "block"), [(8, 8), (8, 16), (16, 8), (8, 128), (4, 6)])
def test_the_solver_with_groups_left_out_equals_the_unblocked_oracle(bits, size, block):
    weight, hessian = problem(bits)
    mask = costliest(group_costs(weight, root(hessian), size, "all"), 5 * 32 // size, "layer")
    inner = UniformRule(weight, bits, size, symmetric=False)
    found = solve_columns(weight, root(hessian), GroupRule(inner, mask), block=block)
    torch.testing.assert_close(found, slow_gqsa(weight, hessian, bits, size, mask), rtol=1e-6, atol=1e-6)
    dense = dequantise(inner.result(), bits)
    assert torch.equal(found, torch.where(mask.repeat_interleave(size, 1), dense, 0))


def test_nothing_left_out_is_gptq():
    weight, hessian = problem(6)
    mask = torch.ones(10, 4, dtype=torch.bool)
    inner = UniformRule(weight, 3, 8, symmetric=True)
    found = solve_columns(weight, inverse_root(hessian), GroupRule(inner, mask))
    assert torch.equal(found, dequantise(gptq(weight, hessian, 3, 8, symmetric=True), 3))
