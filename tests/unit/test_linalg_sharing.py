"""One right factor for weights with one input, two-sided: against the stacked decomposition and entry by entry."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.allocate import Options, hull, merged
from spectrim.linalg.factor import decompose_between
from spectrim.linalg.shared import (
    CommonSpectrum,
    SharedFactors,
    common_spectrum,
    group_cost,
    pivoted,
    pivoted_group_cost,
)

SHAPES = [((7, 4, 4), 9), ((12, 12), 5), ((2, 3), 12), ((6,), 6)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, size: int) -> Tensor:
    x = normal(seed, 4 * size, size) @ normal(seed + 1, size, size)
    return x.mT @ x / len(x)


def problem(outputs: tuple[int, ...], inputs: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    weights = [normal(seed + i, o, inputs) for i, o in enumerate(outputs)]
    return weights, [covariance(seed + 20 + i, o) for i, o in enumerate(outputs)]


def slow_loss(weights: list[Tensor], small: list[Tensor], outputs: list[Tensor], inputs: list[Tensor]) -> float:
    """sum_l tr(B_l D_l A_l D_l^T), entry by entry."""
    total = 0.0
    for w, s, b, a in zip(weights, small, outputs, inputs, strict=True):
        d = w - s
        for i in range(len(w)):
            for j in range(len(w)):
                total += float(b[i, j] * (d[j] @ a @ d[i]))
    return total


def cut(found: CommonSpectrum, rank: int) -> list[Tensor]:
    return [left[:, :rank] @ found.right[:rank] for left in found.lefts]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_with_one_covariance_it_is_the_decomposition_of_the_stacked_weight(outputs, inputs):
    weights, sides = problem(outputs, inputs)
    gram = covariance(90, inputs)
    found = common_spectrum(weights, sides, [gram] * len(outputs))
    stacked = decompose_between(torch.cat(weights), torch.block_diag(*sides), gram)
    energy = torch.stack(found.energies).sum(0)
    assert torch.allclose(energy, stacked.energy, rtol=1e-8, atol=1e-9 * float(stacked.energy[0]))
    assert torch.allclose(found.error, stacked.tail(), rtol=1e-8, atol=1e-9 * float(stacked.energy[0]))
    for rank in range(1, len(energy) + 1):
        whole = stacked.left[:, :rank] @ stacked.right[:rank]
        assert torch.allclose(torch.cat(cut(found, rank)), whole, atol=1e-8)


def slow_optimum(weights: list[Tensor], outputs: list[Tensor], gram: Tensor, rank: int) -> float:
    """The least loss by alternating exact solves for the C_l and for B, vectorised: no root, no eigenvector."""
    basis = normal(7, rank, gram.shape[0])
    for _ in range(400):
        system = basis @ gram @ basis.mT
        coefficients = [torch.linalg.solve(system, basis @ gram @ w.mT).mT for w in weights]
        left = sum((c.mT @ b @ c for c, b in zip(coefficients, outputs, strict=True)), torch.zeros(rank, rank))
        right = sum(
            (c.mT @ b @ w for c, b, w in zip(coefficients, outputs, weights, strict=True)),
            torch.zeros(rank, gram.shape[0]),
        )
        basis = torch.linalg.solve(left, right)
    system = basis @ gram @ basis.mT
    small = [torch.linalg.solve(system, basis @ gram @ w.mT).mT @ basis for w in weights]
    return slow_loss(weights, small, outputs, [gram] * len(weights))


@pytest.mark.parametrize(("outputs", "inputs"), [((5, 3), 6), ((2, 2), 7)])
def test_no_other_common_factor_loses_less(outputs, inputs):
    weights, sides = problem(outputs, inputs, seed=3)
    gram = covariance(91, inputs)
    found = common_spectrum(weights, sides, [gram] * len(outputs))
    assert slow_optimum(weights, sides, gram, 2) == pytest.approx(float(found.error[2]), rel=1e-6)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_errors_and_energies_count_each_layer_in_its_own_covariances(outputs, inputs):
    weights, sides = problem(outputs, inputs, seed=5)
    grams = [covariance(60 + i, inputs) for i in range(len(outputs))]
    found = common_spectrum(weights, sides, grams)
    for rank, error in enumerate(found.error.tolist()):
        assert error == pytest.approx(slow_loss(weights, cut(found, rank), sides, grams), rel=1e-8, abs=1e-8)
    for layer, (weight, side, gram) in enumerate(zip(weights, sides, grams, strict=True)):
        without = weight - found.lefts[layer][:, [1]] @ found.right[[1]]
        alone = slow_loss([weight], [without], [side], [gram])
        assert float(found.energies[layer][1]) == pytest.approx(alone, rel=1e-8)


@given(seed=st.integers(0, 100), dead=st.booleans())
def test_all_components_give_every_weight_back_whatever_the_metric(seed, dead):
    weights, sides = problem((4, 3), 6, seed=seed)
    gram = torch.zeros(6, 6, dtype=torch.float64) if dead else covariance(seed, 6)[:, [0, 1, 2, 3, 4, 4]]
    gram = (gram + gram.mT) / 2 if dead else gram.mT @ gram  # one input twice: singular
    found = common_spectrum(weights, [sides[0], None], [gram, gram])
    for weight, small in zip(weights, cut(found, len(found.right)), strict=True):
        assert torch.allclose(small, weight, atol=1e-5)


@given(seed=st.integers(0, 100), rank=st.integers(1, 6))
def test_pivoted_bases_are_exact_and_take_what_is_counted(seed, rank):
    shared = SharedFactors(normal(seed, rank, 6), (normal(seed + 1, 4, rank), normal(seed + 2, 5, rank)))
    found = pivoted(shared)
    for before, after in zip(shared.coefficients, found.coefficients, strict=True):
        assert torch.allclose(after @ found.basis(), before @ shared.basis, atol=1e-8)
    assert float(found.rest.abs().max() if found.rest.numel() else 0.0) <= 1.2 + 1e-9
    stored = found.rest.numel() + sum(own.numel() for own in found.coefficients) + 1  # one byte of mask
    assert stored == int(pivoted_group_cost([4, 5], 6, torch.tensor(rank)))
    assert stored - 1 == int(group_cost([4, 5], 6, torch.tensor(rank))) - rank**2


@st.composite
def menus(draw) -> list[Options]:
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 6))
        errors = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
        costs = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
        layers.append(Options(torch.tensor(errors, dtype=torch.float64), torch.tensor(costs)))
    return layers


@given(layers=menus(), price=st.floats(0.01, 60))
def test_merged_layers_are_as_good_as_each_at_its_best_for_any_price(layers, price):
    both, choices = merged(layers)
    apart = sum(float((own.error + price * own.cost).min()) for own in layers)
    assert float((both.error + price * both.cost).min()) == pytest.approx(apart)
    for k, choice in enumerate(choices):
        assert float(both.error[k]) == sum(float(own.error[i]) for own, i in zip(layers, choice, strict=True))
        assert int(both.cost[k]) == sum(int(own.cost[i]) for own, i in zip(layers, choice, strict=True))


@given(layers=menus())
def test_a_hull_begins_with_the_cheapest_and_ends_with_the_best(layers):
    for own in layers:
        found = hull(own)
        assert int(own.cost[found[0]]) == int(own.cost.min())
        assert float(own.error[found[-1]]) == float(own.error.min())
        slopes = [float(own.error[a] - own.error[b]) / float(own.cost[b] - own.cost[a]) for a, b in pairwise(found)]
        assert slopes == sorted(slopes, reverse=True)
