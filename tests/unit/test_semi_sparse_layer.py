"""Layers stored as atoms and a semi-sparse matrix: what they compute, what is refused, how they train."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg.metric import root_of
from spectrim.linalg.semi_sparse import SemiSparse, Size, largest, pack_bits
from spectrim.nn.semi_sparse import LatentLinear, SemiSparseLinear

SIZE = Size(9, 4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found() -> SemiSparse:
    sparse = normal(0, 20, 9)
    return SemiSparse(sparse * largest(normal(1, 20, 9), 4), normal(2, 9, 13))


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> SemiSparseLinear:
    return SemiSparseLinear.from_factors(found(), SIZE, normal(3, 20) if bias else None, torch.zeros(1, dtype=dtype))


def entry(**changes: Any) -> dict[str, Any]:
    return {"codec": "semi-sparse", "rank": 9, "bias": False, "nonzeros": 4, **changes}


def metric():
    x = normal(7, 40, 13) @ normal(8, 13, 13)
    return root_of((x.mT @ x / 40).double())


def test_it_computes_the_product_it_was_made_of():
    own, x = layer(), normal(5, 2, 3, 13)
    assert torch.equal(own.sparse(), found().sparse)
    assert torch.allclose(own.dense_weight(), found().sparse @ found().atoms, atol=1e-5)
    assert torch.allclose(own(x), torch.nn.functional.linear(x, own.dense_weight(), own.bias), atol=1e-4)


def test_values_that_happen_to_be_zero_keep_their_place():
    """A row with fewer nonzeros than s still marks s of them: the file's shape does not depend on the values."""
    sparse = found().sparse.clone()
    sparse[3] = 0
    own = SemiSparseLinear.from_factors(SemiSparse(sparse, found().atoms), SIZE, None, torch.zeros(1))
    assert torch.equal(own.sparse(), sparse)
    assert own.shapes()["values"] == (20, 4)


def test_numbers_are_counted_with_the_support():
    own = layer()
    assert own.numbers == 9 * 13 + 20 * 4 + 12 + 20  # ceil(20 * 9 / 16) = 12 words
    assert {k: tuple(t.shape) for k, t in own.state_dict().items() if t.numel()} == own.shapes()


def test_an_entry_makes_the_same_layer_again():
    own = layer()
    again = SemiSparseLinear.from_entry(13, 20, own.entry())
    again.load_state_dict(own.state_dict())
    again.after_load()
    assert again.entry() == own.entry()
    assert torch.equal(again.dense_weight(), own.dense_weight())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 21}, "rank 21; the layer has 20 outputs"),
        ({"nonzeros": 10}, "from 1 to the 9 atoms"),
        ({"nonzeros": 0}, "from 1 to the 9 atoms"),
        ({"nonzeros": 4.0}, "from 1 to the 9 atoms"),
        ({"nonzeros": True}, "from 1 to the 9 atoms"),
        ({"nonzeros": None}, "from 1 to the 9 atoms"),
    ],
)
def test_entries_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        SemiSparseLinear.from_entry(13, 20, entry(**changes), device="meta")


def test_a_support_that_does_not_fit_is_refused():
    own = layer()
    mask = largest(normal(1, 20, 9), 4)
    mask[5, int((~mask[5]).nonzero()[0])] = True
    own.support.copy_(pack_bits(mask))
    with pytest.raises(ValueError, match="marks 5 entries in row 5, every row has 4"):
        own.after_load()
    own.support.fill_(-1)
    with pytest.raises(ValueError, match="damaged file"):
        own.after_load()


def test_half_precision_stays_half_precision():
    own = layer(dtype=torch.bfloat16)
    assert own(normal(2, 3, 13).bfloat16()).dtype == torch.bfloat16
    assert own.support.dtype == torch.int16
    assert own.dense_weight().dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_in_training_form_it_is_the_same_layer(bias):
    own = layer(bias=bias)
    latent, x = LatentLinear(own, metric()), normal(5, 6, 13)
    assert torch.allclose(latent(x), own(x), atol=1e-3)
    again = latent.stored(own)
    assert torch.equal(again.support, own.support)
    assert torch.allclose(again.dense_weight(), own.dense_weight(), atol=1e-4)


def test_the_gradient_of_the_cut_passes_to_all_of_the_latent():
    """Straight through: the latent's gradient is that of a dense S at the value of the cut one."""
    own = layer(bias=False)
    latent, x, target = LatentLinear(own, metric()), normal(5, 6, 13), normal(6, 6, 20)
    (latent(x) - target).square().sum().backward()
    dense = found().sparse.clone().requires_grad_(True)
    (x @ (dense @ found().atoms).mT - target).square().sum().backward()
    assert dense.grad is not None
    gradient = latent.latent.unit.grad
    assert gradient is not None
    assert torch.allclose(gradient / latent.latent.scale, dense.grad, rtol=1e-2, atol=2e-2)
    assert bool((gradient[~latent.support] != 0).all())
    assert torch.equal(latent.cut()[~latent.support], torch.zeros(20 * 5))  # in value


def test_the_support_changes_when_it_is_chosen_anew_and_only_then():
    own = layer()
    latent = LatentLinear(own, metric())
    outside = int((~latent.support[0]).nonzero()[0])
    with torch.no_grad():
        latent.latent.unit[0, outside] = 100.0
    assert float(latent.cut().detach()[0, outside]) == 0
    assert latent.reselect() == 1
    assert float(latent.cut().detach()[0, outside]) != 0
    assert torch.equal(latent.support.sum(1), torch.full((20,), 4))
    assert latent.reselect() == 0
    assert not torch.equal(latent.stored(own).support, own.support)
