"""Low-rank layers in few bits: whatever the stores of the two parts, they give the dense product from their tensors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.linalg.pivot import pack_mask
from spectrim.linalg.quantise import dequantise, round_to_nearest
from spectrim.nn.codecs import codec_class
from spectrim.nn.quantised import QUANTISED, QuantisedFactorLinear, QuantisedLinear, QuantisedPivotLinear
from spectrim.nn.stores import PlainStore, Store
from spectrim.nn.stores_uniform import UniformStore

OUTPUTS, INPUTS, RANK = 12, 16, 6
MASK = torch.tensor([True, False, False] * 4)
MASK[[1, 4]] = True


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def store(kind: str, matrix: Tensor, dtype: torch.dtype, group: int) -> tuple[Store, Tensor]:
    """A store, and the matrix (float64) that it stands for."""
    if kind == "plain":
        exact = matrix.to(torch.bfloat16)
        return PlainStore.holding(exact.to(dtype)), exact.double()
    bits = int(kind)
    rounded = round_to_nearest(matrix, bits, group, symmetric=bits == 3)
    made = UniformStore.holding(rounded, bits=bits, group_size=group, dtype=dtype)
    return made, dequantise(rounded, bits, torch.float64)


def layer(
    codec: str, kinds: tuple[str, str], *, bias: bool = True, dtype: torch.dtype = torch.float32, rank: int = RANK
) -> tuple[QuantisedLinear, Tensor, Tensor]:
    """A layer, its weight and its bias in float64."""
    first, a = store(kinds[0], normal(1, rank, INPUTS), dtype, 8)
    others = OUTPUTS if codec == "quantised-factor" else OUTPUTS - rank
    second, b = store(kinds[1], normal(2, others, rank), dtype, 3)
    added = normal(3, OUTPUTS).to(torch.bfloat16).double()
    given = added if bias else None
    zero = torch.zeros_like(added)
    if codec == "quantised-factor":
        return QuantisedFactorLinear.holding(first, second, given, dtype=dtype), b @ a, added if bias else zero
    mask = MASK if rank == RANK else torch.ones(OUTPUTS, dtype=torch.bool)
    weight = torch.empty(OUTPUTS, INPUTS, dtype=torch.float64)
    weight[mask], weight[~mask] = a, b @ a
    made = QuantisedPivotLinear.holding(first, second, pack_mask(mask), given, dtype=dtype)
    return made, weight, added if bias else zero


every_codec = pytest.mark.parametrize("codec", sorted(QUANTISED))
every_pair = pytest.mark.parametrize("kinds", [("4", "4"), ("3", "8"), ("2", "plain"), ("plain", "3")])


@every_codec
@every_pair
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_forward_is_the_dense_product(codec, kinds, shape):
    made, weight, bias = layer(codec, kinds)
    x = normal(5, *shape, INPUTS)
    torch.testing.assert_close(made(x.float()).double(), x @ weight.mT + bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(made.dense_weight().double(), weight, rtol=1e-5, atol=1e-5)
    assert not made.dense_weight().requires_grad


@every_codec
@every_pair
@pytest.mark.parametrize("bias", [True, False])
def test_it_comes_back_from_its_entry_and_its_tensors(codec, kinds, bias):
    made, _, _ = layer(codec, kinds, bias=bias)
    entry = made.entry()
    again = codec_class(codec).from_entry(INPUTS, OUTPUTS, entry)
    stored = {key: tuple(t.shape) for key, t in made.state_dict().items() if key != "weight"}
    assert stored == made.shapes() == again.shapes()
    again.load_state_dict(made.state_dict())
    again.after_load()
    assert torch.equal(again.dense_weight(), made.dense_weight())
    assert (again.entry(), again.rank, again.has_bias) == (entry, RANK, bias)


@every_codec
def test_it_stays_packed_in_memory(codec):
    made, _, _ = layer(codec, ("4", "4"), bias=False)
    before = {key: t.shape for key, t in made.state_dict().items()}
    made(torch.zeros(2, INPUTS))
    assert {key: t.shape for key, t in made.state_dict().items()} == before
    assert sum(t.numel() for t in made.buffers() if t.dtype == torch.uint8) == made.numbers - sum(
        p.numel() for p in made.parameters()
    )


@every_codec
def test_bytes_count_codes_scales_zeros_masks_and_biases(codec):
    made, _, _ = layer(codec, ("4", "3"))
    others = OUTPUTS if codec == "quantised-factor" else OUTPUTS - RANK
    first = RANK * INPUTS // 2 + RANK * 2 * 2 + RANK  # codes, two scales a row, as many zeros of half a byte
    second = others * 3 + others * 2 * 2  # 6 codes of 3 bits in 3 bytes; symmetric
    mask = 0 if codec == "quantised-factor" else 2
    assert made.counted_bytes == first + second + mask + 2 * OUTPUTS


@every_codec
def test_it_can_be_copied_pickled_and_cast(codec):
    made, weight, _ = layer(codec, ("8", "8"))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(torch.eye(INPUTS)), made(torch.eye(INPUTS)), rtol=0, atol=0)
    assert made.to(torch.bfloat16)(torch.zeros(1, INPUTS, dtype=torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(made.dense_weight().double(), weight, rtol=1e-2, atol=1e-2)


def test_a_pivot_layer_of_full_rank_has_no_other_rows():
    made, weight, bias = layer("quantised-pivot", ("4", "plain"), rank=OUTPUTS)
    x = normal(6, 3, INPUTS)
    torch.testing.assert_close(made(x.float()).double(), x @ weight.mT + bias, rtol=1e-5, atol=1e-5)


def test_a_mask_of_another_rank_is_refused():
    made, _, _ = layer("quantised-pivot", ("4", "4"))
    state = {**made.state_dict(), "mask": pack_mask(torch.ones(OUTPUTS, dtype=torch.bool))}
    with pytest.raises(ValueError, match="marks 12 rows, the layer has rank 6"):
        made.load_state_dict(state)


UNIFORM = {"kind": "uniform", "bits": 4, "group_size": 8, "symmetric": False}


@every_codec
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 13}, "rank 13; the layer is 12 x 16"),
        ({0: None}, "a part .* with a base or values of None"),
        ({0: {**UNIFORM, "bits": 5}}, "a part .* with bits 5"),
        ({0: {**UNIFORM, "group_size": 5}}, "group_size 5; it must divide the 16 inputs"),
        ({1: {**UNIFORM, "group_size": 8}}, "group_size 8; it must divide the 6 inputs"),
        ({1: {"kind": "other"}}, "its kind must be one of"),
        ({1: "uniform"}, "its kind must be one of"),
    ],
)
def test_entries_that_cannot_be_are_refused_before_anything_is_allocated(codec, change, says):
    first, second = QUANTISED[codec].parts
    entry: dict[str, Any] = {"codec": codec, "rank": RANK, "bias": False, first: UNIFORM, second: {"kind": "plain"}}
    assert codec_class(codec).from_entry(INPUTS, OUTPUTS, entry, device="meta").rank == RANK
    wrong = {(first, second)[key] if isinstance(key, int) else key: value for key, value in change.items()}
    with pytest.raises(ValueError, match=says):
        codec_class(codec).from_entry(INPUTS, OUTPUTS, {**entry, **wrong}, device="meta")
