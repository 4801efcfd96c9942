"""Streaming sums against float64 products and per-sequence autograd; divergence against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectrim.linalg import curvature
from spectrim.linalg.curvature import add_gram, add_squares, clip_rows
from spectrim.linalg.divergence import mean_kl


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


# ---------- add_gram


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_gram_equals_the_float64_product_at_every_scale(scale, tokens):
    rows = normal(1, tokens, 12) * scale
    total = zeros(12, 12)
    add_gram(total, rows)
    exact = rows.double().mT @ rows.double()
    assert total.dtype == torch.float64
    assert float((total - exact).norm()) <= 1e-6 * float(exact.norm())


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
