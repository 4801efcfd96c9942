"""Truncation in a metric, balancing, randomised factors, refits: each against a slow float64 oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.factor import (
    DRIFT_TOKENS,
    Factors,
    Spectrum,
    balance,
    decompose,
    decompose_between,
    descending_eigh,
    drift_target,
    energies_between,
    randomised_factors,
    refit_left,
    refit_right,
    solve_symmetric,
    tail_energy,
    token_share,
    truncate,
)
from spectrim.linalg.metric import root_of

SHAPES = [(14, 9), (9, 14), (11, 11), (1, 6), (6, 1), (1, 1)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, size: int) -> Tensor:
    """Correlated, condition number about 1e4."""
    rows = normal(seed, 4 * size + 4, size) * torch.logspace(0, -2, size, dtype=torch.float64)
    rows = rows @ torch.linalg.qr(normal(seed + 1, size, size)).Q
    return rows.mT @ rows / len(rows)


def metric_error(difference: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> float:
    """`tr(B D A D^T)`, the squared error in the metric, without any root."""
    left = difference if outputs is None else outputs @ difference
    right = difference if inputs is None else difference @ inputs
    return float((left * right).sum())


def oracle(weight: Tensor, outputs: Tensor | None, inputs: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Cholesky roots, explicit SVD, mapped back with inverses. Returns the weight and the squared singular values."""
    left = torch.eye(weight.shape[0], dtype=weight.dtype) if outputs is None else torch.linalg.cholesky(outputs)
    right = torch.eye(weight.shape[1], dtype=weight.dtype) if inputs is None else torch.linalg.cholesky(inputs)
    u, s, vt = torch.linalg.svd(left.mT @ weight @ right, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return torch.linalg.inv(left).mT @ cut @ torch.linalg.inv(right), s.square()


def product(factors: Factors | Spectrum) -> Tensor:
    return factors.left @ factors.right


# ---------- decompose


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["none", "right", "left", "both"])
def test_decompose_equals_explicit_svd_mapped_back_with_inverses(shape, sides):
    outputs, inputs = shape
    weight = normal(1, *shape)
    b = covariance(2, outputs) if sides in ("left", "both") else None
    a = covariance(3, inputs) if sides in ("right", "both") else None
    spectrum = decompose(weight, None if b is None else root_of(b), None if a is None else root_of(a))
    full = min(shape)
    assert spectrum.left.shape == (outputs, full)
    assert spectrum.right.shape == (full, inputs)
    for rank in range(full + 1):
        expected, energy = oracle(weight, b, a, rank)
        torch.testing.assert_close(product(truncate(spectrum, rank)), expected, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(spectrum.energy, energy, rtol=1e-8, atol=1e-10 * float(energy[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_is_the_projection_of_the_weight_on_the_leading_outputs(shape):
    weight, gram = normal(4, *shape), covariance(5, shape[1])
    spectrum = decompose(weight, right=root_of(gram))
    _, vectors = torch.linalg.eigh(weight @ gram @ weight.mT)
    for rank in range(1, min(shape) + 1):
        basis = vectors[:, -rank:]
        torch.testing.assert_close(product(truncate(spectrum, rank)), basis @ basis.mT @ weight, rtol=1e-7, atol=1e-8)


@given(seed=st.integers(0, 10_000), outputs=st.integers(2, 12), inputs=st.integers(2, 12), data=st.data())
def test_no_rank_r_competitor_is_better_in_the_metric(seed, outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs) - 1))
    weight, b, a = normal(seed, outputs, inputs), covariance(seed + 1, outputs), covariance(seed + 2, inputs)
    spectrum = decompose(weight, root_of(b), root_of(a))
    best = metric_error(weight - product(truncate(spectrum, rank)), b, a)
    assert best == pytest.approx(float(spectrum.tail()[rank]), rel=1e-7, abs=1e-9 * float(spectrum.energy[0]))
    for trial in range(8):
        near = truncate(spectrum, rank)
        step = 10.0 ** (-trial)  # from unrelated to very near the optimum
        left = near.left + step * normal(seed + 10 + trial, outputs, rank) * near.left.norm()
        right = near.right + step * normal(seed + 30 + trial, rank, inputs) * near.right.norm()
        assert metric_error(weight - left @ right, b, a) >= best * (1 - 1e-9)
    for seed_of_right in range(3):  # competitors with an optimal left factor for a random right one
        right = normal(seed + 50 + seed_of_right, rank, inputs)
        left = torch.linalg.solve(right @ a @ right.mT, right @ a @ weight.mT).mT
        assert metric_error(weight - left @ right, b, a) >= best * (1 - 1e-9)


@pytest.mark.fault(46, 48)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_grams_give_the_weight_back_at_full_rank_and_the_optimum_below(shape):
    outputs, inputs = shape
    weight = normal(6, *shape)
    x, g = normal(7, max(1, inputs // 3), inputs), normal(8, max(1, outputs // 3), outputs)
    a, b = x.mT @ x, g.mT @ g
    spectrum = decompose(weight, root_of(b), root_of(a))
    torch.testing.assert_close(product(spectrum), weight, rtol=0, atol=1e-4)
    seen = torch.linalg.svdvals(g @ weight @ x.mT).square()  # the error as it is defined: on the data
    for rank in range(min(shape)):
        error = metric_error(weight - product(truncate(spectrum, rank)), b, a)
        assert error == pytest.approx(float(seen[rank:].sum()), rel=1e-6, abs=1e-6 * float(seen.sum()))


def test_components_are_ordered_and_each_costs_its_own_energy():
    weight, b, a = normal(9, 8, 6), covariance(10, 8), covariance(11, 6)
    spectrum = decompose(weight, root_of(b), root_of(a))
    assert bool((spectrum.energy[:-1] >= spectrum.energy[1:]).all())
    for k in range(6):
        alone = torch.outer(spectrum.left[:, k], spectrum.right[k])
        assert metric_error(alone, b, a) == pytest.approx(float(spectrum.energy[k]), rel=1e-7)


def test_decompose_works_in_the_dtype_it_is_given():
    spectrum = decompose(normal(1, 5, 7).float())
    assert {t.dtype for t in spectrum} == {torch.float32}


@pytest.mark.fault(48)
def test_a_zero_weight_has_no_energy_and_stays_zero():
    for shape in ((5, 3), (3, 5)):
        spectrum = decompose(torch.zeros(shape, dtype=torch.float64), right=root_of(covariance(1, shape[1])))
        assert torch.equal(spectrum.energy, torch.zeros(3, dtype=torch.float64))
        assert torch.equal(product(spectrum), torch.zeros(shape, dtype=torch.float64))


def test_descending_eigh_clamps_and_orders():
    q = torch.linalg.qr(normal(12, 4, 4)).Q
    values = torch.tensor([3.0, -1e-12, 5.0, 1.0], dtype=torch.float64)
    energy, basis = descending_eigh(q @ torch.diag(values) @ q.mT)
    torch.testing.assert_close(energy, torch.tensor([5.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    assert float(energy.min()) >= 0.0
    torch.testing.assert_close((basis.mT @ q).abs(), torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]])


# ---------- spectrum


def test_tail_is_the_error_of_keeping_the_first_components():
    energy = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([15.0, 7.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(tail_energy(energy), expected)
    spectrum = Spectrum(torch.zeros(2, 4), torch.zeros(4, 2), energy)
    assert torch.equal(spectrum.tail(), expected)


def test_order_by_permutes_all_three_parts_alike_and_stably():
    spectrum = Spectrum(normal(1, 3, 4), normal(2, 4, 5), torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    ordered = spectrum.order_by(torch.tensor([1.0, 7.0, 1.0, 9.0]))
    order = [3, 1, 0, 2]
    assert torch.equal(ordered.left, spectrum.left[:, order])
    assert torch.equal(ordered.right, spectrum.right[order])
    assert torch.equal(ordered.energy, spectrum.energy[order])
    torch.testing.assert_close(product(ordered), product(spectrum))


# ---------- balance


@given(seed=st.integers(0, 10_000), outputs=st.integers(1, 10), inputs=st.integers(1, 10), data=st.data())
def test_balance_keeps_the_product_and_makes_both_grams_the_same_diagonal(seed, outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    skewed = Factors(normal(seed, outputs, rank) * 1e4, normal(seed + 1, rank, inputs) * 1e-3)
    balanced = balance(skewed)
    torch.testing.assert_close(product(balanced), product(skewed), rtol=1e-9, atol=1e-10)
    left_gram, right_gram = balanced.left.mT @ balanced.left, balanced.right @ balanced.right.mT
    singular = torch.linalg.svdvals(product(skewed))[:rank]
    torch.testing.assert_close(left_gram, torch.diag(singular), rtol=1e-9, atol=1e-9 * float(singular[0]))
    torch.testing.assert_close(right_gram, torch.diag(singular), rtol=1e-9, atol=1e-9 * float(singular[0]))


def test_balance_survives_dependent_columns():
    left = normal(1, 8, 3)
    factors = Factors(torch.cat([left, left[:, :1]], dim=1), normal(2, 4, 6))
    torch.testing.assert_close(product(balance(factors)), product(factors), rtol=1e-10, atol=1e-10)


# ---------- randomised


@pytest.mark.parametrize("shape", [(120, 60), (60, 120), (90, 90)])
@pytest.mark.parametrize("decay", [0.9, 0.97])
def test_randomised_factors_are_within_five_per_cent_of_the_optimum(shape, decay):
    size = min(shape)
    u, v = torch.linalg.qr(normal(1, shape[0], size)).Q, torch.linalg.qr(normal(2, shape[1], size)).Q
    weight = (u * decay ** torch.arange(size, dtype=torch.float64)) @ v.mT
    gram = covariance(3, shape[1])
    for rank in (3, 10):
        plain = float((weight - product(randomised_factors(weight, rank))).norm())
        optimum = float(torch.linalg.svdvals(weight)[rank:].norm())
        assert optimum * (1 - 1e-9) <= plain <= 1.05 * optimum
        in_metric = randomised_factors(weight, rank, right=root_of(gram))
        expected, energy = oracle(weight, None, gram, rank)
        error = metric_error(weight - product(in_metric), None, gram) ** 0.5
        assert float(energy[rank:].sum()) ** 0.5 * (1 - 1e-9) <= error <= 1.05 * float(energy[rank:].sum()) ** 0.5
        assert metric_error(expected - product(in_metric), None, gram) ** 0.5 < 0.5 * error


def test_randomised_factors_are_seeded_and_exact_when_the_sketch_covers_everything():
    weight = normal(5, 12, 9)
    assert torch.equal(randomised_factors(weight, 3, seed=1).left, randomised_factors(weight, 3, seed=1).left)
    expected, _ = oracle(weight, None, None, 3)
    torch.testing.assert_close(product(randomised_factors(weight, 3)), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(product(randomised_factors(weight, 9)), weight, rtol=1e-9, atol=1e-10)


# ---------- refit


def explicit_refit(weight: Tensor, right: Tensor, x: Tensor, x_now: Tensor) -> Tensor:
    """argmin over B of || X W^T - X' right^T B^T ||_F, by torch.linalg.lstsq on the data."""
    return torch.linalg.lstsq(x_now @ right.mT, x @ weight.mT).solution.mT


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5))
def test_refit_equals_least_squares_on_explicit_data(seed, rank):
    weight, right, x = normal(seed, 6, 8), normal(seed + 1, rank, 8), normal(seed + 2, 60, 8)
    x_now = x + 0.3 * normal(seed + 3, 60, 8)
    left = refit_left(weight, right, x.mT @ x_now, x_now.mT @ x_now, ridge=0.0)
    torch.testing.assert_close(left, explicit_refit(weight, right, x, x_now), rtol=1e-7, atol=1e-8)


def test_refit_with_ridge_is_the_ridge_problem_around_the_undisturbed_answer():
    weight, right, x = normal(1, 6, 8), normal(2, 4, 8), normal(3, 50, 8)
    x_now = x + 0.5 * normal(4, 50, 8)
    ridge = 0.1
    seen = x_now @ right.mT
    anchor = explicit_refit(weight, right, x_now, x_now)
    damping = ridge * float((seen.mT @ seen).trace()) / 4
    # Least squares with extra rows sqrt(damping) (B - anchor).
    rows = torch.cat([seen, damping**0.5 * torch.eye(4, dtype=torch.float64)])
    wanted = torch.cat([x @ weight.mT, damping**0.5 * anchor.mT])
    expected = torch.linalg.lstsq(rows, wanted).solution.mT
    actual = refit_left(weight, right, x.mT @ x_now, x_now.mT @ x_now, ridge=ridge)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    assert float((expected - anchor).norm()) > 0.01 * float(anchor.norm())  # the example tells them apart


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
def test_refit_of_an_undisturbed_optimum_changes_nothing_at_any_ridge(ridge):
    weight, gram = normal(5, 7, 9), covariance(6, 9)
    factors = truncate(decompose(weight, right=root_of(gram)), 4)
    refitted = refit_left(weight, factors.right, gram, gram, ridge=ridge)
    torch.testing.assert_close(refitted @ factors.right, product(factors), rtol=1e-6, atol=1e-8)


@pytest.mark.fault(47)
def test_refit_with_fewer_tokens_than_the_rank_stays_finite_and_fits_the_tokens():
    weight, right, x = normal(7, 5, 10), normal(8, 6, 10), normal(9, 3, 10)
    left = refit_left(weight, right, x.mT @ x, x.mT @ x)
    torch.testing.assert_close(x @ right.mT @ left.mT, x @ weight.mT, rtol=1e-5, atol=1e-6)


# ---------- solve


@given(seed=st.integers(0, 10_000), size=st.integers(1, 10))
def test_solve_symmetric_solves(seed, size):
    system, target = covariance(seed, size), normal(seed + 1, size, 3)
    expected = torch.linalg.solve(system, target)
    torch.testing.assert_close(
        solve_symmetric(system, target), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


def test_solve_symmetric_of_a_singular_system_is_the_least_norm_answer():
    rows = normal(1, 3, 7)
    system, target = rows.mT @ rows, normal(2, 7, 2)
    expected = torch.linalg.pinv(system, hermitian=True, rtol=1e-10) @ target
    torch.testing.assert_close(solve_symmetric(system, target), expected, rtol=1e-8, atol=1e-9)
    scaled = solve_symmetric(system * 1e-12, target)  # the cut is relative
    torch.testing.assert_close(scaled * 1e-12, expected, rtol=1e-8, atol=1e-9)


def test_solve_symmetric_of_nothing_is_zero():
    assert torch.equal(
        solve_symmetric(torch.zeros(3, 3, dtype=torch.float64), normal(1, 3, 2)), torch.zeros(3, 2, dtype=torch.float64)
    )


# ---------- drift_target


def drifted(seed: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs (N, I) of a dense model, and what a compressed one makes of them: shrunk, mixed, noisy."""
    x = normal(seed, tokens, width)
    return x, 0.8 * x + 0.3 * x @ normal(seed + 1, width, width) / width**0.5 + 0.2 * normal(seed + 2, tokens, width)


@pytest.mark.parametrize("mix", [0.3, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [50, 5])  # of 8 inputs: with 5 tokens S is singular
def test_the_drift_target_is_the_least_squares_answer(mix, ridge, tokens):
    x, y = drifted(1, tokens, 8)
    weight = normal(2, 6, 8)
    cross, gram = x.mT @ y / tokens, y.mT @ y / tokens
    damping = ridge * gram.trace() / 8
    system = torch.cat([y / tokens**0.5, damping.sqrt() * torch.eye(8, dtype=torch.float64)])
    change = torch.cat([mix * (x - y) @ weight.mT / tokens**0.5, torch.zeros(8, 6, dtype=torch.float64)])
    want = weight + torch.linalg.lstsq(system, change, driver="gelsd").solution.mT
    torch.testing.assert_close(drift_target(weight, cross, gram, mix=mix, ridge=ridge), want, rtol=1e-7, atol=1e-7)


def test_without_drift_or_without_a_share_the_weight_stays():
    x, y = drifted(3, 40, 8)
    weight = normal(4, 6, 8)
    cross, gram = x.mT @ y / 40, y.mT @ y / 40
    assert torch.equal(drift_target(weight, cross, gram, mix=0.0), weight)
    torch.testing.assert_close(drift_target(weight, gram, gram, mix=1.0), weight)
    dead = torch.zeros(8, 8, dtype=torch.float64)
    assert torch.equal(drift_target(weight, dead, dead, mix=0.5), weight)


def test_the_drift_target_has_no_scale_of_its_own():
    x, y = drifted(5, 40, 8)
    weight = normal(6, 6, 8)
    cross, gram = x.mT @ y / 40, y.mT @ y / 40
    want = drift_target(weight, cross, gram, mix=0.5)
    torch.testing.assert_close(drift_target(weight, 1e6 * cross, 1e6 * gram, mix=0.5), want)


def test_the_share_of_the_drift_grows_with_the_tokens_for_each_input():
    shares = [token_share(tokens, 512) for tokens in (0, 1, 512, 4096, 131_072, 10_000_000)]
    assert shares == sorted(set(shares))
    assert shares[0] == 0
    assert shares[-1] > 0.999
    assert token_share(DRIFT_TOKENS * 512, 512) == pytest.approx(0.5)
    assert token_share(4096, 64) == token_share(8192, 128)  # only their ratio counts
    assert token_share(131_072, 384) > token_share(131_072, 1024) > 0.98


def test_the_share_of_few_tokens_is_nearer_to_the_truth_than_all_of_the_drift_or_none():
    """Moments known from how x' is made; most of the drift is noise that x' does not explain."""
    width, noise = 24, 0.3
    weight, tokens = normal(1, 16, width), 8 * width
    share = token_share(tokens, width)
    truth = weight / (1 + noise**2)  # of W x, seen through x' = x + noise
    found = []
    for seed in range(100, 120):
        x = normal(seed, tokens, width)
        y = x + noise * normal(seed + 1000, tokens, width)
        cross, gram = x.mT @ y / tokens, y.mT @ y / tokens
        targets = [drift_target(weight, cross, gram, mix=mix, ridge=0.0) for mix in (0.0, share, 1.0)]
        found.append([float((target - truth).square().sum()) for target in targets])
    none, some, full = torch.tensor(found).mean(0).tolist()
    assert some < 0.85 * min(none, full)


def test_following_the_drift_lowers_the_error_at_equal_rank():
    x, y = drifted(7, 400, 12)
    weight = normal(8, 10, 12)
    cross, gram = x.mT @ y / 400, y.mT @ y / 400

    def error(target: Tensor, metric: Tensor) -> float:
        kept = truncate(decompose(target, right=root_of(metric)), 6)
        return float((x @ weight.mT - y @ (kept.left @ kept.right).mT).square().sum(1).mean())

    stays = error(weight, x.mT @ x / 400)
    same_target = error(weight, gram)
    half, full = (error(drift_target(weight, cross, gram, mix=mix), gram) for mix in (0.5, 1.0))
    assert full < half < 0.95 * min(stays, same_target)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_refit_right_equals_least_squares_on_samples_and_keeps_what_cannot_be_better(shape):
    outputs, inputs = shape
    weight, left, right = normal(0, outputs, inputs), normal(1, outputs, 3), normal(2, 3, inputs)
    x = normal(3, 400, inputs)
    y = x + 0.3 * normal(4, 400, inputs)  # the compressed model's inputs
    cross, gram = x.mT @ y / 400, y.mT @ y / 400
    found = refit_right(weight, left, right, cross, gram, ridge=1e-12)
    # The slow way: the best map from y to the targets' coordinates in the columns of `left`.
    coordinates = torch.linalg.lstsq(left, weight @ x.mT).solution
    expected = torch.linalg.lstsq(y, coordinates.mT).solution.mT
    assert torch.allclose(found, expected, atol=1e-8)
    assert torch.allclose(refit_right(weight, left, found, cross, gram), found, atol=1e-8)
    silent = refit_right(weight, left, right, cross * 0, gram * 0)
    assert torch.equal(silent, right)


# ---------- decompose_between


@pytest.mark.parametrize("shape", SHAPES)
def test_a_decomposition_with_one_root_is_that_with_two(shape):
    """The way that forms both roots is the oracle."""
    weight, b, a = normal(1, *shape), covariance(2, shape[0]), covariance(3, shape[1])
    found, wanted = decompose_between(weight, b, a), decompose(weight, root_of(b), root_of(a))
    torch.testing.assert_close(found.energy, wanted.energy, rtol=1e-8, atol=1e-10 * float(wanted.energy[0]))
    assert torch.equal(energies_between(weight, b, a), found.energy)
    for rank in range(min(shape) + 1):
        cut, other = product(truncate(found, rank)), product(truncate(wanted, rank))
        torch.testing.assert_close(cut, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("side", ["output", "input"])
def test_a_covariance_of_zeros_counts_as_the_identity(shape, side):
    weight, outputs, inputs = normal(1, *shape), covariance(2, shape[0]), covariance(3, shape[1])
    zeros, eyes = [torch.zeros_like(outputs), inputs], [torch.eye(shape[0], dtype=weight.dtype), inputs]
    if side == "input":
        zeros, eyes = [outputs, torch.zeros_like(inputs)], [outputs, torch.eye(shape[1], dtype=weight.dtype)]
    found, wanted = decompose_between(weight, *zeros), decompose_between(weight, *eyes)
    torch.testing.assert_close(found.energy, wanted.energy)
    torch.testing.assert_close(product(truncate(found, 2)), product(truncate(wanted, 2)))


def test_a_singular_larger_side_gives_the_weight_back():
    weight, rows = normal(1, 5, 9), normal(2, 3, 9)
    spectrum = decompose_between(weight, covariance(3, 5), rows.mT @ rows)
    assert float(spectrum.energy[3:].max()) <= 1e-12 * float(spectrum.energy[0])
    torch.testing.assert_close(product(spectrum), weight, rtol=1e-7, atol=1e-8)
