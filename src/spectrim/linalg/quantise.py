"""Group-wise uniform rounding of a weight, and codes packed into bytes.

A row of a weight (O, I) is cut into groups of neighbouring inputs; each group has a grid of 2^bits levels

    w' = scale (code - zero),      code in 0 ... 2^bits - 1

    symmetric    zero = 2^(bits-1), not stored         scale = 2 max|w| / (2^bits - 1)
    asymmetric   zero a code of its own, stored        scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)

Scales are rounded to bfloat16 before any code is chosen: codes then belong to the scale that the file holds:
float32, bfloat16, float16 from 2^-17 up (smaller ones lose digits). Codes are packed without gaps: 3 bits take
3 bits (8 codes in 3 bytes), not 4.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
"""Widths of codes that methods offer; the packing takes all from 1 to 8."""
CLIP_STEPS = 40
CLIP_TO = 0.4
"""A searched grid covers from all down to this share of the group's range."""


class Grid(NamedTuple):
    """Levels of groups of weights: `scale * (code - zero)`."""

    scale: Tensor  # (...,) non-negative, exact in bfloat16
    zero: Tensor  # (...,) whole numbers


class Rounded(NamedTuple):
    """A weight (O, I) in codes, in G groups a row."""

    codes: Tensor  # (O, I) uint8
    scales: Tensor  # (O, G)
    zeros: Tensor | None  # (O, G) uint8; None where they are all 2^(bits-1)


def fit_grid(
    groups: Tensor, bits: int, *, symmetric: bool, importance: Tensor | None = None, search: bool = False
) -> Grid:
    """Grids of groups (..., n), from their largest and smallest values.

    `search` also tries grids that clip up to 1 - CLIP_TO of the range and takes the one of least squared error,
    weighted by `importance` (n,), or broadcast against the groups, where it is given: what clipping costs at few
    weights is less than what a finer grid gains at all others.
    """
    full = _grid(groups, bits, symmetric=symmetric, share=1.0)
    if not search:
        return full
    best, least = full, _weighted_error(groups, full, bits, importance)
    for step in range(1, CLIP_STEPS + 1):
        tried = _grid(groups, bits, symmetric=symmetric, share=1 - (1 - CLIP_TO) * step / CLIP_STEPS)
        error = _weighted_error(groups, tried, bits, importance)
        better = error < least
        best = Grid(*(torch.where(better, new, old) for new, old in zip(tried, best, strict=True)))
        least = torch.where(better, error, least)
    return best


def _grid(groups: Tensor, bits: int, *, symmetric: bool, share: float) -> Grid:
    levels = 2**bits - 1
    if symmetric:
        scale = as_stored(2 * share * groups.abs().amax(-1) / levels)
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))
    low, high = share * groups.amin(-1).clamp(max=0), share * groups.amax(-1).clamp(min=0)
    scale = as_stored((high - low) / levels)
    return Grid(scale, (-low / divisor(scale)).round().clamp(0, levels))


def _weighted_error(groups: Tensor, grid: Grid, bits: int, importance: Tensor | None) -> Tensor:
    wide = Grid(grid.scale[..., None], grid.zero[..., None])
    squared = (level_of(code_of(groups, wide, bits), wide) - groups).square()
    return (squared if importance is None else squared * importance).sum(-1)


def as_stored(scales: Tensor) -> Tensor:
    """Rounded to bfloat16, in the dtype they came in."""
    return scales.to(torch.bfloat16).to(scales.dtype)


def divisor(scale: Tensor) -> Tensor:
    """A group of zeros has scale 0: any code gives 0 back."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def code_of(values: Tensor, grid: Grid, bits: int) -> Tensor:
    """The nearest level's code, in the dtype of `values`; `grid` broadcasts against them."""
    return (values / divisor(grid.scale) + grid.zero).round().clamp(0, 2**bits - 1)


def level_of(codes: Tensor, grid: Grid) -> Tensor:
    """The values that codes stand for."""
    return grid.scale * (codes - grid.zero)


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    importance: Tensor | None = None,
    search: bool = False,
) -> Rounded:
    """Each weight (O, I) to the nearest level of its group; `importance` (I,) as in `fit_grid`.

    `group_size` divides I; 0 is one group a row. Compute in float32 or better.
    """
    groups = in_groups(weight, group_size)
    shared = None if importance is None else in_groups(importance[None], group_size)
    grid = fit_grid(groups, bits, symmetric=symmetric, importance=shared, search=search)
    codes = code_of(groups, Grid(grid.scale[..., None], grid.zero[..., None]), bits)
    zeros = None if symmetric else grid.zero.to(torch.uint8)
    return Rounded(codes.to(torch.uint8).reshape(weight.shape), grid.scale, zeros)


def dequantise(rounded: Rounded, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (O, I) that codes stand for, computed in `dtype` (default: that of the scales)."""
    groups = rounded.scales.shape[1]
    scales = rounded.scales if dtype is None else rounded.scales.to(dtype)
    codes = rounded.codes.unflatten(1, (groups, rounded.codes.shape[1] // groups)).to(scales.dtype)
    # Codes and zeros are whole numbers up to 255: their difference is exact in bfloat16 too.
    zero = 2 ** (bits - 1) if rounded.zeros is None else rounded.zeros.to(scales.dtype)[..., None]
    return ((codes - zero) * scales[..., None]).flatten(1)


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """(O, I) to (O, G, group_size); 0 is one group a row."""
    size = group_size or weight.shape[1]
    return weight.reshape(len(weight), weight.shape[1] // size, size)


def group_count(inputs: int, group_size: int) -> int:
    """Groups in a row of that many inputs."""
    return inputs // group_size if group_size else 1


# ---------- packing


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes: less than one byte is lost."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) below 2^bits to bytes (..., packed_width(n)) uint8; the first code in the lowest bits."""
    count, size = code_unit(bits)
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % count))
    units = padded.unflatten(-1, (padded.shape[-1] // count, count))  # -1 would have no answer for 0 rows
    words = (units << _shifts(count, bits, codes.device)).sum(-1, keepdim=True)
    octets = ((words >> _shifts(size, 8, codes.device)) & 255).to(torch.uint8).flatten(-2)
    return octets[..., : packed_width(codes.shape[-1], bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: codes (..., count) uint8."""
    codes, size = code_unit(bits)
    if bits == 8:
        return packed[..., :count]
    whole = torch.int32 if 8 * size < 32 else torch.int64
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % size))
    units = padded.to(whole).unflatten(-1, (padded.shape[-1] // size, size))
    words = (units << _shifts(size, 8, packed.device, whole)).sum(-1, keepdim=True, dtype=whole)
    found = (words >> _shifts(codes, bits, packed.device, whole)) & (2**bits - 1)
    return found.flatten(-2)[..., :count].to(torch.uint8)


def code_unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and those bytes."""
    shared = gcd(bits, 8)
    return 8 // shared, bits // shared


def _shifts(count: int, step: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(count, device=device, dtype=dtype) * step
