"""NormalFloat against its definition written out in loops, its published table, and the bytes it takes."""

from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg.bits import normal_account
from spectrim.linalg.normal_float import (
    BINS,
    Form,
    NormalRounded,
    blocks_in,
    from_normal,
    nearest_level,
    normal_levels,
    round_to_normal,
    rounding_errors,
)
from spectrim.linalg.quantise import BITS, as_stored, pack, round_to_nearest

NF4 = [
    -1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip
"""As published with QLoRA (bitsandbytes)."""
forms = st.builds(
    Form, st.sampled_from(BITS), st.sampled_from([1, 3, 8, 16]), st.sampled_from(BITS), st.sampled_from([1, 4, 7, 64])
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(weight: Tensor, form: Form) -> tuple[list[list[int]], Tensor]:
    """Codes and values of each weight, one number at a time; Python's own normal distribution."""
    levels = slow_levels(form.bits)
    rows = weight.tolist()
    blocks = [[row[a : a + form.block] for a in range(0, len(row), form.block)] for row in rows]
    largest = [max(abs(w) for w in block) for row in blocks for block in row]
    scales = []
    for start in range(0, len(largest), form.scale_block):
        group = largest[start : start + form.scale_block]
        top = float(as_stored(torch.tensor(max(group))))
        steps = 2**form.scale_bits
        near = [min(range(steps), key=lambda c: abs(top * (c + 1) / steps - s)) for s in group]
        scales += [top * (c + 1) / steps for c in near]
    codes, values, block_number = [], [], 0
    for row in blocks:
        codes.append([])
        values.append([])
        for block in row:
            s = scales[block_number]
            block_number += 1
            found = [min(range(len(levels)), key=lambda c: abs(s * levels[c] - w)) if s else 0 for w in block]
            codes[-1] += found
            values[-1] += [s * levels[c] for c in found]
    return codes, torch.tensor(values, dtype=torch.float64)


def slow_levels(bits: int) -> list[float]:
    d, half, cdf = (1 / 30 + 1 / 32) / 2, 2 ** (bits - 1), NormalDist().inv_cdf
    low = [cdf(d + (0.5 - d) * k / (half - 1)) for k in range(half)]
    high = [cdf(0.5 + (0.5 - d) * k / half) for k in range(1, half + 1)]
    return [q / high[-1] for q in [*low, *high]]


def test_four_bits_are_the_published_table():
    assert normal_levels(4).tolist() == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_quantiles_from_one_end_to_the_other(bits):
    levels = normal_levels(bits)
    assert levels.tolist() == pytest.approx(slow_levels(bits), abs=1e-12)
    assert len(levels) == 2**bits
    assert bool((levels.diff() > 0).all())
    assert (float(levels[0]), float(levels[-1])) == (pytest.approx(-1.0, abs=1e-15), 1.0)
    assert int((levels == 0).sum()) == 1


@given(form=forms, seed=st.integers(0, 1000), outputs=st.integers(1, 4), inputs=st.integers(1, 20))
def test_it_is_the_definition(form, seed, outputs, inputs):
    weight = normal(seed, outputs, inputs)
    codes, values = slow(weight, form)
    rounded = round_to_normal(weight, form)
    assert rounded.codes.tolist() == codes
    torch.testing.assert_close(from_normal(rounded, form, torch.float64), values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_those_of_a_binary_search(bits, dtype):
    """Also at, and next to, boundaries and edges of bins."""
    levels = normal_levels(bits).to(dtype)
    boundaries = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(-BINS // 2, BINS // 2 + 1, dtype=dtype) / (BINS // 2)
    shares = torch.cat([boundaries, edges, normal(1, 20_000).to(dtype), torch.tensor([-3.0, 3.0], dtype=dtype)])
    found, expected = nearest_level(shares, bits), torch.bucketize(shares, boundaries)
    near = (levels[found] - shares).abs() - (levels[expected] - shares).abs()
    assert float(near.abs().max()) < 8 * torch.finfo(dtype).eps
    assert int((found != expected).sum()) <= len(boundaries)  # ties alone
    boundary_in_bin = ((boundaries + 1) * (BINS // 2)).floor()
    assert bool((boundary_in_bin.diff() > 0).all())


@given(form=forms, seed=st.integers(0, 1000))
def test_errors_of_many_forms_are_those_of_each(form, seed):
    weight, importance = normal(seed, 4, 20), normal(seed + 1, 4, 20).square()
    weight[2] = 0
    many = [form, form._replace(bits=2), form._replace(scale_bits=8), form._replace(block=5), form]
    expected = [
        float(((from_normal(round_to_normal(weight, f), f, torch.float64) - weight).square() * importance).sum())
        for f in many
    ]
    assert rounding_errors(weight, many, importance).tolist() == pytest.approx(expected, rel=1e-9)


@given(form=forms, seed=st.integers(0, 1000))
def test_powers_of_two_scale_through_and_zeros_stay_zeros(form, seed):
    weight = normal(seed, 3, 16)
    weight[1] = 0
    once, twice = (round_to_normal(w, form) for w in (weight, 2**-20 * weight))
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(2**-20 * once.scales, twice.scales)
    value = from_normal(once, form, torch.float64)
    assert bool((value[1] == 0).all())
    nothing = round_to_normal(torch.zeros(2, 5), form)
    assert bool((from_normal(nothing, form) == 0).all())


@given(form=forms, seed=st.integers(0, 1000))
def test_what_is_on_the_grid_comes_back(form, seed):
    """Rounded values are rounded to themselves where the largest level of each block is in use."""
    weight = normal(seed, 2, 16)
    fine = form._replace(scale_bits=8, scale_block=1)
    once = from_normal(round_to_normal(weight, fine), fine, torch.float64)
    again = from_normal(round_to_normal(once, fine), fine, torch.float64)
    torch.testing.assert_close(again, once, rtol=2**-7, atol=0)


def test_a_block_far_below_its_neighbours_is_not_lost():
    weight = torch.cat([normal(1, 1, 8), 1e-4 * normal(2, 1, 8)], dim=1)
    form = Form(bits=4, block=8, scale_bits=2, scale_block=2)
    rounded = round_to_normal(weight, form)
    assert rounded.scale_codes.tolist() == [[3, 0]]
    small = from_normal(rounded, form, torch.float64)[:, 8:]
    assert bool((small - weight[:, 8:]).abs().max() < 1e-3)


def test_narrow_dtypes_are_rounded_once():
    weight = normal(4, 6, 64)
    form = Form(bits=8, block=16, scale_bits=8, scale_block=16)
    rounded = round_to_normal(weight, form)
    exact = from_normal(rounded, form, torch.float64)
    narrow = rounded._replace(scales=rounded.scales.to(torch.bfloat16))
    assert torch.equal(from_normal(narrow, form), exact.float().to(torch.bfloat16))
    assert from_normal(rounded, form).dtype == torch.float64


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_weights_lose_less_than_on_a_uniform_grid_at_equal_bytes(bits):
    """3 or 4 bits in blocks of 64 with 8-bit scales, against groups of 128 with 16-bit ones: 0.1256 bits and 0.125."""
    weight = normal(7, 128, 512)
    form = Form(bits=bits, block=64, scale_bits=8, scale_block=256)
    missing = from_normal(round_to_normal(weight, form), form, torch.float64) - weight
    uniform = round_to_nearest(weight, bits, 128, symmetric=True)
    grid = (uniform.codes.double() - 2 ** (bits - 1)).reshape(128, 4, 128) * uniform.scales[..., None]
    assert float(missing.square().mean()) < 0.8 * float((grid.reshape(128, 512) - weight).square().mean())


@given(form=forms, outputs=st.integers(1, 6), inputs=st.integers(1, 40))
def test_the_account_is_what_packed_tensors_take(form, outputs, inputs):
    rounded = round_to_normal(normal(8, outputs, inputs), form)
    account = normal_account(outputs, inputs, form)
    assert account.codes == pack(rounded.codes, form.bits).nbytes
    scale_codes = pack(rounded.scale_codes.flatten(), form.scale_bits)
    assert account.scales == scale_codes.nbytes + rounded.scales.to(torch.bfloat16).nbytes
    assert account.total == account.codes + account.scales
    blocks, tops = blocks_in(outputs, inputs, form)
    assert rounded.scale_codes.shape == (outputs, blocks)
    assert rounded.scales.shape == (tops,)


def test_known_sizes():
    """The paper's formula: b + b0/B0 + 16/(B0 B1)."""
    form = Form(bits=4, block=64, scale_bits=8, scale_block=256)
    assert normal_account(384, 1024, form).bits_a_weight(384 * 1024) == 4 + 8 / 64 + 16 / (64 * 256)


def test_scales_are_exact_in_bfloat16():
    rounded = round_to_normal(normal(9, 32, 64), Form(bits=3, block=16, scale_bits=3, scale_block=16))
    assert isinstance(rounded, NormalRounded)
    assert torch.equal(rounded.scales, as_stored(rounded.scales))
