"""Factors in the coordinates of a metric: the same weight, the same function, and a Hessian near the identity."""

import pytest
import torch

from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import root_of
from spectrim.nn.spectral import ALIGNED, SpectralLinear


def covariance(size: int, generator: torch.Generator) -> torch.Tensor:
    """Spread over four decades."""
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (q * torch.logspace(0, -4, size, dtype=torch.float64)) @ q.T


def layer(rank: int = 5, *, metric: bool = True, bias: bool = True):
    g = torch.Generator().manual_seed(rank)
    factors = Factors(
        torch.randn(13, rank, generator=g, dtype=torch.float64), torch.randn(rank, 9, generator=g, dtype=torch.float64)
    )
    roots = (root_of(covariance(13, g)), root_of(covariance(9, g))) if metric else (None, None)
    b = torch.randn(13, generator=g) if bias else None
    return factors, b, roots, SpectralLinear(factors, b, *roots)


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_the_weight_and_the_function_stay(rank, metric):
    factors, bias, _, module = layer(rank, metric=metric)
    weight = factors.left @ factors.right
    back, back_bias = module.trained()
    assert back.left.shape == (13, rank)
    assert back.right.shape == (rank, 9)
    assert torch.allclose(back.left @ back.right, weight, atol=1e-4 * float(weight.abs().max()))
    assert torch.allclose(back_bias.float(), bias, atol=1e-6)
    x = torch.randn(2, 3, 9)
    assert torch.allclose(module(x), x @ weight.float().T + bias, atol=2e-3)


def test_entries_have_size_one_and_the_padding_stays_zero():
    _, _, _, module = layer(5)
    assert module.U.shape == (13, ALIGNED)
    assert float(module.U.detach()[:, :5].square().mean()) == pytest.approx(1.0, rel=1e-4)
    assert float(module.V.detach()[:5].square().mean()) == pytest.approx(1.0, rel=1e-4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, eps=1e-12)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
    assert not module.U[:, 5:].any()
    assert not module.V[5:].any()


def test_in_the_coordinates_the_loss_of_an_error_is_its_size():
    """1/2 tr(B dW A dW^T) of an error dU V equals 1/2 |dU V|^2 in the scaled coordinates."""
    _, _, (left, right), module = layer(5)
    step = torch.randn(13, ALIGNED, generator=torch.Generator().manual_seed(1))
    before, _ = module.trained()
    with torch.no_grad():
        module.U += 0.1 * step
    after, _ = module.trained()
    error = after.left @ after.right - before.left @ before.right
    loss = (left.root.T @ error @ right.root).square().sum()
    scaled = (0.1 * step[:, :5].double() * module.left_scale) @ (module.V[:5].detach().double() * module.right_scale)
    assert float(loss) == pytest.approx(float(scaled.square().sum()), rel=1e-3)


def test_a_layer_of_zeros_and_a_bias_of_zeros_are_taken():
    module = SpectralLinear(Factors(torch.zeros(4, 2).double(), torch.zeros(2, 3).double()), torch.zeros(4))
    x = torch.randn(5, 3)
    assert not module(x).any()
    assert all(torch.isfinite(p).all() for p in module.parameters())
