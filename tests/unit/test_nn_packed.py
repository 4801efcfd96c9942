"""Packed layers: every base, with and without a correction, gives the dense product from documented tensors."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg.factor import Factors
from spectrim.linalg.normal_float import Form, from_normal, round_to_normal
from spectrim.linalg.quantise import BITS, dequantise, round_to_nearest
from spectrim.linalg.sparse24 import from_half, to_half, two_of_four
from spectrim.nn.packed import CorrectionLinear, PackedLinear
from spectrim.nn.stores import PlainStore, Store
from spectrim.nn.stores_half import HalfStore
from spectrim.nn.stores_normal import NormalStore
from spectrim.nn.stores_uniform import UniformStore

OUTPUTS, INPUTS, RANK = 12, 16, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(matrix: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Store, Tensor]:
    rounded = round_to_nearest(matrix, bits, 4, symmetric=symmetric)
    return UniformStore.holding(rounded, bits=bits, group_size=4, dtype=dtype), dequantise(rounded, bits)


def store(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Store, Tensor]:
    """A store, and the weight (float64) that it stands for."""
    weight = normal(1, OUTPUTS, INPUTS).to(torch.bfloat16).double()
    if kind == "plain":
        return PlainStore.holding(weight.to(dtype)), weight
    if kind.startswith("normal"):
        form = Form(bits=int(kind[-1]), block=5, scale_bits=3, scale_block=7)  # neither divides
        rounded = round_to_normal(weight, form)
        return NormalStore.holding(rounded, form, dtype=dtype), from_normal(rounded, form, torch.float64)
    if not kind.startswith("half"):
        return uniform(weight, int(kind[0]), kind.endswith("sym"), dtype)
    half = to_half(weight, two_of_four(weight.abs()))
    if kind == "half":
        return HalfStore.holding(PlainStore.holding(half.values.to(dtype)), half.places), from_half(half)
    values, dense = uniform(half.values, 4, True, dtype)
    return HalfStore.holding(values, half.places), from_half(half._replace(values=dense))


KINDS = [
    "plain",
    "half",
    "half 4",
    *(f"normal {bits}" for bits in BITS),
    *(f"{bits} {sign}" for bits, sign in product(BITS, ("sym", "zeros"))),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
with_and_without = pytest.mark.parametrize("rank", [0, RANK])


def layer(
    kind: str, rank: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[PackedLinear, Tensor, Tensor]:
    """A layer, its weight and its bias in float64."""
    base, weight = store(kind, dtype)
    factors = Factors(
        *(normal(s, *shape).to(torch.bfloat16).double() for s, shape in ((2, (OUTPUTS, rank)), (3, (rank, INPUTS))))
    )
    added = normal(4, OUTPUTS).to(torch.bfloat16).double()
    made = PackedLinear.holding(base, factors if rank else None, added if bias else None, dtype=dtype)
    return made, weight + factors.left @ factors.right, added if bias else torch.zeros(OUTPUTS).double()


@every_kind
@with_and_without
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_forward_is_the_dense_product(kind, rank, shape):
    made, weight, bias = layer(kind, rank)
    x = normal(5, *shape, INPUTS)
    torch.testing.assert_close(made(x.float()).double(), x @ weight.mT + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.dense_weight().double(), weight, rtol=1e-6, atol=1e-6)


@every_kind
@with_and_without
@pytest.mark.parametrize("bias", [True, False])
def test_it_comes_back_from_its_entry_and_its_tensors(kind, rank, bias):
    made, _, _ = layer(kind, rank, bias=bias)
    entry = made.entry()
    again = PackedLinear.from_entry(INPUTS, OUTPUTS, entry)
    stored = {key: tuple(t.shape) for key, t in made.state_dict().items() if key != "weight"}
    assert stored == made.shapes() == again.shapes()
    again.load_state_dict(made.state_dict())
    again.after_load()
    assert torch.equal(again.dense_weight(), made.dense_weight())
    assert again.entry() == entry
    assert (again.bias is not None) == bias == made.has_bias


@every_kind
def test_it_stays_packed_in_memory(kind):
    """Nothing of the size of the dense weight is left behind by a forward pass."""
    made, _, _ = layer(kind, 0, bias=False)
    before = {key: t.shape for key, t in made.state_dict().items()}
    made(torch.zeros(2, INPUTS))
    assert {key: t.shape for key, t in made.state_dict().items()} == before
    held = sum(t.nbytes for t in [*made.parameters(), *made.buffers()])
    assert held == sum(t.nbytes for t in made.state_dict().values())
    if kind not in ("plain",):
        assert held < OUTPUTS * INPUTS * 4


@every_kind
def test_casting_leaves_codes_alone_and_loses_nothing(kind):
    made, weight, _ = layer(kind, 0)
    narrow = copy.deepcopy(made).to(torch.bfloat16)
    codes = {key: t for key, t in narrow.state_dict().items() if not t.is_floating_point()}
    assert all(torch.equal(t, made.state_dict()[key]) for key, t in codes.items())
    torch.testing.assert_close(narrow.dense_weight().double(), weight, rtol=1e-6, atol=1e-6)
    assert narrow(torch.ones(1, INPUTS, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_reach_inputs_scales_and_factors_and_no_code():
    made, weight, _ = layer("4 zeros", RANK)
    x = torch.ones(1, INPUTS, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0].double(), weight.sum(0), rtol=1e-5, atol=1e-5)
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {
        "base.scales",
        "U.weight",
        "V.weight",
        "bias",
    }


def test_bytes_are_those_of_the_file_in_16_bits():
    made, _, _ = layer("3 zeros", RANK, dtype=torch.bfloat16)
    assert made.counted_bytes == sum(t.nbytes for t in made.state_dict().values())
    assert layer("3 zeros", RANK)[0].counted_bytes == made.counted_bytes


GOOD: dict[str, Any] = {
    "codec": "packed",
    "rank": OUTPUTS,
    "bias": False,
    "correction": 2,
    "base": {"kind": "uniform", "bits": 3, "group_size": 8, "symmetric": False},
}
HALF = {"kind": "half", "values": {"kind": "plain"}}
NORMAL = {"kind": "normal", "bits": 3, "block": 8, "scale_bits": 4, "scale_block": 64}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 3}, "has rank 12"),
        ({"correction": -1}, "correction -1; it must be a rank from 0 to 12"),
        ({"correction": 13}, "from 0 to 12"),
        ({"correction": True}, "correction True"),
        ({"correction": None}, "correction None"),
        ({"base": None}, "its kind must be one of plain, uniform, "),
        ({"base": {"kind": "pickle"}}, "its kind must be one of"),
        ({"base": {"kind": ["uniform"]}}, "its kind must be one of"),
        ({"base": {**GOOD["base"], "bits": 5}}, "bits 5; it must be one of 2, 3, 4, 8"),
        ({"base": {**GOOD["base"], "bits": "3"}}, "bits '3'"),
        ({"base": {**GOOD["base"], "bits": True}}, "bits True"),
        ({"base": {**GOOD["base"], "group_size": 5}}, "must divide the 16 inputs"),
        ({"base": {**GOOD["base"], "group_size": -8}}, "must divide the 16 inputs"),
        ({"base": {**GOOD["base"], "group_size": 10**12}}, "must divide the 16 inputs"),
        ({"base": {**GOOD["base"], "symmetric": 1}}, "symmetric 1"),
        ({"base": {"kind": "half"}}, "its kind must be one of"),
        ({"base": {"kind": "half", "values": {**GOOD["base"], "group_size": 16}}}, "must divide the 8 inputs"),
        ({"base": {**NORMAL, "bits": 5}}, "bits 5; it must be one of 2, 3, 4, 8"),
        ({"base": {**NORMAL, "bits": True}}, "bits True"),
        ({"base": {**NORMAL, "scale_bits": 16}}, "scale_bits 16; it must be one of"),
        ({"base": {**NORMAL, "scale_bits": None}}, "scale_bits None"),
        ({"base": {**NORMAL, "block": 0}}, "block 0; it must be a number from 1 to 16"),
        ({"base": {**NORMAL, "block": 17}}, "from 1 to 16"),
        ({"base": {**NORMAL, "block": "8"}}, "block '8'"),
        ({"base": {**NORMAL, "scale_block": 193}}, "scale_block 193; it must be a number from 1 to 192"),
        ({"base": {**NORMAL, "scale_block": -1}}, "scale_block -1"),
    ],
)
def test_an_entry_that_fits_no_layer_is_refused(change, said):
    assert PackedLinear.from_entry(INPUTS, OUTPUTS, GOOD).correction == 2
    with pytest.raises(ValueError, match=said):
        PackedLinear.from_entry(INPUTS, OUTPUTS, {**GOOD, **change}, device="meta")


def test_nested_stores_are_read_and_endless_ones_refused_by_their_shape():
    assert PackedLinear.from_entry(INPUTS, OUTPUTS, {**GOOD, "base": HALF}).base.entry() == HALF
    quarter = {"kind": "half", "values": HALF}
    assert PackedLinear.from_entry(INPUTS, OUTPUTS, {**GOOD, "base": quarter}).base.inputs == INPUTS
    with pytest.raises(ValueError, match="no whole fours"):
        PackedLinear.from_entry(
            INPUTS, OUTPUTS, {**GOOD, "base": {"kind": "half", "values": {"kind": "half", "values": quarter}}}
        )


def test_places_that_no_pruning_makes_are_refused():
    made, _, _ = layer("half", 0)
    made.after_load()
    made.state_dict()["base.places"][3, 0] = 0
    with pytest.raises(ValueError, match="at one place, or out of order"):
        made.after_load()


# ---------- training of the correction alone


@every_kind
def test_a_correction_in_training_is_the_layer_and_goes_back_into_it(kind):
    made, weight, bias = layer(kind, RANK)
    training = CorrectionLinear(made)
    assert [name for name, _ in training.named_parameters()] == ["U.unit", "V.unit"]
    x = normal(6, 4, INPUTS)
    torch.testing.assert_close(training(x.float()).double(), x @ weight.mT + bias, rtol=1e-5, atol=1e-5)
    training(x.float()).square().sum().backward()
    with torch.no_grad():
        for parameter in training.parameters():
            assert parameter.grad is not None
            parameter -= 0.01 * parameter.grad / parameter.grad.abs().max()
    again = training.stored(made)
    torch.testing.assert_close(again(x.float()), training(x.float()), rtol=1e-5, atol=1e-5)
    assert again.base is made.base
    assert again.entry() == made.entry()
    assert not torch.allclose(again(x.float()), made(x.float()), atol=1e-6)


def test_a_correction_that_starts_at_zero_can_move():
    """Its scale is that at which it would be as large as the base; a scale of 0 or 1 would not train."""
    base, _ = store("4 sym")
    factors = Factors(torch.zeros(OUTPUTS, RANK), normal(3, RANK, INPUTS).float())
    training = CorrectionLinear(PackedLinear.holding(base, factors, None, dtype=torch.float32))
    with torch.no_grad():
        training.U.unit.normal_(generator=torch.Generator().manual_seed(0))
    added = (training.U() @ training.V()).detach()
    assert 0.5 < float(added.square().mean().sqrt() / training.base.square().mean().sqrt()) < 2
