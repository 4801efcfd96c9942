"""Scores, schedule and masks of movement pruning; factors that know what was pruned. Against loops over entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.factor import decompose, truncate
from spectrim.linalg.movement import add_movement, sparse_spectrum, sparsity_at, strongest


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Sort entries by (score, place), drop the first."""
    entries = sorted((float(score), place) for place, score in enumerate(scores.flatten()))
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    for _, place in entries[: int(sparsity * scores.numel())]:
        mask[place] = False
    return mask.view_as(scores)


@given(seed=st.integers(0, 500), sparsity=st.floats(0.0, 1.0), ties=st.booleans())
def test_masks_equal_sorting_all_entries(seed, sparsity, ties):
    scores = normal(seed, 5, 7)
    scores = scores.round() if ties else scores
    assert torch.equal(strongest(scores, sparsity), slow_mask(scores, sparsity))


def test_scores_of_zero_still_give_the_exact_number():
    assert int(strongest(torch.zeros(6, 5), 0.7).sum()) == 9


def test_the_schedule_is_a_cubic_from_nothing_to_the_end():
    assert [sparsity_at(t, 0.8) for t in (-1.0, 0.0, 1.0, 2.0)] == [0.0, 0.0, 0.8, 0.8]
    assert sparsity_at(0.5, 0.8) == pytest.approx(0.8 * 0.875)
    values = [sparsity_at(t / 20, 0.9) for t in range(21)]
    assert values == sorted(values)


def test_an_entry_that_moves_away_from_zero_scores_above_one_that_moves_towards_it():
    """Sign convention: a step of gradient descent is -g; it lets |w| grow where w g < 0."""
    weight, gradient, scores = (
        torch.tensor([2.0, 2.0, -2.0, -2.0]),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.zeros(4),
    )
    add_movement(scores, weight, gradient)
    add_movement(scores, weight, gradient)
    assert scores.tolist() == [-4.0, 4.0, 4.0, -4.0]
    grew = (weight - 0.1 * gradient).abs() > weight.abs()
    assert torch.equal(grew, scores > 0)


def weighted(weight: Tensor, small: Tensor, counts: Tensor) -> float:
    return float((counts * (weight - small).square()).sum())


def test_sparse_spectrum_is_the_optimum_of_the_weighed_error():
    """Against the SVD of W diag(sqrt(count)), divided again column by column."""
    mask = strongest(normal(1, 9, 6), 0.6)
    weight = normal(0, 9, 6)
    counts = torch.tensor([max(1, int(column.sum())) for column in mask.mT], dtype=torch.float64)
    scaled = (weight * mask) * counts.sqrt()
    u, s, vt = torch.linalg.svd(scaled, full_matrices=False)
    for rank in (1, 3):
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank] / counts.sqrt()
        cut = truncate(sparse_spectrum(weight, mask), rank)
        assert torch.allclose(cut.left @ cut.right, expected, atol=1e-9)
        plain = truncate(decompose(weight * mask), rank)
        least = weighted(weight * mask, cut.left @ cut.right, counts)
        assert least <= weighted(weight * mask, plain.left @ plain.right, counts)
        unweighed = truncate(sparse_spectrum(weight, mask, weigh=False), rank)
        assert torch.allclose(unweighed.left @ unweighed.right, plain.left @ plain.right, atol=1e-10)


def test_columns_and_weights_without_survivors():
    weight, mask = normal(0, 5, 4), torch.ones(5, 4, dtype=torch.bool)
    mask[:, 2] = False
    cut = truncate(sparse_spectrum(weight, mask), 4)
    assert torch.allclose(cut.left @ cut.right, weight * mask, atol=1e-9)
    nothing = truncate(sparse_spectrum(weight, torch.zeros_like(mask)), 2)
    assert float((nothing.left @ nothing.right).abs().max()) == 0.0
