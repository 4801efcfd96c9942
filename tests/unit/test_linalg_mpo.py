"""Matrix product operators against the definition, closed forms, a slow oracle and tensorly."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spectrim.linalg.mpo import (
    Sites,
    balanced_factors,
    bonds_of,
    cheapest_order,
    contract,
    core_shapes,
    even,
    from_mpo,
    full_bond,
    largest_bond,
    mpo_numbers,
    products,
    sites_of,
    to_mpo,
)

ORDERS = ("from the left", "from the right", "by the weight")
CASES = [
    (Sites((4, 3), (2, 5)), 3),
    (Sites((2, 3, 2), (3, 2, 2)), 4),
    (Sites((2, 2, 2, 3), (2, 3, 1, 2)), 5),
    (Sites((7,), (5,)), 1),
    (Sites((1, 6), (6, 1)), 2),
]
every_case = pytest.mark.parametrize(("sites", "chi"), CASES)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(sites: Sites, seed: int = 0) -> Tensor:
    return normal(seed, math.prod(sites.outputs), math.prod(sites.inputs))


def slow_weight(cores: list[Tensor]) -> Tensor:
    """Entry by entry: a product of small matrices, one a site."""
    outputs, inputs = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    weight = torch.zeros(math.prod(outputs), math.prod(inputs), dtype=torch.float64)
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            entry, o, i = torch.ones(1, 1, dtype=torch.float64), row, column
            for site in reversed(range(len(cores))):
                o, here_o = divmod(o, outputs[site])
                i, here_i = divmod(i, inputs[site])
                entry = cores[site][:, here_o, here_i] @ entry
            weight[row, column] = entry[0, 0]
    return weight


@every_case
def test_reconstruction_equals_the_slow_oracle(sites, chi):
    cores = to_mpo(weight_of(sites), sites, chi)
    assert torch.allclose(from_mpo(cores), slow_weight(cores), rtol=0, atol=1e-12)


@every_case
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_contraction_equals_reconstruction(sites, chi, order, tokens):
    cores, x = to_mpo(weight_of(sites), sites, chi), normal(5, tokens, math.prod(sites.inputs))
    assert torch.allclose(contract(x, cores, order), x @ from_mpo(cores).mT, rtol=0, atol=1e-12)
    single = [core.float() for core in cores]
    wide = contract(x.float(), single, order).double()
    assert torch.allclose(wide, x @ from_mpo(cores).mT, rtol=0, atol=1e-4)


@every_case
def test_the_full_bond_gives_the_weight_back(sites, chi):
    weight = weight_of(sites)
    assert torch.allclose(from_mpo(to_mpo(weight, sites, full_bond(sites))), weight, rtol=0, atol=1e-10)


def test_a_chain_of_one_bond_is_the_kronecker_product_it_was_made_of():
    """Two sites at bond chi hold sums of chi Kronecker products exactly (Van Loan and Pitsianis)."""
    pairs = [(normal(seed, 3, 4), normal(seed + 9, 5, 2)) for seed in range(2)]
    weight = torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0)
    sites = Sites((3, 5), (4, 2))
    assert torch.allclose(from_mpo(to_mpo(weight, sites, 2)), weight, rtol=0, atol=1e-10)
    lost = (weight - from_mpo(to_mpo(weight, sites, 1))).square().sum()
    assert lost > 1e-3 * weight.square().sum()


def test_two_sites_are_the_truncated_svd_of_the_rearranged_weight():
    sites, chi = Sites((4, 3), (2, 5)), 3
    weight = weight_of(sites)
    rearranged = torch.stack(
        [weight.view(4, 3, 2, 5)[o, :, i].flatten() for o in range(4) for i in range(2)]
    )  # (o1 i1, o2 i2)
    optimum = torch.linalg.svdvals(rearranged)[chi:].square().sum()
    lost = (weight - from_mpo(to_mpo(weight, sites, chi))).square().sum()
    assert float(lost) == pytest.approx(float(optimum), rel=1e-10)


def test_sites_without_inputs_or_outputs_of_their_own_are_a_low_rank_matrix():
    """(O, 1) and (1, I): the bond is the rank, and the error that of the truncated SVD."""
    weight = normal(3, 9, 7)
    found = from_mpo(to_mpo(weight, Sites((9, 1), (1, 7)), 4))
    assert float((weight - found).square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(weight)[4:].square().sum()), rel=1e-10
    )


@every_case
def test_a_larger_bond_is_never_worse(sites, chi):
    weight = weight_of(sites)
    found = [from_mpo(to_mpo(weight, sites, c)) for c in range(1, full_bond(sites) + 1)]
    errors = [float((weight - f).square().sum()) for f in found]
    assert all(b <= a * (1 + 1e-9) + 1e-18 for a, b in pairwise(errors))
    assert errors[-1] < 1e-15 * float(weight.square().sum())


@every_case
def test_counts_are_those_of_the_cores(sites, chi):
    cores = to_mpo(weight_of(sites), sites, chi)
    assert [tuple(core.shape) for core in cores] == core_shapes(sites, chi)
    assert sum(core.numel() for core in cores) == mpo_numbers(sites, chi)
    assert bonds_of(sites, chi)[0] == bonds_of(sites, chi)[-1] == 1
    numbers = mpo_numbers(sites, chi)
    assert mpo_numbers(sites, largest_bond(sites, numbers)) == numbers
    assert largest_bond(sites, mpo_numbers(sites, 1) - 1) == 0
    assert largest_bond(sites, 10**9) == full_bond(sites)


def test_the_largest_bond_equals_a_search_by_hand():
    sites = Sites((4, 3, 2), (2, 5, 3))
    for numbers in range(0, mpo_numbers(sites, full_bond(sites)) + 5, 7):
        fits = [chi for chi in range(1, full_bond(sites) + 1) if mpo_numbers(sites, chi) <= numbers]
        assert largest_bond(sites, numbers) == max(fits, default=0)


def test_factors_are_whole_and_balanced():
    assert balanced_factors(384, 2) == (16, 24)
    assert balanced_factors(1024, 2) == (32, 32)
    assert balanced_factors(384, 3) == (6, 8, 8)
    assert balanced_factors(13, 2) == (1, 13)
    assert balanced_factors(1, 3) == (1, 1, 1)
    for number in range(1, 200):
        for count in (1, 2, 3, 4):
            assert math.prod(balanced_factors(number, count)) == number
    assert sites_of(384, 384, 2) == Sites((16, 24), (24, 16))


def test_cores_are_of_a_like_scale():
    """Left alone, all of the weight's size would be in the last core, and one learning rate would fit none."""
    cores = to_mpo(1e4 * weight_of(CASES[1][0]), *CASES[1])
    norms = [float(core.norm()) for core in cores]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-9)
    assert torch.allclose(from_mpo(even([2 * cores[0], *cores[1:]])), 2 * from_mpo(cores), rtol=0, atol=1e-8)


def test_a_weight_of_zeros_and_one_of_low_rank_give_finite_cores():
    sites = CASES[1][0]
    for weight in (weight_of(sites) * 0, torch.outer(normal(1, 12), normal(2, 12))):
        cores = to_mpo(weight, sites, 6)
        assert all(bool(torch.isfinite(core).all()) for core in cores)
        assert torch.allclose(from_mpo(cores), weight, rtol=0, atol=1e-9)


def test_the_cheapest_order_has_the_fewest_multiplications_counted_by_hand():
    sites, chi = Sites((4, 8), (8, 4)), 3
    one = products(sites, chi, 1)
    assert one["from the left"] == 4 * (8 * 4 * 3) + 4 * (3 * 4 * 8)  # 4 inputs left, then 4 outputs done
    assert one["from the right"] == 8 * (4 * 3 * 8) + 8 * (8 * 3 * 4)
    assert one["by the weight"] == 32 * 3 * 32 + 32 * 32
    assert cheapest_order(sites, chi, 1) == "from the left"
    assert cheapest_order(Sites((8, 4), (4, 8)), chi, 1) == "from the right"
    assert cheapest_order(Sites((16, 24), (24, 16)), 88, 4096) == "by the weight"


@pytest.mark.parametrize(
    ("sites", "chi"), [case for case in CASES if len(case[0].outputs) > 1]
)  # it has no shorter chain
def test_tensorly_finds_the_same(sites, chi):
    tensorly = pytest.importorskip("tensorly", reason="tensorly is not installed")
    from tensorly.decomposition import tensor_train_matrix

    tensorly.set_backend("numpy")
    weight = weight_of(sites)
    found = tensor_train_matrix(weight.reshape(*sites.outputs, *sites.inputs).numpy(), rank=list(bonds_of(sites, chi)))
    theirs = torch.from_numpy(found.to_matrix().copy())
    assert torch.allclose(from_mpo(to_mpo(weight, sites, chi)), theirs, rtol=0, atol=1e-9)
