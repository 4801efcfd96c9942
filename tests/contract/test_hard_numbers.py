"""Decompositions where numbers are hard: held against 50-digit arithmetic, at every scale, on degenerate statistics.

Errors are allowed to be off by what rounding and the floor of the metric (1e-10 of its largest eigenvalue) explain,
relative to |W|^2 times the largest eigenvalues of both sides, never more: 1e-8.
"""

import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.curvature import add_gram
from spectrim.linalg.factor import Spectrum, decompose, truncate
from spectrim.linalg.metric import root_of
from spectrim.registry import METHODS, make_method
from spectrim.replacement import Target
from spectrim.stats import Stats

OUTPUTS, INPUTS = 6, 5
ALLOWED = 1e-8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(eigenvalues: list[float], seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return basis * torch.tensor(eigenvalues, dtype=torch.float64) @ basis.mT


def spread(condition: float, count: int) -> list[float]:
    return [condition ** (-i / (count - 1)) for i in range(count)]


def exact(matrix: Tensor) -> mpmath.matrix:
    return mpmath.matrix(matrix.tolist())


def exact_root(covariance: Tensor) -> mpmath.matrix:
    values, vectors = mpmath.eigsy(exact((covariance + covariance.mT) / 2))
    return vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values])


def least_error(weight: Tensor, left: Tensor, right: Tensor, rank: int) -> float:
    """The smallest || L^T (W - W') R ||^2 that any W' of this rank has (Eckart-Young), in 50 digits."""
    with mpmath.workdps(50):
        measured = exact_root(left).T * exact(weight) * exact_root(right)
        squares = sorted(mpmath.eigsy(measured.T * measured, eigvals_only=True))
        return float(sum(squares[: len(squares) - rank]))


def error_of(weight: Tensor, cut: Tensor, left: Tensor, right: Tensor) -> float:
    """tr(B D A D^T) in 50 digits."""
    with mpmath.workdps(50):
        difference = exact(weight) - exact(cut)
        product = exact(left) * difference * exact(right) * difference.T
        return float(sum(product[i, i] for i in range(product.rows)))


def product(spectrum: Spectrum, rank: int) -> Tensor:
    left, right = truncate(spectrum, rank)
    return left @ right


WEIGHTS = {
    "random": normal(OUTPUTS, INPUTS),
    "rank one": normal(OUTPUTS, 1) @ normal(1, INPUTS, seed=1),
    "zero": torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64),
    "equal singular values": torch.linalg.qr(normal(OUTPUTS, INPUTS)).Q,
}
STATISTICS = {
    "condition 1e6": spread(1e6, INPUTS),
    "condition 1e12": spread(1e12, INPUTS),
    "repeated": [1.0, 1.0, 1.0, 0.5, 0.5],
    "constant input (rank one)": [1.0, 0.0, 0.0, 0.0, 0.0],
    "one dead direction": [1.0, 0.7, 0.5, 0.3, 0.0],
    "dead input": [0.0] * INPUTS,
}


@pytest.mark.fault(46, 48, 49)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12], ids="scale {:g}".format)
@pytest.mark.parametrize("spectrum", STATISTICS.values(), ids=STATISTICS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_optimum_to_50_digits(weight, spectrum, scale):
    a, b = turned(spectrum, 3) * scale, turned(spread(1e4, OUTPUTS), 4)
    found = decompose(weight, root_of(b), root_of(a))
    assert all(bool(torch.isfinite(part).all()) for part in found)
    size = float(weight.square().sum() * torch.linalg.matrix_norm(a, 2) * torch.linalg.matrix_norm(b, 2))
    for rank in range(INPUTS + 1):
        error = error_of(weight, product(found, rank), b, a)
        assert error <= least_error(weight, b, a, rank) + ALLOWED * size
        if any(spectrum):
            assert float(found.energy[rank:].sum()) == pytest.approx(error, abs=ALLOWED * size)
    full = product(found, INPUTS)
    assert float((full - weight).abs().max()) <= 1e-9 * max(1.0, float(weight.abs().max()))


@pytest.mark.fault(48, 50)
@settings(max_examples=10)
@given(decades=st.floats(0, 12), seed=st.integers(0, 99), rank=st.integers(0, INPUTS))
@example(decades=12.0, seed=1, rank=1)
def test_the_optimum_at_every_condition(decades, seed, rank):
    weight, a = normal(OUTPUTS, INPUTS, seed=seed), turned(spread(10**decades, INPUTS), seed)
    eye = torch.eye(OUTPUTS, dtype=torch.float64)
    error = error_of(weight, product(decompose(weight, None, root_of(a)), rank), eye, a)
    assert error <= least_error(weight, eye, a, rank) + ALLOWED * float(weight.square().sum())


# ---------- every method, on statistics as calibration would measure them


def measured(x: Tensor, g: Tensor) -> Stats:
    pairs = zip(g.split(8), x.split(8), strict=True)
    return Stats(
        tokens=len(x),
        gram=x.mT @ x / len(x),
        mean=x.mean(0),
        mean_abs=x.abs().mean(0),
        output_grad=g.mT @ g / len(g),
        fisher=torch.stack([(a.mT @ b).square() for a, b in pairs]).mean(0),
    )


def cut(name: str, weight: Tensor, stats: Stats, rank: int = 3) -> Tensor:
    method = make_method(name)
    return method.compress(weight, stats, Target(rank=rank, codec="factor")).dense()


X, G, W = normal(64, 12, seed=7), normal(64, 10, seed=8), normal(10, 12, seed=9)
every_method = pytest.mark.parametrize("name", list(METHODS))


@pytest.mark.fault(49)
@every_method
@pytest.mark.parametrize("inputs", [1e-6, 1e6], ids="inputs x {:g}".format)
@pytest.mark.parametrize("gradients", [1e-6, 1e6], ids="gradients x {:g}".format)
def test_scales_of_inputs_and_gradients_change_nothing(name, inputs, gradients):
    plain, scaled = cut(name, W, measured(X, G)), cut(name, W, measured(X * inputs, G * gradients))
    assert float((plain - scaled).abs().max()) <= 1e-8


@pytest.mark.fault(49)
@every_method
@pytest.mark.parametrize("weight", [1e-6, 1e6], ids="weight x {:g}".format)
def test_a_scale_of_the_weight_scales_the_result(name, weight):
    stats = measured(X, G)
    assert float((cut(name, W * weight, stats) / weight - cut(name, W, stats)).abs().max()) <= 1e-8


@pytest.mark.fault(49)
@every_method
def test_one_channel_ten_thousand_times_the_rest(name):
    x = X.clone()
    x[:, 4] *= 1e4
    result = cut(name, W, measured(x, G))
    assert bool(torch.isfinite(result).all())
    if make_method(name).optimal_in_gram:
        kept = (W - result)[:, 4].norm() / W[:, 4].norm()
        assert float(kept) < 1e-3, "the loud channel is what counts"


@pytest.mark.fault(46, 47)
@every_method
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros_like(X), id="dead input"),
        pytest.param(X * (torch.arange(12) != 3), id="one zero column"),
        pytest.param(torch.ones_like(X), id="constant input"),
        pytest.param(X[:1], id="one token"),
        pytest.param(X[:5], id="fewer tokens than inputs"),
    ],
)
def test_degenerate_inputs_give_finite_results_and_full_rank_the_weight(name, x):
    stats = measured(x, G[: len(x)])
    assert bool(torch.isfinite(cut(name, W, stats)).all())
    assert float((cut(name, W, stats, rank=10) - W).abs().max()) <= 1e-4


@pytest.mark.fault(46)
def test_on_the_live_subspace_the_result_is_exact():
    """Inputs that live in three dimensions are served exactly by rank three, whatever the weight."""
    x = X[:, :3] @ normal(3, 12, seed=5)
    result = cut("svd-llm", W, measured(x, G), rank=3)
    assert float((x @ (W - result).mT).abs().max()) <= 1e-6 * float((x @ W.mT).abs().max())


@pytest.mark.fault(48)
@every_method
@pytest.mark.parametrize("weight", [torch.zeros_like(W), normal(10, 1) @ normal(1, 12, seed=1)], ids=["zero", "rank 1"])
def test_degenerate_weights_come_back_exactly(name, weight):
    assert float((cut(name, weight, measured(X, G)) - weight).abs().max()) <= 1e-6


# ---------- sums over many tokens


@pytest.mark.fault(50)
def test_squares_that_overflow_float16_are_summed_all_the_same():
    rows = torch.full((8, 3), 300.0, dtype=torch.float16)
    assert math.isinf(float(rows[0, 0] * rows[0, 0]))
    total = torch.zeros(3, 3, dtype=torch.float64)
    add_gram(total, rows)
    assert torch.equal(total, torch.full((3, 3), 8 * 90_000.0, dtype=torch.float64))


@pytest.mark.fault(50)
def test_a_hundred_million_tokens_lose_no_token():
    """A float32 sum stops growing at 2^24; 1e8 tokens are simulated by a sum that holds that many already."""
    total = torch.full((1, 1), 1e8, dtype=torch.float64)
    add_gram(total, torch.ones(5, 1))
    assert float(total) == 1e8 + 5
    assert float(torch.tensor(1e8).float() + 5) != 1e8 + 5


@pytest.mark.fault(50)
@given(seed=st.integers(0, 99), decades=st.integers(0, 4))
def test_a_gram_matrix_is_the_float64_one(seed, decades):
    rows = (normal(300, 6, seed=seed) * torch.logspace(0, decades, 6, dtype=torch.float64)).float()
    total = torch.zeros(6, 6, dtype=torch.float64)
    for part in rows.split(37):
        add_gram(total, part)
    exactly = rows.double().mT @ rows.double()
    size = exactly.diagonal().sqrt()
    assert float(((total - exactly) / torch.outer(size, size)).abs().max()) <= 1e-5


def test_the_oracle_is_sensitive():
    """A result that is not optimal is caught: the components of the plain SVD, in a metric that is not plain."""
    a, eye = turned(spread(1e4, INPUTS), 3), torch.eye(OUTPUTS, dtype=torch.float64)
    weight = WEIGHTS["random"]
    plain = error_of(weight, product(decompose(weight), 2), eye, a)
    assert plain > least_error(weight, eye, a, 2) + 1e-4
