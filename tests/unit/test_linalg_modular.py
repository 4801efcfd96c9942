"""Cuts of the parts of a block, against slow oracles over the tokens themselves."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.linalg.metric import root_of
from spectrim.linalg.modular import (
    best_pairs,
    channel_sizes,
    largest_values,
    leverage,
    nystrom_down,
    pair_scores,
    row_sizes,
    sparsities,
    value_output,
    with_bias_input,
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(seed: int, count: int, width: int) -> torch.Tensor:
    return normal(seed, count, width) @ normal(seed + 1, width, width) + normal(seed + 2, width)


# ---------- Nystrom


def test_leverage_is_what_the_inverse_gives():
    x = tokens_of(0, 50, 8)
    moments = x.mT @ x / 50
    damped = moments + 0.3 * moments.diagonal().mean() * torch.eye(8)
    assert torch.allclose(leverage(moments, 0.3), (moments @ torch.linalg.inv(damped)).diagonal())


def test_leverage_of_one_scale_is_that_of_another_and_a_dead_channel_has_none():
    x = tokens_of(1, 50, 6)
    x[:, 2] = 0
    moments = x.mT @ x
    assert torch.allclose(leverage(moments, 0.5), leverage(1e6 * moments, 0.5))
    assert float(leverage(moments, 0.5)[2]) == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_down_projection_is_the_least_squares_fit_over_the_tokens(seed):
    x, down = tokens_of(seed, 60, 8), normal(seed + 9, 5, 8)
    kept = torch.tensor([0, 3, 4, 7])
    found = nystrom_down(down, x.mT @ x / 60, kept, ridge=0)
    slow = torch.linalg.lstsq(x[:, kept], x @ down.mT).solution.mT
    assert torch.allclose(found, slow, atol=1e-7 * float(slow.abs().max()))


def test_keeping_all_channels_changes_nothing_and_the_ridge_only_pulls_back():
    x, down = tokens_of(2, 60, 8), normal(9, 5, 8)
    moments = x.mT @ x / 60
    assert torch.allclose(nystrom_down(down, moments, torch.arange(8)), down)
    kept = torch.tensor([1, 2, 5])
    assert torch.allclose(nystrom_down(down, moments, kept, ridge=1e9), down[:, kept], atol=1e-6)


def test_fewer_tokens_than_channels_and_none_at_all():
    x, down = tokens_of(3, 4, 8), normal(9, 5, 8)
    found = nystrom_down(down, x.mT @ x / 4, torch.arange(6))
    assert torch.allclose(x[:, :6] @ found.mT, x @ down.mT, atol=1e-1 * float((x @ down.mT).abs().max()))
    assert torch.equal(nystrom_down(down, torch.zeros(8, 8).double(), torch.arange(6)), down[:, :6])


# ---------- CR


def rotated(rows: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotary embedding at one position: i turned with i + hd/2."""
    half = rows.shape[-1] // 2
    a, b = rows[..., :half], rows[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def test_sizes_of_rows_with_their_bias():
    x, weight, bias = tokens_of(0, 30, 5), normal(4, 6, 5), normal(5, 6)
    moments = with_bias_input(x.mT @ x / 30, x.mean(0))
    slow = torch.stack([weight @ row + bias for row in x]).square().mean(0)
    assert torch.allclose(row_sizes(torch.cat([weight, bias[:, None]], 1), moments), slow)


def test_pair_scores_sum_over_queries_that_share_a_key_head():
    head, groups = 6, 2
    queries, keys = normal(0, 4 * head).square(), normal(1, groups * head).square()
    found = pair_scores(queries, keys, head)
    for g, i in itertools.product(range(groups), range(head // 2)):
        key = keys[g * head + i] + keys[g * head + i + head // 2]
        query = sum(queries[h * head + j] for h in (2 * g, 2 * g + 1) for j in (i, i + head // 2))
        assert float(found[g, i]) == pytest.approx(float(key * query))


def test_a_score_bounds_what_its_pair_adds_to_the_logits_at_any_distance():
    q, k = tokens_of(0, 40, 2), tokens_of(5, 40, 2)
    bound = float(pair_scores(q.square().mean(0), k.square().mean(0), 2)[0, 0])
    for angle in torch.linspace(0, 6, 7).double():
        mean_square = float((rotated(q, angle) @ k.mT).square().mean())
        assert mean_square <= bound * (1 + 1e-12)


def test_both_dimensions_of_a_pair_stay_or_go():
    kept = best_pairs(torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]]), 2)
    assert kept.tolist() == [[False, True, True] * 2, [True, True, False] * 2]


# ---------- SVD


def head_error(x, value, outputs, left, right) -> float:
    return float((x @ (outputs @ (value - left @ right)).mT).square().sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_value_head_loses_the_tail_of_the_whole_product(seed, rank):
    """The oracle decomposes outputs W_V X^T itself, tokens and all."""
    x, value, outputs = tokens_of(seed, 30, 7), normal(seed + 3, 4, 7), normal(seed + 4, 9, 4)
    left, right = value_output(value, outputs, rank, moments=root_of(x.mT @ x))
    singular = torch.linalg.svdvals(outputs @ value @ x.mT)
    expected = float(singular[rank:4].square().sum())
    assert head_error(x, value, outputs, left, right) == pytest.approx(expected, abs=1e-8 * float(singular[0]) ** 2)


def test_full_rank_gives_the_head_back_and_magnitude_is_never_better():
    x, value, outputs = tokens_of(0, 30, 7), normal(3, 4, 7), normal(4, 9, 4)
    root = root_of(x.mT @ x)
    left, right = value_output(value, outputs, 4, moments=root)
    assert torch.allclose(left @ right, value)
    for rank in (1, 2, 3):
        ours = head_error(x, value, outputs, *value_output(value, outputs, rank, moments=root))
        assert ours <= head_error(x, value, outputs, *largest_values(value, outputs, rank))


def test_magnitude_takes_the_largest():
    value, outputs = torch.diag(torch.tensor([1.0, 3.0, 2.0])), torch.zeros(2, 3)
    left, right = largest_values(value, outputs, 2)
    assert torch.equal(left @ right, torch.diag(torch.tensor([0.0, 3.0, 2.0])))
    gate, up, down = torch.eye(2), 2 * torch.eye(2), torch.tensor([[3.0, 0.0]])
    assert channel_sizes(gate, up, down).tolist() == [14.0, 5.0]


# ---------- what goes of each block


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=12), st.floats(0.01, 0.99), st.floats(0.01, 10), st.floats(0.3, 1)
)
def test_sparsities_have_their_mean_stay_below_the_most_and_fall_with_influence(influence, mean, temperature, most):
    s = torch.tensor(influence, dtype=torch.float64)
    found = sparsities(s, mean, temperature, most=most)
    assert float(found.mean()) == pytest.approx(mean)
    assert float(found.max()) <= max(most, mean) + 1e-9
    assert float(found.min()) >= 0
    order = s.argsort()
    assert bool((found[order].diff() <= 1e-9).all())


def test_sparsities_maximise_the_papers_objective():
    """Against a search over all moves of a little from one block to another."""
    s, temperature = torch.tensor([0.3, 0.1, 0.2, 0.4]).double(), 0.2
    found = sparsities(s, 0.3, temperature)

    def objective(phi: torch.Tensor) -> float:
        share = phi / phi.sum()
        return float((-s * share).sum() - temperature * (share * share.log()).sum())

    best = objective(found)
    for i, j in itertools.permutations(range(4), 2):
        moved = found.clone()
        moved[i] += 1e-3
        moved[j] -= 1e-3
        assert objective(moved) < best
    assert math.isclose(float(found.sum()), 1.2)
