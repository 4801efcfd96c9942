"""Rank allocation against exhaustive search and an exact knapsack; never above the budget.

`allocate` is a Lagrangian heuristic with a greedy fill, not exact. Measured over 400 random instances of four layers
each (factor and pivot storage): optimal in 84-89 %, mean error 1.02 of the optimum, 99th percentile 1.4, worst 2.7.
The gap closes with more and larger layers: over 40 instances of 24 layers, sides 24 to 48, the mean was 1.005 (pivot
1.002) and the worst 1.020 (1.008). The tests hold it to a little more than that, and to the bound that follows from
duality: it is never worse than the optimum by more than what one layer can gain.
"""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.allocate import Options, allocate, factor_cost, fill_uniform, pivot_cost

COSTS = {"factor": factor_cost, "pivot": pivot_cost}


def options(error: list[float], cost: list[int]) -> Options:
    return Options(torch.tensor(error, dtype=torch.float64), torch.tensor(cost))


def layer_options(energy: list[float], outputs: int, inputs: int, storage: str) -> Options:
    """Ranks that take fewer numbers than dense, then dense; written out longhand."""
    error, cost = [], []
    for rank in range(1, min(outputs, inputs) + 1):
        price = (
            rank * (outputs + inputs) if storage == "factor" else rank * (outputs + inputs - rank) + -(-outputs // 8)
        )
        if price < outputs * inputs:
            error.append(sum(energy[rank:]))
            cost.append(price)
    return options([*error, 0.0], [*cost, outputs * inputs])


def random_layer(rng: random.Random, storage: str, sizes: tuple[int, int] = (4, 9)) -> Options:
    outputs, inputs = rng.randint(*sizes), rng.randint(*sizes)
    decay, scale = rng.uniform(0.5, 0.95), 10 ** rng.uniform(-1, 1)
    energy = [scale * decay**k * rng.uniform(0.7, 1.3) for k in range(min(outputs, inputs))]
    return layer_options(sorted(energy, reverse=True), outputs, inputs, storage)


def total(layers: list[Options], choice: list[int]) -> tuple[float, int]:
    error = sum(float(layer.error[k]) for layer, k in zip(layers, choice, strict=True))
    return error, sum(int(layer.cost[k]) for layer, k in zip(layers, choice, strict=True))


def exhaustive(layers: list[Options], budget: int) -> float:
    """Least error over all choices that fit."""
    sums = itertools.product(*[list(zip(la.error.tolist(), la.cost.tolist(), strict=True)) for la in layers])
    return min(sum(e for e, _ in pick) for pick in sums if sum(c for _, c in pick) <= budget)


def knapsack(layers: list[Options], budget: int) -> float:
    """The same by dynamic programming over the numbers spent."""
    best = torch.zeros(budget + 1, dtype=torch.float64)
    for layer in layers:
        after = torch.full_like(best, torch.inf)
        for error, cost in zip(layer.error.tolist(), layer.cost.tolist(), strict=True):
            if cost <= budget:
                after[cost:] = torch.minimum(after[cost:], best[: budget + 1 - cost] + error)
        best = after
    return float(best[-1])


def budget_for(layers: list[Options], share: float) -> int:
    least, most = (sum(int(f(layer.cost)) for layer in layers) for f in (torch.min, torch.max))
    return least + int(share * (most - least))


# ---------- costs


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(8, 8, 3), (9, 5, 2), (5, 9, 5), (17, 3, 1)])
def test_costs_count_every_stored_number(outputs, inputs, rank):
    assert int(factor_cost(outputs, inputs, torch.tensor(rank))) == outputs * rank + rank * inputs
    stored = rank * inputs + (outputs - rank) * rank + -(-outputs // 8)
    assert int(pivot_cost(outputs, inputs, torch.tensor(rank))) == stored


# ---------- allocate


@given(
    layers=st.lists(
        st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**9)), min_size=1, max_size=6), min_size=1, max_size=5
    ),
    share=st.floats(0, 1),
)
def test_never_above_budget_and_never_worse_than_the_optimum_by_more_than_one_layer_can_gain(layers, share):
    menu = [options([e for e, _ in layer], [c for _, c in layer]) for layer in layers]
    budget = budget_for(menu, share)
    choice = allocate(menu, budget)
    error, cost = total(menu, choice)
    assert cost <= budget
    # What each layer would lose by taking its cheapest option (the best of the cheapest, on a tie).
    gains = [float(la.error[la.cost == la.cost.min()].min() - la.error.min()) for la in menu]
    assert error <= exhaustive(menu, budget) + max(gains) + 1e-9 * (1 + max(gains))


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_close_to_exhaustive_search_on_four_layers(storage):
    rng = random.Random(1)
    ratios, optimal = [], 0
    for _ in range(60):
        layers = [random_layer(rng, storage) for _ in range(4)]
        budget = budget_for(layers, rng.random())
        error, cost = total(layers, allocate(layers, budget))
        best = exhaustive(layers, budget)
        assert cost <= budget
        assert error >= best - 1e-9
        optimal += error <= best + 1e-12
        ratios.append(error / best if best > 1e-9 else 1.0)
    assert optimal >= 0.7 * 60
    assert sum(ratios) / 60 <= 1.05
    assert max(ratios) <= 3.0


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_within_a_few_per_cent_of_an_exact_knapsack_on_many_layers(storage):
    rng = random.Random(2)
    for _ in range(6):
        layers = [random_layer(rng, storage, (24, 48)) for _ in range(24)]
        budget = budget_for(layers, rng.uniform(0.1, 0.9))
        error, cost = total(layers, allocate(layers, budget))
        assert cost <= budget
        assert error <= 1.05 * knapsack(layers, budget)


@pytest.mark.fault(54)
def test_cliff_of_factor_storage_one_layer_stays_dense():
    """Flat spectra, 8 x 8: rank 3 costs 48, dense 64. Equal ranks leave error 11; one dense and one rank 1 leave 7."""
    layer = layer_options([1.0] * 8, 8, 8, "factor")
    assert layer.cost.tolist() == [16, 32, 48, 64]
    assert layer.error.tolist() == [7.0, 6.0, 5.0, 0.0]
    choice = allocate([layer, layer], 80)
    assert sorted(choice) == [0, 3]
    assert total([layer, layer], choice) == (7.0, 80)
    assert exhaustive([layer, layer], 80) == 7.0


def test_concave_pivot_storage_prefers_extremes_on_flat_spectra():
    """Pivot costs of 8 x 8 are 16, 29, 40, 49, 56, 61: late ranks are cheap, so one layer takes them all."""
    layer = layer_options([1.0] * 8, 8, 8, "pivot")
    assert layer.cost.tolist() == [16, 29, 40, 49, 56, 61, 64]
    choice = allocate([layer, layer], 80)
    assert total([layer, layer], choice) == (7.0, 80)  # dense and rank 1; equal ranks (3, 3) would leave 10
    assert exhaustive([layer, layer], 80) == 7.0


def test_no_cliff_on_steep_spectra_ranks_follow_the_energy():
    strong = layer_options([16.0, 8, 4, 2, 1, 0.5, 0.25, 0.125], 8, 8, "factor")
    weak = layer_options([0.16, 0.08, 0.04, 0.02, 0.01, 0.005, 0.0025, 0.00125], 8, 8, "factor")
    choice = allocate([strong, weak], 64)
    assert choice == [2, 0]
    assert total([strong, weak], choice)[0] == pytest.approx(exhaustive([strong, weak], 64))


def test_all_the_money_buys_the_least_error_and_none_of_it_is_wasted():
    layers = [options([3.0, 0.0, 0.0], [1, 4, 9]), options([2.0, 1.0], [2, 3])]
    assert allocate(layers, 100) == [1, 1]  # of two options without error, the cheaper one


@pytest.mark.fault(54)
def test_exactly_the_cheapest_budget_is_feasible_and_one_less_is_refused_with_both_numbers():
    layers = [options([3.0, 0.0], [1000, 4000]), options([1.0, 2.0], [900, 500])]
    assert allocate(layers, 1500) == [0, 1]
    with pytest.raises(ValueError, match=r"budget 1,499 .* 1,500"):
        allocate(layers, 1499)


def test_left_over_budget_is_spent_on_the_best_upgrade_that_fits():
    # The hull jumps from (10, cost 1) to (0, cost 11); with 6 only the middle option off the hull fits.
    assert allocate([options([10.0, 9.0, 0.0], [1, 6, 11])], 6) == [1]


@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30), share=st.floats(0, 1))
def test_the_unit_of_the_error_does_not_matter(seed, exponent, share):
    rng = random.Random(seed)
    layers = [random_layer(rng, "pivot") for _ in range(3)]
    scaled = [Options(layer.error * 2.0**exponent, layer.cost) for layer in layers]
    budget = budget_for(layers, share)
    assert allocate(layers, budget) == allocate(scaled, budget)


def test_layers_without_any_error_take_the_cheapest_option():
    assert allocate([options([0.0, 0.0], [5, 9])] * 3, 27) == [0, 0, 0]


# ---------- fill_uniform


def cost_lists() -> st.SearchStrategy[list[list[int]]]:
    steps = st.lists(st.integers(1, 50), min_size=1, max_size=12)
    return st.lists(steps.map(lambda s: list(itertools.accumulate(s))), min_size=1, max_size=6)


@given(costs=cost_lists(), budget=st.integers(0, 2000))
def test_fill_uniform_never_exceeds_the_budget_never_lowers_and_leaves_no_step_that_fits(costs, budget):
    tensors = [torch.tensor(c) for c in costs]
    start = [0] * len(costs)
    least = sum(c[0] for c in costs)
    choice = fill_uniform(tensors, start, least + budget)
    spent = sum(c[k] for c, k in zip(costs, choice, strict=True))
    assert spent <= least + budget
    assert all(k >= s for k, s in zip(choice, start, strict=True))
    left = least + budget - spent
    assert all(k + 1 == len(c) or c[k + 1] - c[k] > left for c, k in zip(costs, choice, strict=True))
    assert start == [0] * len(costs)  # the caller's list is not changed


@given(layers=st.integers(1, 6), step=st.integers(1, 30), budget=st.integers(0, 400))
def test_fill_uniform_of_equal_layers_differs_by_at_most_one_rank(layers, step, budget):
    costs: list[Tensor] = [step * torch.arange(1, 11)] * layers
    choice = fill_uniform(costs, [0] * layers, layers * step + budget)
    assert max(choice) - min(choice) <= 1
    assert sum(choice) == min(budget // step, 9 * layers)


def test_fill_uniform_continues_from_the_start():
    costs = [torch.tensor([10, 20, 30]), torch.tensor([5, 10, 15])]
    assert fill_uniform(costs, [1, 1], 36) == [1, 2]
    assert fill_uniform(costs, [1, 1], 34) == [1, 1]
    assert fill_uniform(costs, [1, 1], 45) == [2, 2]


def test_fill_uniform_serves_the_layer_with_the_smallest_share_of_its_ranks_first():
    long, short = 10 * torch.arange(1, 11), 10 * torch.arange(1, 5)
    assert fill_uniform([long, short], [5, 1], 60 + 20 + 10) == [5, 2]  # 5 of 10 against 1 of 4
    assert fill_uniform([short, long], [2, 3], 30 + 40 + 10) == [2, 4]  # 2 of 4 against 3 of 10
