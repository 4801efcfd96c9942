"""Codebooks: dynamic programming against all partitions, the fast way against dynamic programming."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.codebook import CODEBOOK_BITS, Codebook, fit_codebook, from_codebook, kmeans, kmeans_exact
from spectrim.linalg.quantise import as_stored

every_width = pytest.mark.parametrize("bits", CODEBOOK_BITS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(values: Tensor, importance: Tensor, levels: Tensor) -> float:
    return float(((values[:, None] - levels).square().amin(1) * importance).sum())


def cheapest_partition(values: Tensor, importance: Tensor, count: int) -> float:
    """Of the sorted values, by trying all ways to cut them into at most `count` runs."""
    order = values.argsort()
    v, f = values[order], importance[order]
    best = float("inf")
    for cuts in (c for k in range(count) for c in combinations(range(1, len(v)), k)):
        total = 0.0
        for first, end in zip((0, *cuts), (*cuts, len(v)), strict=True):
            mass = float(f[first:end].sum())
            mean = float((f[first:end] * v[first:end]).sum()) / mass if mass else 0.0
            total += float((f[first:end] * (v[first:end] - mean).square()).sum())
        best = min(best, total)
    return best


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), count=st.integers(1, 4), power=st.integers(0, 3))
def test_dynamic_programming_finds_the_best_partition(seed, n, count, power):
    values, importance = normal(seed, n), normal(seed + 1, n).abs() ** power
    levels, least = kmeans_exact(values, importance, count)
    assert least == pytest.approx(cheapest_partition(values, importance, count), rel=1e-8, abs=1e-12)
    assert cost(values, importance, levels) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert len(levels) <= count


@every_width
@pytest.mark.parametrize("tails", [1, 3])
def test_the_fast_way_is_within_three_per_cent_of_the_best(bits, tails):
    """Importance over many orders of magnitude and heavy tails, the two things that mislead Lloyd's steps."""
    values, importance = normal(1, 8, 150) ** tails, normal(2, 8, 150).abs() ** 3
    levels = kmeans(values, importance, 2**bits)
    ratios = []
    for row in range(8):
        least = kmeans_exact(values[row], importance[row], 2**bits)[1]
        ratios.append(cost(values[row], importance[row], levels[row]) / least)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.03
    assert max(ratios) < 1.25


@every_width
def test_codes_are_those_of_the_nearest_level_that_the_file_holds(bits):
    weight = normal(3, 6, 40)
    book = fit_codebook(weight, torch.ones_like(weight), bits)
    assert torch.equal(book.table, as_stored(book.table))
    assert torch.equal(book.table, book.table.sort(1).values)
    nearest = (weight[..., None] - book.table[:, None]).abs()
    found = nearest.gather(-1, book.codes.long()[..., None])[..., 0]
    assert torch.equal(found, nearest.amin(-1))


def test_levels_that_codes_stand_for():
    book = Codebook(torch.tensor([[0, 3], [2, 1]], dtype=torch.uint8), torch.arange(8.0).reshape(2, 4))
    assert from_codebook(book).tolist() == [[0.0, 3.0], [6.0, 5.0]]
    assert from_codebook(book, torch.float64).dtype == torch.float64


@every_width
def test_few_different_weights_come_back_as_they_are(bits):
    choices = torch.tensor([-2.0, -0.5, 0.25, 3.0], dtype=torch.float64)
    weight = choices[torch.randint(4, (5, 64), generator=torch.Generator().manual_seed(4))]
    weight[0] = 0.25
    assert torch.equal(from_codebook(fit_codebook(weight, normal(5, 5, 64).abs(), bits)), weight)


@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_scales_of_weights_and_of_their_importance_do_not_show(seed, power):
    weight, importance = normal(seed, 3, 24), normal(seed + 1, 3, 24).abs()
    book = fit_codebook(weight, importance, 3)
    assert torch.equal(fit_codebook(weight * 2.0**power, importance, 3).codes, book.codes)
    assert torch.equal(fit_codebook(weight, importance * 4.0**power, 3).codes, book.codes)


def test_weights_of_no_importance_have_no_say_and_rows_of_none_count_alike():
    weight, importance = normal(6, 4, 60), normal(7, 4, 60).abs()
    apart = torch.zeros_like(weight, dtype=torch.bool)
    apart[:, ::7] = True
    moved = weight.masked_fill(apart, 50.0)
    one, other = (kmeans(w, importance.masked_fill(apart, 0), 8) for w in (weight, moved))
    kept = [cost(weight[r][~apart[r]], importance[r][~apart[r]], one[r]) for r in range(4)]
    still = [cost(weight[r][~apart[r]], importance[r][~apart[r]], other[r]) for r in range(4)]
    assert still == pytest.approx(kept, rel=0.1)
    assert bool((other < 10).any(1).all())
    assert torch.equal(kmeans(weight, torch.zeros_like(weight), 8), kmeans(weight, torch.ones_like(weight), 8))


def test_importance_pays_where_it_is_and_more_bits_cost_less():
    weight, importance = normal(8, 8, 96), normal(9, 8, 96).abs() ** 3
    costs = []
    for bits in CODEBOOK_BITS:
        weighed, plain = (
            from_codebook(fit_codebook(weight, f, bits)) for f in (importance, torch.ones_like(importance))
        )
        lost, lost_plain = (float(((w - weight).square() * importance).sum()) for w in (weighed, plain))
        assert lost < 0.8 * lost_plain
        costs.append(lost)
    assert costs == sorted(costs, reverse=True)
