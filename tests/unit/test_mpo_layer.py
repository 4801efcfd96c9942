"""Layers stored as matrix product operators: what they compute, which entries are refused, how they train."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg.mpo import Sites, cheapest_order, full_bond, to_mpo
from spectrim.nn.codecs import codec_class
from spectrim.nn.mpo import ChainLinear, MPOLinear

SITES = Sites((4, 6), (5, 3))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(chi: int = 5, *, sites: Sites = SITES, bias: bool = True, dtype: torch.dtype = torch.float32) -> MPOLinear:
    outputs, inputs = torch.tensor(sites.outputs).prod(), torch.tensor(sites.inputs).prod()
    weight = normal(0, int(outputs), int(inputs))
    given = normal(1, int(outputs)) if bias else None
    return MPOLinear.from_cores(to_mpo(weight.double(), sites, chi), chi, given, weight.to(dtype))


def entry(**changes: Any) -> dict[str, Any]:
    return {"codec": "mpo", "rank": 3, "bias": False, "outputs": [4, 6], "inputs": [5, 3], **changes}


@pytest.mark.parametrize("tokens", [1, 2, 500])
@torch.no_grad()
def test_few_tokens_are_contracted_and_many_are_multiplied_and_both_are_the_weight(tokens):
    """To 1e-6 of the outputs' size."""
    own = layer()
    x = normal(2, tokens, 15)
    assert (cheapest_order(SITES, 5, tokens) == "by the weight") == (tokens == 500)
    expected = x.double() @ own.dense_weight().double().mT + own.bias.double()
    assert float((own(x).double() - expected).norm() / expected.norm()) < 1e-6


def test_any_leading_shape_and_no_tokens_at_all():
    own = layer()
    x = normal(2, 2, 7, 15)
    assert torch.allclose(own(x)[1, 3], own(x[1, 3]), atol=1e-5)
    assert own(x[:0]).shape == (0, 7, 24)  # an expert that no token came to


def test_the_full_bond_is_the_dense_layer():
    own = layer(full_bond(SITES), bias=False)
    assert torch.allclose(own.dense_weight(), normal(0, 24, 15), atol=1e-5)


def test_an_entry_makes_the_same_layer_again():
    own = layer()
    again = MPOLinear.from_entry(15, 24, {**own.entry(), "codec": "mpo"})
    assert again.entry() == own.entry() == entry(rank=5, bias=True)
    again.load_state_dict(own.state_dict())
    assert torch.equal(again.dense_weight(), own.dense_weight())
    assert {k: tuple(t.shape) for k, t in own.state_dict().items() if t.numel()} == own.shapes()
    assert codec_class("mpo") is MPOLinear


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 19}, "rank 19; .* bonds of at most 18"),
        ({"outputs": None}, "expected up to 8 factors of 24"),
        ({"outputs": "46"}, "expected up to 8 factors of 24"),
        ({"outputs": [4, 5]}, "expected up to 8 factors of 24"),
        ({"outputs": [4.0, 6]}, "expected up to 8 factors of 24"),
        ({"outputs": [True, 24]}, "expected up to 8 factors of 24"),
        ({"outputs": [-4, -6]}, "expected up to 8 factors of 24"),
        ({"outputs": [10**30, 6]}, "expected up to 8 factors of 24"),
        ({"inputs": [1] * 9 + [15]}, "expected up to 8 factors of 15"),
        ({"inputs": [15]}, "2 factors of the outputs and 1 of the inputs"),
    ],
)
def test_entries_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        MPOLinear.from_entry(15, 24, entry(**changes), device="meta")


def test_half_precision_stays_half_precision():
    own = layer(dtype=torch.bfloat16)
    assert own(normal(2, 3, 15).bfloat16()).dtype == torch.bfloat16
    assert own.dense_weight().dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_in_training_form_it_is_the_same_layer(bias):
    own = layer(bias=bias)
    chain = ChainLinear(own)
    x = normal(2, 9, 15)
    assert torch.allclose(chain(x), own(x), atol=1e-5)
    again = chain.stored(own)
    assert again.entry() == own.entry()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(again.parameters(), own.parameters(), strict=True))
    sizes = [float(p.detach().square().mean().sqrt()) for p in chain.parameters()]
    assert sizes == pytest.approx([1.0] * len(sizes), rel=1e-5)
    assert len(sizes) == 2 + bias


def test_training_reaches_all_cores_and_the_bias():
    own = layer()
    chain = ChainLinear(own)
    target = normal(3, 9, 24)
    x = normal(2, 9, 15)
    before = float((own(x) - target).detach().square().sum())
    optimizer = torch.optim.Adam(chain.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        (chain(x) - target).square().sum().backward()
        assert all(bool((p.grad != 0).any()) for p in chain.parameters())
        optimizer.step()
    assert float((chain.stored(own)(x) - target).detach().square().sum()) < 0.5 * before
