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

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.quantise import as_stored

TAIL = (1 / 30 + 1 / 32) / 2
"""d, the probability beyond the outermost level."""


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
    low = torch.linspace(TAIL, 0.5, half, dtype=torch.float64)
    high = torch.linspace(0.5, 1 - TAIL, half + 1, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([low[:-1], high]))
    quantiles[half - 1] = 0.0  # of probability 1/2
    return tuple((quantiles / quantiles[-1]).tolist())


def normal_levels(bits: int) -> Tensor:
    """The 2^bits levels, ascending from -1 to 1, float64."""
    return torch.tensor(_levels(bits), dtype=torch.float64)


def blocks_in(outputs: int, inputs: int, form: Form) -> tuple[int, int]:
    """G, blocks in a row, and S, second-level scales."""
    blocks = -(-inputs // form.block)
    return blocks, -(-outputs * blocks // form.scale_block)


def round_to_normal(weight: Tensor, form: Form) -> NormalRounded:
    """Each weight (O, I) to the nearest level of its block; pass float32 or better."""
    outputs, inputs = weight.shape
    blocks, _ = blocks_in(outputs, inputs, form)
    padded = torch.nn.functional.pad(weight, (0, blocks * form.block - inputs))
    largest = padded.reshape(outputs, blocks, form.block).abs().amax(-1)
    scale_codes, scales = _round_scales(largest, form)
    stored = _scales_of(scale_codes, scales, form)
    shares = weight / _by_input(torch.where(stored > 0, stored, torch.ones_like(stored)), form, inputs)
    levels = normal_levels(form.bits).to(weight)
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
    return NormalRounded(codes.to(torch.uint8), scale_codes, scales)


def from_normal(rounded: NormalRounded, form: Form, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (O, I) that codes stand for in `dtype` (default: that of the scales), rounded to it once."""
    dtype = dtype or rounded.scales.dtype
    wide = torch.promote_types(dtype, torch.float32)
    levels = normal_levels(form.bits).to(rounded.codes.device, wide)
    scales = _scales_of(rounded.scale_codes, rounded.scales.to(wide), form)
    return (levels[rounded.codes.int()] * _by_input(scales, form, rounded.codes.shape[1])).to(dtype)


def _round_scales(largest: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes (O, G) uint8 of the blocks' largest numbers, and scales (S,) of the second level."""
    flat = largest.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % form.scale_block))
    scales = as_stored(padded.reshape(-1, form.scale_block).amax(1))
    top = scales.repeat_interleave(form.scale_block)[: len(flat)]
    steps = 2**form.scale_bits
    codes = (flat / torch.where(top > 0, top, torch.ones_like(top)) * steps - 1).round().clamp(0, steps - 1)
    return codes.to(torch.uint8).reshape(largest.shape), scales


def _scales_of(codes: Tensor, scales: Tensor, form: Form) -> Tensor:
    """Scales of blocks (O, G)."""
    top = scales.repeat_interleave(form.scale_block)[: codes.numel()].reshape(codes.shape)
    return top * (codes.to(scales.dtype) + 1) / 2**form.scale_bits


def _by_input(scales: Tensor, form: Form, inputs: int) -> Tensor:
    """Each block's scale for each of its weights (O, I)."""
    return scales.repeat_interleave(form.block, dim=1)[:, :inputs]
