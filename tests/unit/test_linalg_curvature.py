"""Streaming sums against float64 products and per-sequence autograd; divergence against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectrim.linalg import curvature
from spectrim.linalg.curvature import (
    ALIGNED,
    HALF_TRUST,
    Coupled,
    add_coupled,
    add_gram,
    add_squares,
    clip_rows,
    strip_rows,
    toward,
    window_share,
)
from spectrim.linalg.divergence import mean_kl


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


# ---------- strips of a symmetric product


@pytest.mark.parametrize(
    ("width", "rows"),
    [(1024, 1024), (1100, 1120), (2048, 1024), (4096, 1024), (5120, 1280), (8192, 1376), (11008, 1376)],
)
def test_strips_are_few_and_begin_at_aligned_rows(width, rows):
    assert strip_rows(width) == rows
    assert rows * 2 % ALIGNED == 0  # bytes of bf16


# ---------- add_gram


@pytest.mark.fault(49, 50)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_gram_equals_the_float64_product_at_every_scale(scale, tokens):
    rows = normal(1, tokens, 12) * scale
    total = zeros(12, 12)
    add_gram(total, rows)
    exact = rows.double().mT @ rows.double()
    assert total.dtype == torch.float64
    assert float((total - exact).norm()) <= 1e-6 * float(exact.norm())


@pytest.mark.fault(49, 50)
def test_gram_over_four_decades_of_activations_stays_positive():
    """Condition 1e8: accumulation in float32 alone loses the small directions (see the module's header)."""
    grades = torch.logspace(0, -4, 24)
    rows = normal(2, 20_000, 24) * grades
    total, running = zeros(24, 24), torch.zeros(24, 24)
    add_gram(total, rows)
    for part in rows.split(50):
        running += part.mT @ part
    exact = rows.double().mT @ rows.double()
    whitened = torch.outer(1 / exact.diagonal().sqrt(), 1 / exact.diagonal().sqrt())
    error = float(((total - exact) * whitened).abs().max())
    assert error < 1e-5
    assert error < 0.5 * float(((running.double() - exact) * whitened).abs().max())
    assert float(torch.linalg.eigvalsh(total)[0]) == pytest.approx(float(torch.linalg.eigvalsh(exact)[0]), rel=1e-3)


@pytest.mark.fault(55)
@given(split=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_gram_does_not_depend_on_how_the_tokens_arrive(split, seed):
    rows = normal(seed, sum(split), 8)
    whole, parts, shuffled = zeros(8, 8), zeros(8, 8), zeros(8, 8)
    add_gram(whole, rows)
    for part in rows.split(split):
        add_gram(parts, part)
    add_gram(shuffled, rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))])
    size = float(whole.norm())
    assert float((whole - parts).norm()) <= 1e-6 * size
    assert float((whole - shuffled).norm()) <= 1e-6 * size


def test_gram_in_chunks_counts_every_row_once(monkeypatch):
    rows = normal(3, 23, 5)
    exact = rows.double().mT @ rows.double()
    for chunk in (1, 4, 22, 23, 24):
        monkeypatch.setattr(curvature, "CHUNK", chunk)
        total = zeros(5, 5)
        add_gram(total, rows)
        torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.fault(50)
def test_gram_adds_to_what_is_there_and_takes_half_precision_rows():
    rows = normal(4, 30, 6)
    total = torch.full((6, 6), 5.0, dtype=torch.float64)
    add_gram(total, rows.bfloat16())
    seen = rows.bfloat16().double()
    torch.testing.assert_close(total, 5.0 + seen.mT @ seen, rtol=1e-6, atol=1e-5)


def test_cross_gram_is_rows_times_others():
    x, y = normal(5, 50, 4), normal(6, 50, 7)
    total = zeros(4, 7)
    add_gram(total, x, y)
    torch.testing.assert_close(total, x.double().mT @ y.double(), rtol=1e-5, atol=1e-5)


def test_gram_shows_a_nan():
    rows = normal(7, 10, 4)
    rows[3, 2] = float("nan")
    total = zeros(4, 4)
    add_gram(total, rows)
    assert total.isnan().tolist() == [[i == 2 or j == 2 for j in range(4)] for i in range(4)]


# ---------- add_squares


@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), length=st.integers(1, 6))
def test_squares_equal_squared_autograd_gradients_of_each_sequence(seed, batch, length):
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, 3, 5))
    x = normal(seed + 1, batch, length, 5)
    expected, output_gradients = zeros(3, 5), []
    for sequence in x:
        y = layer(sequence.double())
        loss = (y**3).sum() + y.sin().sum()
        at_output, at_weight = torch.autograd.grad(loss, [y, layer.weight])
        expected += at_weight.square()
        output_gradients.append(at_output)
    total = zeros(3, 5)
    add_squares(total, torch.stack(output_gradients), x)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_squares_are_of_sums_over_tokens_not_sums_of_squares():
    gradients = torch.tensor([[[1.0], [2.0]], [[3.0], [-3.0]]])
    inputs = torch.tensor([[[1.0], [1.0]], [[1.0], [1.0]]])
    total = zeros(1, 1)
    add_squares(total, gradients, inputs)
    assert float(total) == 9.0  # (1 + 2)^2 + (3 - 3)^2


def test_squares_refuse_batches_of_different_length():
    with pytest.raises(ValueError, match="shorter"):
        add_squares(zeros(1, 1), torch.ones(2, 3, 1), torch.ones(1, 3, 1))


# ---------- add_coupled


def empty(outputs: int, inputs: int) -> Coupled:
    return Coupled(zeros(inputs, inputs), zeros(outputs, outputs), zeros(1)[0])


def positive(seed: int, width: int) -> Tensor:
    root = normal(seed, width, 2 * width).double()
    return root @ root.mT / (2 * width)


def correlated_sequences(seed: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Gradients (B, S, 3) and inputs (B, S, 4) that keep a direction of their own through each sequence."""
    g = normal(seed, count, 1, 3) * torch.tensor([3.0, 1.0, 0.5]) + 0.5 * normal(seed + 1, count, length, 3)
    x = normal(seed + 2, count, 1, 4) * torch.tensor([0.3, 1.0, 1.0, 3.0]) + normal(seed + 3, count, length, 4)
    return g, x


@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), length=st.integers(1, 6))
def test_coupled_sums_equal_their_definition_over_each_sequence(seed, batch, length):
    g, x = normal(seed, batch, length, 3), normal(seed + 1, batch, length, 5)
    a_inverse, b_inverse = positive(seed + 2, 5), positive(seed + 3, 3)
    total = empty(3, 5)
    for rows, others in zip(g.split(2), x.split(2), strict=True):  # sums go on from batch to batch
        add_coupled(total, rows, others, a_inverse.float(), b_inverse.float())
    a, b, overlap = zeros(5, 5), zeros(3, 3), 0.0
    for gradient, inputs in zip(g.double(), x.double(), strict=True):
        whole = sum((torch.outer(u, v) for u, v in zip(gradient, inputs, strict=True)), zeros(3, 5))
        a += whole.mT @ b_inverse @ whole / 3
        b += whole @ a_inverse @ whole.mT / 5
        vector = whole.mT.flatten()  # columns below each other
        overlap += float(vector @ torch.kron(a_inverse, b_inverse) @ vector) / 15
    tokens = batch * length
    got_a, got_b = total.finish(tokens)
    torch.testing.assert_close(got_a, a / tokens, rtol=1e-4, atol=1e-5 * float(a.max() / tokens))
    want_b = b / tokens / (overlap / tokens)
    torch.testing.assert_close(got_b, want_b, rtol=1e-4, atol=1e-5 * float(want_b.max()))
    assert torch.equal(got_a, got_a.mT)
    assert torch.equal(got_b, got_b.mT)


def test_both_ways_of_coupling_give_the_same_sums():
    g, x = correlated_sequences(5, 7, 9)
    inverses = positive(6, 4).float(), positive(7, 3).float()
    ways = []
    for add in (curvature._add_through_weights, curvature._add_through_tokens):
        ways.append(empty(3, 4))
        add(ways[-1], g, x, *inverses)
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_coupling_in_chunks_counts_every_sequence_once(monkeypatch):
    g, x = correlated_sequences(8, 5, 2)
    found = []
    for chunk in (1, 8, 4096):  # 1, 2 and all sequences at once
        monkeypatch.setattr(curvature, "CHUNK", chunk)
        found.append(empty(3, 4))
        add_coupled(found[-1], g, x, positive(9, 4).float(), positive(10, 3).float())
    for part in zip(*found, strict=True):
        torch.testing.assert_close(part[0], part[2], rtol=1e-5, atol=1e-6 * float(part[2].abs().max()))
        torch.testing.assert_close(part[1], part[2], rtol=1e-5, atol=1e-6 * float(part[2].abs().max()))


def test_independent_tokens_give_the_plain_pair_back():
    """K-FAC's assumption holds: nothing is to be refined, the scale included."""
    g, x = normal(1, 20_000, 4, 2) * torch.tensor([1.0, 3.0]), normal(2, 20_000, 4, 3) * torch.tensor([1.0, 2.0, 3.0])
    plain = torch.kron(torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.diag(torch.tensor([1.0, 9.0]))).double()
    total = empty(2, 3)
    add_coupled(
        total, g, x, torch.diag(torch.tensor([1.0, 4.0, 9.0])).inverse(), torch.diag(torch.tensor([1.0, 1 / 9]))
    )
    a, b = total.finish(80_000)
    assert float((torch.kron(a, b) - plain).norm()) < 0.03 * float(plain.norm())


def test_one_step_brings_the_factors_nearer_to_the_fisher_matrix():
    """In the divergence that the alternation lowers: tr(K^-1 F) + log det K for K = A (x) B, F = E[vec G vec G^T]."""
    g, x = correlated_sequences(3, 4000, 5)
    whole = (g.mT @ x).double().mT.flatten(1)
    fisher = whole.mT @ whole / (4000 * 5)
    rows, others = g.flatten(0, 1).double(), x.flatten(0, 1).double()
    b0, a0 = rows.mT @ rows / len(rows), others.mT @ others / len(others)

    def divergence(a: Tensor, b: Tensor) -> float:
        pair = torch.kron(a, b)
        return float(torch.linalg.solve(pair, fisher).trace() + torch.logdet(pair) - torch.logdet(fisher)) - 12

    total = empty(3, 4)
    add_coupled(total, g, x, a0.inverse().float(), b0.inverse().float())
    a, b = total.finish(len(rows))
    # Two factors changed at once: the scale is the one seen from the old pair, which the divergence minimises over.
    size = float(torch.linalg.solve(torch.kron(a, b), fisher).trace()) / 12
    kfac_size = float(torch.linalg.solve(torch.kron(a0, b0), fisher).trace()) / 12
    assert divergence(a * size, b) < 0.6 * divergence(a0 * kfac_size, b0)
    whitened = torch.linalg.solve(torch.kron(a0, b0), torch.kron(a, b)).trace() / 12
    assert float(whitened) == pytest.approx(kfac_size, rel=1e-4)  # the mean curvature is what was measured


# ---------- few windows


def test_the_share_of_the_coupled_pair_grows_with_the_windows():
    shares = [window_share(n) for n in (0, 1, 4, 16, 64, 256, 4096)]
    assert shares == sorted(set(shares))
    assert shares[0] == 0
    assert window_share(HALF_TRUST) == pytest.approx(0.5)
    assert window_share(256) > 0.97
    assert window_share(4) < 0.01
    assert 0.99 < shares[-1] < 1


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), size=st.floats(1e-6, 1e6))
def test_toward_mixes_directions_at_equal_trace_and_sizes_in_logarithms(seed, share, size):
    plain, coupled = positive(seed, 5), size * positive(seed + 1, 5)
    got = toward(plain, coupled, share)
    shape = (1 - share) * plain / plain.trace() + share * coupled / coupled.trace()
    torch.testing.assert_close(got / got.trace(), shape, rtol=1e-9, atol=1e-12)
    want = (1 - share) * plain.trace().log() + share * coupled.trace().log()
    assert float(got.trace().log()) == pytest.approx(float(want), abs=1e-9)


def test_toward_ends_at_both_covariances():
    plain, coupled = positive(1, 6), 7 * positive(2, 6)
    assert torch.equal(toward(plain, coupled, 0.0), plain)
    torch.testing.assert_close(toward(plain, coupled, 1.0), coupled, rtol=1e-12, atol=0)


def test_shrunk_moments_are_nearer_to_the_truth_than_both_ends():
    """Windows of 5 correlated tokens: 50,000 for the truth and the plain side, HALF_TRUST for the coupled one."""

    def pair(seed: int, windows: int) -> tuple[Tensor, Tensor]:
        g, x = correlated_sequences(seed, windows, 5)
        rows, others = g.flatten(0, 1).double(), x.flatten(0, 1).double()
        b0, a0 = rows.mT @ rows / len(rows), others.mT @ others / len(others)
        total = empty(3, 4)
        add_coupled(total, g, x, a0.inverse().float(), b0.inverse().float())
        return a0, total.finish(len(rows))[0]

    def distance(found: Tensor) -> float:
        return float((found / found.trace() - truth / truth.trace()).norm())

    plain, truth = pair(3, 50_000)
    ends, between = [], []
    for seed in range(100, 140):
        coupled = pair(seed, HALF_TRUST)[1]
        ends.append((distance(plain), distance(coupled)))
        between.append(distance(toward(plain, coupled, window_share(HALF_TRUST))))
    assert sum(between) < 0.85 * min(sum(e) for e in zip(*ends, strict=True))


# ---------- under autocast


def test_autocast_of_the_pass_does_not_reach_the_sums():
    """Found: hooks run inside autocast, and float32 products became bf16, with errors of 1e-3."""
    rows, others = normal(1, 2, 40, 6), normal(2, 2, 40, 5)
    inverses = torch.eye(5), torch.eye(6)

    def sums() -> list[Tensor]:
        gram, cross, squares, coupled = zeros(6, 6), zeros(6, 5), zeros(6, 5), empty(6, 5)
        add_gram(gram, rows[0])
        add_gram(cross, rows[0], others[0])
        add_squares(squares, rows, others)
        add_coupled(coupled, rows, others, *inverses)
        return [gram, cross, squares, *coupled]

    outside = sums()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (rows[0].mT @ rows[0]).dtype == torch.bfloat16  # autocast is on, and would be felt
        inside = sums()
        assert (rows[0].mT @ rows[0]).dtype == torch.bfloat16  # and is on again afterwards
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)
    exact = rows[0].double().mT @ rows[0].double()
    assert float((inside[0] - exact).norm()) <= 1e-6 * float(exact.norm())


# ---------- clip_rows


def test_clip_scales_only_rows_above_the_ratio_to_exactly_that_norm():
    rows = normal(8, 200, 6)
    rows[17] *= 1000
    rows[40] = 0
    limit = 3.0 * float(rows.norm(dim=1).square().mean().sqrt())
    clipped = clip_rows(rows, ratio=3.0)
    assert float(clipped[17].norm()) == pytest.approx(limit, rel=1e-5)
    torch.testing.assert_close(clipped[17] / clipped[17].norm(), rows[17] / rows[17].norm())
    others = torch.arange(200) != 17
    assert torch.equal(clipped[others], rows[others])


@given(seed=st.integers(0, 1000), exponent=st.integers(-10, 10))
def test_clip_has_no_scale_of_its_own(seed, exponent):
    rows = normal(seed, 30, 4) * normal(seed + 1, 30, 1).exp()
    torch.testing.assert_close(clip_rows(rows * 2.0**exponent, ratio=1.0), clip_rows(rows, ratio=1.0) * 2.0**exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clip_keeps_the_dtype_and_leaves_zeros_alone(dtype):
    assert clip_rows(normal(9, 5, 3).to(dtype), ratio=1.0).dtype == dtype
    assert torch.equal(clip_rows(torch.zeros(4, 3, dtype=dtype), ratio=1.0), torch.zeros(4, 3, dtype=dtype))


def test_clip_does_not_hide_a_nan():
    rows = normal(10, 6, 3)
    rows[2, 1] = float("nan")
    assert not bool(torch.isfinite(clip_rows(rows, ratio=10.0)).all())


# ---------- mean_kl


@given(seed=st.integers(0, 1000))
def test_kl_is_the_mean_over_positions_of_its_definition(seed):
    student, teacher = normal(seed, 2, 3, 5), normal(seed + 1, 2, 3, 5) * 2
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = sum(float((p[b, s] * (p[b, s] / q[b, s]).log()).sum()) for b in range(2) for s in range(3)) / 6
    assert float(mean_kl(student, teacher)) == pytest.approx(expected, rel=1e-4)


def test_kl_is_zero_for_equal_distributions_and_ignores_a_constant_in_the_logits():
    logits = normal(11, 1, 4, 6)
    assert float(mean_kl(logits + 100, logits)) == pytest.approx(0.0, abs=1e-6)


def test_kl_has_a_direction_and_is_computed_in_float32():
    teacher = torch.tensor([[[10.0, 0.0]]])
    student = torch.tensor([[[0.0, 0.0]]])
    forward, backward = float(mean_kl(student, teacher)), float(mean_kl(teacher, student))
    assert forward == pytest.approx(0.6927, abs=1e-3)  # ln 2 - H(p)
    assert backward == pytest.approx(4.3069, abs=1e-3)  # 5 - ln 2 + small
    assert mean_kl(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
