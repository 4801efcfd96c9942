"""Uniform rounding and packing, against loops over single weights and bits; the account is of real bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.bits import (
    Account,
    bias_account,
    correction_account,
    size_of,
    sparse24_account,
    uniform_account,
)
from spectrim.linalg.quantise import (
    BITS,
    Grid,
    Rounded,
    as_stored,
    dequantise,
    fit_grid,
    group_count,
    in_groups,
    level_of,
    pack,
    packed_width,
    round_to_nearest,
    unpack,
)
from spectrim.linalg.sparse24 import from_half, to_half, two_of_four, wanda

widths = st.integers(1, 8)
signs = pytest.mark.parametrize("symmetric", [True, False])
every_width = pytest.mark.parametrize("bits", BITS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_codes(rounded: Rounded, weight: Tensor, bits: int) -> list[list[int]]:
    """The nearest level of each weight, by trying all of them."""
    outputs, groups = rounded.scales.shape
    size = weight.shape[1] // groups
    found = []
    for o in range(outputs):
        row = []
        for i in range(weight.shape[1]):
            scale = float(rounded.scales[o, i // size])
            zero = 2 ** (bits - 1) if rounded.zeros is None else int(rounded.zeros[o, i // size])
            row.append(min(range(2**bits), key=lambda c: abs(scale * (c - zero) - float(weight[o, i]))))
        found.append(row)
    return found


@signs
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", [True, False])
def test_each_weight_takes_the_nearest_level(bits, symmetric, search):
    weight = normal(bits, 5, 24)
    rounded = round_to_nearest(weight, bits, 8, symmetric=symmetric, search=search)
    assert rounded.codes.tolist() == slow_codes(rounded, weight, bits)


@signs
@every_width
def test_no_error_is_above_half_a_step_within_the_range(bits, symmetric):
    weight = normal(1, 6, 64)
    rounded = round_to_nearest(weight, bits, 16, symmetric=symmetric)
    error = in_groups((dequantise(rounded, bits) - weight).abs(), 16) / rounded.scales[..., None]
    # Scales are rounded by up to 2^-9, zeros by half a step: at the ends of the range errors are that much larger.
    end = (0 if symmetric else 0.5) + 2**bits * 2**-9
    assert float(error.max()) <= 0.5 + end
    inside = error[(rounded.codes.reshape(error.shape) > 0) & (rounded.codes.reshape(error.shape) < 2**bits - 1)]
    assert float(inside.max()) <= 0.5 + 1e-12


@every_width
def test_scales_by_hand(bits):
    """Range -1 ... 3 in one group: symmetric 2 * 3 / levels; asymmetric 4 / levels with 0 a level."""
    weight = torch.tensor([[-1.0, 0.0, 0.5, 3.0]], dtype=torch.float64)
    levels = 2**bits - 1
    symmetric = round_to_nearest(weight, bits, 0, symmetric=True)
    assert float(symmetric.scales) == float(as_stored(torch.tensor(6 / levels, dtype=torch.float64)))
    assert symmetric.zeros is None
    asymmetric = round_to_nearest(weight, bits, 0, symmetric=False)
    assert float(asymmetric.scales) == float(as_stored(torch.tensor(4 / levels, dtype=torch.float64)))
    assert asymmetric.zeros is not None
    assert int(asymmetric.zeros) == round(1 / float(asymmetric.scales))
    assert float(dequantise(asymmetric, bits)[0, 1]) == 0.0


@signs
def test_scales_are_exact_in_bfloat16_so_that_storing_them_changes_nothing(symmetric):
    rounded = round_to_nearest(normal(2, 4, 32), 4, 8, symmetric=symmetric, search=True)
    assert torch.equal(rounded.scales.to(torch.bfloat16).double(), rounded.scales)
    wide, narrow = dequantise(rounded, 4), dequantise(rounded, 4, torch.bfloat16)
    assert torch.equal(wide.to(torch.bfloat16), narrow)


@signs
@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_scaling_a_weight_by_a_power_of_two_scales_what_is_stored(seed, power, symmetric):
    weight = normal(seed, 3, 16)
    one = round_to_nearest(weight, 3, 4, symmetric=symmetric)
    other = round_to_nearest(weight * 2.0**power, 3, 4, symmetric=symmetric)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales * 2.0**power, other.scales)


@signs
def test_permuting_rows_permutes_what_is_stored(symmetric):
    weight, order = normal(3, 7, 16), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    one, other = (round_to_nearest(w, 4, 8, symmetric=symmetric) for w in (weight, weight[order]))
    assert torch.equal(one.codes[order], other.codes)
    assert torch.equal(one.scales[order], other.scales)


@signs
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_never_loses_and_more_bits_never_do(bits, symmetric):
    weight = normal(4, 16, 64)
    importance = normal(5, 64).exp()

    def error(width: int, search: bool) -> float:
        rounded = round_to_nearest(weight, width, 32, symmetric=symmetric, importance=importance, search=search)
        return float(((dequantise(rounded, width) - weight).square() * importance).sum())

    assert error(bits, True) < error(bits, False)
    assert error(bits + 1, True) < error(bits, True)


def test_the_search_weighs_what_matters():
    """With all importance on small weights the large one is clipped."""
    weight = torch.tensor([[0.1, -0.2, 0.3, 1.0]], dtype=torch.float64)
    spare = fit_grid(weight, 2, symmetric=True, importance=torch.tensor([1.0, 1, 1, 0]).double(), search=True)
    whole = fit_grid(weight, 2, symmetric=True, importance=torch.tensor([1.0, 1, 1, 1]).double(), search=True)
    assert float(spare.scale) < float(whole.scale)


@signs
@every_width
def test_zeros_stay_zeros(bits, symmetric):
    weight = normal(6, 2, 16)
    weight[:, :8] = 0
    rounded = round_to_nearest(weight, bits, 8, symmetric=symmetric, search=True)
    assert torch.equal(dequantise(rounded, bits)[:, :8], weight[:, :8])


def test_levels_are_what_codes_stand_for():
    grid = Grid(torch.tensor([0.5]), torch.tensor([2.0]))
    assert level_of(torch.tensor([0.0, 1, 2, 3]), grid).tolist() == [-1.0, -0.5, 0.0, 0.5]


# ---------- packing


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """One bit after the other, the lowest first."""
    stream = [code >> i & 1 for code in codes for i in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << k for k, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]


@given(bits=widths, count=st.integers(1, 40), rows=st.integers(1, 3), seed=st.integers(0, 1000))
def test_packing_is_the_stream_of_bits_and_comes_back(bits, count, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert packed.shape == (rows, packed_width(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes.to(torch.uint8))


@every_width
def test_less_than_a_byte_is_lost(bits):
    assert packed_width(384, bits) * 8 == 384 * bits
    assert 0 <= packed_width(383, bits) * 8 - 383 * bits < 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_packing_takes_codes_of_any_whole_dtype(dtype):
    codes = torch.arange(8, dtype=dtype)
    assert pack(codes, 3).tolist() == slow_pack(list(range(8)), 3)


# ---------- 2:4


def test_two_of_every_four_stay_and_the_first_of_equal_ones():
    scores = torch.tensor([[1.0, 3, 2, 0, 5, 5, 5, 5]])
    assert two_of_four(scores).tolist() == [[False, True, True, False, True, True, False, False]]


@given(seed=st.integers(0, 1000), outputs=st.integers(1, 5), fours=st.integers(1, 6))
def test_half_a_weight_comes_back_where_it_was(seed, outputs, fours):
    weight = normal(seed, outputs, 4 * fours)
    mask = two_of_four(weight.abs())
    half = to_half(weight, mask)
    assert half.values.shape == (outputs, 2 * fours)
    assert torch.equal(from_half(half), weight * mask)
    pairs = half.places.reshape(outputs, fours, 2).long()
    assert bool((pairs[..., 0] < pairs[..., 1]).all())
    assert int(pairs.max()) <= 3


def test_wanda_looks_at_the_size_of_the_inputs():
    weight = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
    gram = torch.diag(torch.tensor([100.0, 25, 1, 1], dtype=torch.float64))
    assert from_half(wanda(weight, gram)).tolist() == [[1.0, 2, 0, 0]]


# ---------- bytes


@signs
@every_width
@pytest.mark.parametrize("group_size", [0, 8, 48])
def test_the_account_is_what_packed_tensors_take(bits, symmetric, group_size):
    outputs, inputs = 6, 48
    rounded = round_to_nearest(normal(8, outputs, inputs), bits, group_size, symmetric=symmetric)
    account = uniform_account(outputs, inputs, bits, group_size, symmetric=symmetric)
    assert account.codes == pack(rounded.codes, bits).nbytes
    assert account.scales == rounded.scales.to(torch.bfloat16).nbytes
    assert account.zeros == (0 if rounded.zeros is None else pack(rounded.zeros.flatten(), bits).nbytes)
    assert rounded.scales.shape[1] == group_count(inputs, group_size)


def test_known_sizes():
    """4 bits in groups of 128: 4.125 bits a weight; 2:4 in 16 bits: 9 bits."""
    four = uniform_account(384, 384, 4, 128, symmetric=True)
    assert four.bits_a_weight(384 * 384) == 4 + 16 / 128
    assert uniform_account(384, 1024, 3, 128, symmetric=False).bits_a_weight(384 * 1024) == 3 + 19 / 128
    assert sparse24_account(384, 384).bits_a_weight(384 * 384) == 9
    assert correction_account(10, 20, 3).total == 3 * 30 * 2
    assert (bias_account(7, bias=True).total, bias_account(7, bias=False).total) == (14, 0)


def test_accounts_add_up_part_by_part():
    parts = Account(codes=1, scales=2, zeros=3), Account(codes=10, indices=5, values=6, codebooks=7, factors=8, bias=9)
    both = parts[0] + parts[1]
    assert (both.codes, both.scales, both.bias) == (11, 2, 9)
    assert both.total == parts[0].total + parts[1].total == 51


def test_numbers_count_two_bytes_and_codes_one():
    tensors = [torch.zeros(5), torch.zeros(5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.uint8)]
    assert [size_of([t], "bytes") for t in tensors] == [10, 10, 5]
    assert size_of([torch.zeros(5, dtype=torch.int32)], "bytes") == 20
    assert size_of(tensors, "numbers") == 15


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_no_rows_are_packed_into_no_bytes(bits):
    empty = torch.empty(0, 8, dtype=torch.uint8)
    packed = pack(empty, bits)
    assert packed.shape == (0, packed_width(8, bits))
    assert unpack(packed, bits, 8).shape == (0, 8)
