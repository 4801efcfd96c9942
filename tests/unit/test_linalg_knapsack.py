"""The exact multiple-choice knapsack: against all choices written out, and never worse than `allocate`."""

import itertools
import random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.linalg import knapsack as module
from spectrim.linalg.allocate import Options, allocate
from spectrim.linalg.knapsack import has_solver, knapsack, total_cost, total_error

needs_scipy = pytest.mark.skipif(not has_solver(), reason="SciPy (extra `ilp`) is not installed")


def options(error: list[float], cost: list[int]) -> Options:
    return Options(torch.tensor(error, dtype=torch.float64), torch.tensor(cost))


def menus(seed: int, layers: int, choices: int, largest: int) -> list[Options]:
    """No order and no convexity in them."""
    rng = random.Random(seed)
    counts = [rng.randint(1, choices) for _ in range(layers)]
    return [
        options([rng.uniform(-1, 10) for _ in range(n)], [rng.randint(0, largest) for _ in range(n)]) for n in counts
    ]


def exhaustive(layers: list[Options], budget: int) -> float:
    """Least error over all choices that fit."""
    sums = itertools.product(*[list(zip(la.error.tolist(), la.cost.tolist(), strict=True)) for la in layers])
    return min(sum(e for e, _ in pick) for pick in sums if sum(c for _, c in pick) <= budget)


def between(layers: list[Options], share: float) -> int:
    least, most = (sum(int(f(layer.cost)) for layer in layers) for f in (torch.min, torch.max))
    return least + int(share * (most - least))


@needs_scipy
def test_errors_below_zero_do_not_lift_the_budget():
    assert knapsack([options([0.25, -0.5], [2, 3])], 2) == ([0], 0.0)


@needs_scipy
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), layers=st.integers(1, 5), share=st.floats(0, 1), largest=st.sampled_from([5, 40, 10**7])
)
def test_it_is_the_least_of_all_choices(seed, layers, share, largest):
    given_layers = menus(seed, layers, 6, largest)
    budget = between(given_layers, share)
    choice = knapsack(given_layers, budget).choice
    assert total_cost(given_layers, choice) <= budget
    assert total_error(given_layers, choice) == pytest.approx(exhaustive(given_layers, budget), rel=1e-9, abs=1e-8)


@needs_scipy
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.02, 0.98))
def test_it_is_never_worse_than_one_price_for_all(seed, share):
    layers = menus(seed, 24, 9, 10**6)
    budget = between(layers, share)
    choice, priced = knapsack(layers, budget).choice, allocate(layers, budget)
    assert total_cost(layers, choice) <= budget
    assert total_error(layers, choice) <= total_error(layers, priced)


@needs_scipy
def test_it_is_better_where_one_price_leaves_money_over():
    """The layer that gains most for its cost leaves too little for the two that together gain more."""
    layers = [options([11, 0], [0, 6]), options([9, 0], [0, 5]), options([9, 0], [0, 5])]
    assert allocate(layers, 10) == [1, 0, 0]
    assert knapsack(layers, 10).choice == [0, 1, 1]


@needs_scipy
def test_a_larger_budget_never_costs():
    layers = menus(3, 6, 6, 50)
    errors = [total_error(layers, knapsack(layers, between(layers, share / 20)).choice) for share in range(21)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(sum(float(layer.error.min()) for layer in layers))


@needs_scipy
def test_sizes_of_a_large_model_are_held_to_the_byte():
    """224 menus of sums near 1e10: the tolerance of the solver is then more than a byte."""
    rng = random.Random(5)
    layers = [
        options([rng.uniform(0.9, 1.1) * 4.0**-k for k in range(5)], [rng.randint(10**7, 10**8) * k for k in range(5)])
        for _ in range(224)
    ]
    budget = between(layers, 0.31)
    choice = knapsack(layers, budget).choice
    assert total_cost(layers, choice) <= budget
    assert total_error(layers, choice) <= total_error(layers, allocate(layers, budget))


@needs_scipy
def test_infinite_errors_are_never_taken_and_equal_ones_are_cheap():
    inf = float("inf")
    assert knapsack([options([inf, 3, 3, 1], [0, 4, 2, 9])], 5).choice == [2]
    with pytest.raises(ValueError, match="is below the cheapest choice"):
        knapsack([options([inf, 3], [0, 4])], 3)
    with pytest.raises(ValueError, match="one option must be finite"):
        knapsack([options([inf, inf], [0, 4])], 3)
    with pytest.raises(ValueError, match="NaN is no error"):
        knapsack([options([float("nan"), 1.0], [0, 4])], 9)


@needs_scipy
def test_a_search_that_is_stopped_tells_how_far_from_the_best_it_may_be():
    rng = random.Random(8)
    layers = [
        options([rng.uniform(1, 2) * 0.9**k for k in range(12)], [10_000 * k + rng.randint(0, 2) for k in range(12)])
        for _ in range(40)
    ]
    budget = between(layers, 0.4) + 7
    choice, gap = knapsack(layers, budget, limit_s=0.0)
    own = total_error(layers, choice)
    least = sum(float(layer.error.min()) for layer in layers)
    assert total_cost(layers, choice) <= budget
    assert own <= total_error(layers, allocate(layers, budget))
    assert 0 < gap < 0.05
    assert own - gap * (own - least) <= total_error(layers, knapsack(layers, budget).choice)


@needs_scipy
def test_the_gap_of_a_stopped_search_holds_against_all_choices_written_out():
    for seed in range(6):
        layers = menus(seed, 5, 5, 40)
        budget = between(layers, 0.45)
        choice, gap = knapsack(layers, budget, limit_s=0.0)
        least = sum(float(layer.error.min()) for layer in layers)
        own = total_error(layers, choice) - least
        assert own * (1 - gap) <= exhaustive(layers, budget) - least + 1e-9


def test_without_scipy_the_message_names_the_extra():
    layers = [options([2, 1, 0], [0, 1, 2]), options([2, 1, 0], [0, 1, 2])]
    with (
        mock.patch.object(module, "import_module", side_effect=ModuleNotFoundError("no", name="scipy")),
        pytest.raises(ModuleNotFoundError, match=r"install spectrim\[ilp\]"),
    ):
        knapsack(layers, 2)
