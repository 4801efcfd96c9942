"""The one order of all steps: costs, hulls, prefixes, against slow oracles."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.allocate import factor_cost, pivot_cost
from spectrim.linalg.ladder import (
    are_levels,
    cut,
    growth_order,
    hull_slopes,
    interpolate,
    ladder_costs,
    ladder_errors,
    levels_of,
)

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
storages = st.sampled_from(["pivot", "factor"])


@given(shapes, storages)
def test_costs_are_those_of_the_ranks_that_pay_then_dense(shape, storage):
    outputs, inputs = shape
    cost = pivot_cost if storage == "pivot" else factor_cost
    ranks = [int(cost(outputs, inputs, torch.tensor(r))) for r in range(1, min(shape) + 1)]
    found = ladder_costs(outputs, inputs, storage).tolist()
    assert found == [c for c in ranks if c < outputs * inputs] + [outputs * inputs]
    assert all(a < b for a, b in itertools.pairwise(found))


def test_errors_are_what_the_rank_leaves_out():
    energy = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert ladder_errors(energy, 3).tolist() == [7.0, 3.0, 0.0]  # ranks 1, 2, then dense
    assert ladder_errors(energy, 4).tolist() == [7.0, 3.0, 1.0, 0.0]
    assert ladder_errors(energy, 1).tolist() == [0.0]


def hull_at(costs: Tensor, errors: Tensor, at: int) -> float:
    """The lower convex hull at `costs[at]`, over all chords."""
    best = float(errors[at])
    for i, j in itertools.product(range(at + 1), range(at, len(costs))):
        if i < j:
            share = float(costs[at] - costs[i]) / float(costs[j] - costs[i])
            best = min(best, float(errors[i]) + share * float(errors[j] - errors[i]))
    return best


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=8))
def test_slopes_are_those_of_the_hull(steps):
    costs = torch.tensor([5, *itertools.accumulate((s[0] for s in steps), initial=5)][1:])
    errors = torch.tensor([*itertools.accumulate((s[1] for s in reversed(steps)), initial=0)], dtype=torch.float64)
    errors = errors.flip(0)
    hull = [hull_at(costs, errors, k) for k in range(len(costs))]
    widths = (costs[1:] - costs[:-1]).tolist()
    expected = [(a - b) / width for (a, b), width in zip(itertools.pairwise(hull), widths, strict=True)]
    found = hull_slopes(costs, errors)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert bool((found[1:] <= found[:-1]).all())


def test_a_ladder_of_one_option_has_no_steps():
    assert hull_slopes(torch.tensor([4]), torch.tensor([0.0])).tolist() == []


def test_the_order_is_by_worth_and_ties_go_to_the_earlier_layer():
    order = growth_order([torch.tensor([3.0, 1.0]), torch.tensor([5.0, 3.0, 3.0]), torch.tensor([])])
    assert order.tolist() == [1, 0, 1, 1, 0]
    levels = levels_of(order, 3)
    assert [level.tolist() for level in levels] == [[1, 4], [0, 2, 3], []]
    assert are_levels(levels)


@pytest.mark.parametrize("levels", [[[0, 1], [1]], [[1, 0], [2]], [[0], [2]], [[-1], [0]], [[0, 0], [1]]], ids=str)
def test_what_is_no_order_is_seen(levels):
    assert not are_levels([torch.tensor(level) for level in levels])


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 120))
def test_a_cut_is_the_longest_prefix_that_the_budget_pays(widths, budget):
    costs = [torch.tensor(list(itertools.accumulate(layer))) for layer in widths]
    generator = torch.Generator().manual_seed(budget)
    owners = torch.tensor([i for i, c in enumerate(costs) for _ in range(len(c) - 1)], dtype=torch.int64)
    order = owners[torch.randperm(len(owners), generator=generator)]
    levels = levels_of(order, len(costs))
    spent = sum(int(c[0]) for c in costs)
    if spent > budget:
        with pytest.raises(ValueError, match="below the first options"):
            cut(costs, levels, budget)
        return
    expected = [0] * len(costs)
    for layer in order.tolist():
        step = int(costs[layer][expected[layer] + 1] - costs[layer][expected[layer]])
        if spent + step > budget:
            break
        spent, expected[layer] = spent + step, expected[layer] + 1
    assert cut(costs, levels, budget) == expected


def test_interpolation_is_linear_between_anchors_and_constant_outside():
    table, anchors = torch.tensor([[1.0, 1.0], [2.0, 0.0], [4.0, 8.0]]), (1.0, 0.8, 0.4)
    for size, row in [(1.0, [1, 1]), (0.9, [1.5, 0.5]), (0.8, [2, 0]), (0.6, [3, 4]), (0.4, [4, 8]), (0.1, [4, 8])]:
        torch.testing.assert_close(interpolate(table, anchors, size), torch.tensor(row, dtype=torch.float32))
    assert interpolate(table[:1], (1.0,), 0.3).tolist() == [1.0, 1.0]
