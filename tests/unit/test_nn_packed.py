"""Packed layers: every base, with and without a correction, gives the dense product from documented tensors."""

import copy
import re
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg.bilevel import BilevelRule
from spectrim.linalg.codebook import fit_codebook, from_codebook
from spectrim.linalg.columns import solve_columns
from spectrim.linalg.factor import Factors
from spectrim.linalg.groups import Groups, from_groups
from spectrim.linalg.normal_float import Form, from_normal, round_to_normal
from spectrim.linalg.outliers import entries_at, to_gaps, with_entries
from spectrim.linalg.quantise import BITS, dequantise, round_to_nearest
from spectrim.linalg.sparse24 import from_half, to_half, two_of_four
from spectrim.nn.packed import PackedLinear, TrainedPackedLinear
from spectrim.nn.stores import STORES, PlainStore, Store
from spectrim.nn.stores_bilevel import BilevelStore
from spectrim.nn.stores_codebook import CodebookStore
from spectrim.nn.stores_corrected import CorrectedStore
from spectrim.nn.stores_groups import GroupStore
from spectrim.nn.stores_half import HalfStore
from spectrim.nn.stores_normal import NormalStore
from spectrim.nn.stores_outliers import OutlierStore
from spectrim.nn.stores_uniform import UniformStore

OUTPUTS, INPUTS, RANK = 12, 16, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(matrix: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Store, Tensor]:
    rounded = round_to_nearest(matrix, bits, 4, symmetric=symmetric)
    return UniformStore.holding(rounded, bits=bits, group_size=4, dtype=dtype), dequantise(rounded, bits)


def codebook(matrix: Tensor, bits: int, dtype: torch.dtype) -> tuple[Store, Tensor]:
    book = fit_codebook(matrix, torch.ones_like(matrix), bits)
    return CodebookStore.holding(book, bits=bits, dtype=dtype), from_codebook(book)


def bilevel(matrix: Tensor, rows: int, dtype: torch.dtype) -> tuple[Store, Tensor]:
    rule = BilevelRule(matrix, 3, 4, statistic_bits=2, rows=rows)
    dense = solve_columns(matrix, torch.eye(INPUTS, dtype=matrix.dtype), rule)
    made = BilevelStore.holding(rule.result(), bits=3, group_size=4, statistic_bits=2, rows=rows, dtype=dtype)
    return made, dense


def outliers(inner: str, dtype: torch.dtype) -> tuple[Store, Tensor]:
    rest, dense = store(inner, dtype)
    entries = entries_at(normal(6, OUTPUTS, INPUTS).to(torch.bfloat16).double(), normal(7, OUTPUTS, INPUTS) > 1.2)
    return OutlierStore.holding(rest, entries, dtype=dtype), with_entries(dense, entries)


def corrected(inner: str, dtype: torch.dtype) -> tuple[Store, Tensor]:
    rest, dense = store(inner, dtype)
    (left, whole_left), (right, whole_right) = (
        uniform(normal(seed, 2, size).to(torch.bfloat16).double(), 4, True, dtype)
        for seed, size in ((10, OUTPUTS), (11, INPUTS))
    )
    return CorrectedStore(rest, left, right), dense + whole_left.mT @ whole_right


def groups(bits: int, dtype: torch.dtype) -> tuple[Store, Tensor]:
    mask = normal(8, OUTPUTS, INPUTS // 4) > 0
    values = normal(9, int(mask.sum()), 4).to(torch.bfloat16).double()
    rounded = round_to_nearest(values, bits, 0, symmetric=False)
    kept = UniformStore.holding(rounded, bits=bits, group_size=0, dtype=dtype)
    return GroupStore.holding(kept, mask), from_groups(Groups(dequantise(rounded, bits), mask))


def store(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Store, Tensor]:
    """A store, and the weight (float64) that it stands for."""
    weight = normal(1, OUTPUTS, INPUTS).to(torch.bfloat16).double()
    if kind == "plain":
        return PlainStore.holding(weight.to(dtype)), weight
    if kind.startswith("outliers"):
        return outliers(kind.removeprefix("outliers, "), dtype)
    if kind.startswith("corrected"):
        return corrected(kind.removeprefix("corrected, "), dtype)
    if kind.startswith("bilevel"):
        return bilevel(weight, int(kind.split()[1]), dtype)
    if kind.startswith("groups"):
        return groups(int(kind.split()[1]), dtype)
    if kind.startswith("codebook"):
        return codebook(weight, int(kind.split()[1]), dtype)
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


SINGLE = ["plain", "half", "half 4", *(f"{bits} {sign}" for bits, sign in product(BITS, ("sym", "zeros")))]
SINGLE += [
    "codebook 2",
    "codebook 3",
    "codebook 4",
    "bilevel 4",
    "bilevel 5",
    "groups 3",
    *(f"normal {bits}" for bits in BITS),
]
KINDS = [*SINGLE, *(f"outliers, {kind}" for kind in SINGLE), "corrected, 2 zeros", "corrected, outliers, 3 sym"]
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
    if not kind.endswith(("plain", "half", "codebook 4", "bilevel 4", "bilevel 5")):  # a small layer of large tables
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
BILEVEL = {"kind": "bilevel", "bits": 3, "group_size": 8, "statistic_bits": 3, "rows": 4}
APART = {"kind": "outliers", "entries": 3, "gap_bytes": 3, "inner": BILEVEL}
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
        ({"base": {"kind": "codebook", "bits": 8}}, "bits 8; of a codebook it must be one of 2, 3, 4"),
        ({"base": {"kind": "codebook"}}, "bits None"),
        ({"base": {**BILEVEL, "bits": 7}}, "bits 7; it must be one of 2, 3, 4, 8"),
        ({"base": {**BILEVEL, "statistic_bits": "3"}}, "statistic_bits '3'"),
        ({"base": {**BILEVEL, "group_size": 5}}, "must divide the 16 inputs"),
        ({"base": {**BILEVEL, "rows": 0}}, "rows 0; 1 to 12 rows may share"),
        ({"base": {**BILEVEL, "rows": 10**12}}, "1 to 12 rows may share"),
        ({"base": {**APART, "entries": 0}}, "entries 0; a matrix of 12 x 16 has 1 to 192"),
        ({"base": {**APART, "entries": 193}}, "1 to 192"),
        ({"base": {**APART, "entries": True}}, "entries True"),
        ({"base": {**APART, "gap_bytes": 2}}, "gap_bytes 2; 3 entries of 12 x 16 take 3 to 3"),
        ({"base": {**APART, "gap_bytes": 10**12}}, "gap_bytes 1000000000000"),
        ({"base": {**APART, "gap_bytes": None}}, "gap_bytes None"),
        ({"base": {**APART, "inner": None}}, "its kind must be one of"),
        ({"base": {**APART, "inner": {"kind": "codebook", "bits": 5}}}, "bits 5"),
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


def test_no_entries_apart_leave_the_inner_store():
    rest, dense = store("codebook 3")
    assert OutlierStore.holding(rest, entries_at(dense, dense > 1e9), dtype=torch.float32) is rest


@pytest.mark.parametrize(
    ("positions", "said"),
    [([3, 9], "the gaps lead to 2 entries, 3 are kept apart"), ([3, 9, 192], "behind the last of 12 x 16")],
)
def test_places_that_the_matrix_does_not_have_are_refused(positions, said):
    made = OutlierStore.from_entry(OUTPUTS, INPUTS, APART)
    made.after_load()  # all in a row, at the beginning
    made.gaps = to_gaps(torch.tensor(positions))
    with pytest.raises(ValueError, match=said):
        made.after_load()


def test_a_stream_that_ends_in_a_jump_is_refused():
    made = OutlierStore.from_entry(OUTPUTS, 64, {**APART, "gap_bytes": 5})
    made.gaps = torch.tensor([1, 255, 0, 1, 255], dtype=torch.uint8)
    with pytest.raises(ValueError, match="damaged file"):
        made.after_load()


def test_gradients_reach_tables_second_grids_and_entries_apart():
    for kind, names in {
        "outliers, codebook 3": {"numbers", "inner.table"},
        "groups 3": {"kept.scales"},
        "outliers, bilevel 4": {"numbers", *(f"inner.{n}_{p}" for n in ("scale", "zero") for p in ("steps", "lows"))},
    }.items():
        made, _, _ = layer(kind, 0, bias=False)
        made(torch.ones(1, INPUTS)).sum().backward()
        assert {name for name, p in made.named_parameters() if p.grad is not None} == {f"base.{n}" for n in names}


# ---------- training of the correction alone


@every_kind
def test_a_correction_in_training_is_the_layer_and_goes_back_into_it(kind):
    made, weight, bias = layer(kind, RANK)
    training = TrainedPackedLinear(made, numbers=False)
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
    training = TrainedPackedLinear(PackedLinear.holding(base, factors, None, dtype=torch.float32), numbers=False)
    with torch.no_grad():
        training.U.unit.normal_(generator=torch.Generator().manual_seed(0))
    added = (training.U() @ training.V()).detach()
    assert 0.5 < float(added.square().mean().sqrt() / training.base().square().mean().sqrt()) < 2


# ---------- training of all numbers


def moved(training: TrainedPackedLinear, x: Tensor) -> None:
    """One step down the gradient of what the layer gives, squared."""
    training(x).square().sum().backward()
    with torch.no_grad():
        for name, parameter in training.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name
            parameter -= 0.05 * parameter.grad / parameter.grad.abs().max()


@every_kind
@with_and_without
def test_all_numbers_in_training_are_the_layer_and_go_back_beside_the_same_codes(kind, rank):
    made, weight, bias = layer(kind, rank)
    training = TrainedPackedLinear(made, numbers=True)
    names = [name.removesuffix(".unit").replace("/", ".") for name, _ in training.named_parameters()]
    trained = {re.sub(r"^numbers\.", "base.", name) for name in names}
    assert trained == {name.removesuffix(".weight") for name, _ in made.named_parameters()}
    assert all(float(p.detach().square().mean()) == pytest.approx(1, rel=1e-4) for p in training.parameters())
    x = normal(6, 4, INPUTS)
    torch.testing.assert_close(training(x.float()).double(), x @ weight.mT + bias, rtol=1e-5, atol=1e-5)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    moved(training, x.float())
    again = training.stored(made)
    # What is stored is what was trained, up to bfloat16: 2^-9 of each number.
    wanted = training(x.float()).detach()
    torch.testing.assert_close(again(x.float()).detach(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    assert again.entry() == made.entry()
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())  # left as it was
    changed = {key for key, tensor in again.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {name for name, _ in made.named_parameters()}
    for name, number in again.base.named_parameters():
        assert torch.equal(number.to(torch.bfloat16).float(), number), name


def test_numbers_that_were_not_exact_in_bfloat16_are_not_rounded_to_it():
    base = PlainStore.holding(normal(1, OUTPUTS, INPUTS).float())
    made = PackedLinear.holding(base, None, None, dtype=torch.float32)
    again = TrainedPackedLinear(made, numbers=True).stored(made)
    torch.testing.assert_close(again.base.matrix(), base.matrix(), rtol=1e-6, atol=0)


def test_numbers_that_are_all_zeros_stay():
    rounded = round_to_nearest(torch.zeros(OUTPUTS, INPUTS), 4, 4, symmetric=True)
    base = UniformStore.holding(rounded, bits=4, group_size=4, dtype=torch.float32)
    training = TrainedPackedLinear(PackedLinear.holding(base, None, None, dtype=torch.float32), numbers=True)
    assert [*training.parameters()] == []
    assert not training(torch.ones(2, INPUTS)).any()


def test_a_bias_of_zeros_is_trained():
    made = PackedLinear.holding(store("4 sym")[0], None, torch.zeros(OUTPUTS), dtype=torch.float32)
    training = TrainedPackedLinear(made, numbers=True)
    training(torch.ones(2, INPUTS)).sum().backward()
    assert training.bias is not None
    assert training.bias.unit.grad is not None
    assert bool(training.bias.unit.grad.any())


def test_every_store_is_among_the_kinds_trained_here():
    """A new store needs a line in `store` (the trellis has tests of its own)."""
    kinds = {PackedLinear.entry(layer(kind, 0)[0])["base"]["kind"] for kind in KINDS}
    assert kinds == STORES.keys() - {"trellis"}
