"""NormalFloat: codes whose levels are quantiles of the normal distribution, with scales that are rounded too.

Weights of a row are cut into blocks; a block's numbers, over the largest of them, are rounded to levels in [-1, 1]:

    w' = s level[code]        s = max |w| of the block, itself rounded (double quantisation):
    s' = t (c + 1) / 2^b0     c in 0 ... 2^b0 - 1;  t = max s of `scale_block` neighbouring scales, 16 bits

Levels (Dettmers et al., QLoRA, arXiv 2305.14314): 2^(b-1) quantiles evenly spaced in probability from d to 1/2 and
2^(b-1) + 1 from 1/2 to 1 - d, together, over the largest. 0 is a level of its own. d = (1/30 + 1/32) / 2 for all
widths, as in LQ-LoRA (Guo et al., arXiv 2311.12023). Scales are positive, so their levels start above 0: no block is
lost, and a block of zeros has zeros by its codes. A weight takes  b + b0/B0 + 16/(B0 B1)  bits.

t is exact in bfloat16, and codes are chosen for the scales as they are stored. A last block may be shorter.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.quantise import as_stored, divisor

TAIL = (1 / 30 + 1 / 32) / 2
"""d, the probability beyond the outermost level."""
BINS = 2048
"""Parts of [-1, 1) that hold at most one boundary between levels of 8 bits, which are 0.0026 apart at the least."""


class Form(NamedTuple):
    """How a weight is rounded: widths in bits, blocks in numbers."""

    bits: int
    block: int  # B0, weights that share a scale
    scale_bits: int  # b0
    scale_block: int  # B1, scales that share one of the second level


class NormalRounded(NamedTuple):
    """A weight (O, I) in codes, with G blocks a row and S second-level scales."""

    codes: Tensor  # (O, I) uint8
    scale_codes: Tensor  # (O, G) uint8
    scales: Tensor  # (S,), exact in bfloat16


@cache
def _levels(bits: int) -> tuple[float, ...]:
    half = 2 ** (bits - 1)
    low = torch.linspace(TAIL, 0.5, half, dtype=torch.float64, device="cpu")
    high = torch.linspace(0.5, 1 - TAIL, half + 1, dtype=torch.float64, device="cpu")
    quantiles = torch.special.ndtri(torch.cat([low[:-1], high]))
    quantiles[half - 1] = 0.0  # of probability 1/2
    return tuple((quantiles / quantiles[-1]).tolist())


def normal_levels(bits: int) -> Tensor:
    """The 2^bits levels, ascending from -1 to 1, float64."""
    return torch.tensor(_levels(bits), dtype=torch.float64, device="cpu")


def blocks_in(outputs: int, inputs: int, form: Form) -> tuple[int, int]:
    """G, blocks in a row, and S, second-level scales."""
    blocks = -(-inputs // form.block)
    return blocks, -(-outputs * blocks // form.scale_block)


def round_to_normal(weight: Tensor, form: Form) -> NormalRounded:
    """Each weight (O, I) to the nearest level of its block; pass float32 or better."""
    scale_codes, scales = _round_scales(_largest(weight, form.block), form)
    stored = _by_input(scales_of(scale_codes, scales, form), form.block, weight.shape[1])
    codes = nearest_level(weight / divisor(stored), form.bits)
    return NormalRounded(codes.to(torch.uint8), scale_codes, scales)


def rounding_errors(weight: Tensor, forms: Sequence[Form], importance: Tensor) -> Tensor:
    """The squared error of `weight` (O, I), weighed by `importance` (O, I), in each of many forms: (len(forms),).

    What forms have in common is worked out once, and no codes are made.
    """
    errors = torch.zeros(len(forms), dtype=torch.float64)
    for scaling, same in groupby(sorted(range(len(forms)), key=lambda k: forms[k][1:]), lambda k: forms[k][1:]):
        form = Form(0, *scaling)
        scale_codes, scales = _round_scales(_largest(weight, form.block), form)
        stored = _by_input(scales_of(scale_codes, scales, form), form.block, weight.shape[1])
        shares, weights = weight / divisor(stored), stored.square() * importance
        for k in same:
            levels = normal_levels(forms[k].bits).to(weight)
            missing = levels[nearest_level(shares, forms[k].bits)].sub_(shares)
            errors[k] = float(missing.square_().mul_(weights).sum())
    return errors


def nearest_level(shares: Tensor, bits: int) -> Tensor:
    """Codes int32 of the nearest levels. A bin tells all but one boundary: a tenth of a binary search's time."""
    below, boundary = (table.to(shares.device) for table in _bins(bits))
    bins = ((shares + 1) * (BINS // 2)).int().clamp_(0, BINS - 1)
    return below[bins] + (shares > boundary.to(shares.dtype)[bins])


@cache
def _bins(bits: int) -> tuple[Tensor, Tensor]:
    """Of each of BINS equal parts of [-1, 1): how many boundaries between levels lie below, and the next one."""
    levels = normal_levels(bits)
    boundaries = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(BINS, dtype=torch.float64, device="cpu") * (2 / BINS) - 1
    below = torch.bucketize(edges, boundaries, out_int32=True)
    return below, torch.cat([boundaries, boundaries.new_full((1,), torch.inf)])[below]


def from_normal(rounded: NormalRounded, form: Form, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (O, I) that codes stand for in `dtype` (default: that of the scales), rounded to it once."""
    dtype = dtype or rounded.scales.dtype
    wide = torch.promote_types(dtype, torch.float32)
    levels = normal_levels(form.bits).to(rounded.codes.device, wide)
    scales = scales_of(rounded.scale_codes, rounded.scales.to(wide), form)
    return (levels[rounded.codes.int()] * _by_input(scales, form.block, rounded.codes.shape[1])).to(dtype)


def _round_scales(largest: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes (O, G) uint8 of the blocks' largest numbers, and scales (S,) of the second level."""
    flat, scales = largest.flatten(), _second_level(largest, form)
    top = scales.repeat_interleave(form.scale_block)[: len(flat)]
    steps = 2**form.scale_bits
    codes = (flat / divisor(top) * steps - 1).round().clamp(0, steps - 1)
    return codes.to(torch.uint8).reshape(largest.shape), scales


def _second_level(largest: Tensor, form: Form) -> Tensor:
    flat = largest.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % form.scale_block))
    return as_stored(padded.reshape(-1, form.scale_block).amax(1))


def second_level(weight: Tensor, form: Form) -> Tensor:
    """Scales (S,) of the second level of a weight (O, I), exact in bfloat16."""
    return _second_level(_largest(weight, form.block), form)


def scales_of(codes: Tensor, scales: Tensor, form: Form) -> Tensor:
    """Scales of blocks (O, G)."""
    top = scales.repeat_interleave(form.scale_block)[: codes.numel()].reshape(codes.shape)
    return top * (codes.to(scales.dtype) + 1) / 2**form.scale_bits


def _by_input(scales: Tensor, block: int, inputs: int) -> Tensor:
    """Each block's scale for each of its weights (O, I)."""
    return scales.repeat_interleave(block, dim=1)[:, :inputs]


def _largest(weight: Tensor, block: int) -> Tensor:
    """Of each block (O, G), the last of a row perhaps shorter."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block))
    return padded.reshape(len(weight), -1, block).abs().amax(-1)
