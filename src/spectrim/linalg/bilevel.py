"""Small groups whose scales and zeros are themselves rounded to few bits (SpQR, arXiv 2306.03078).

As in quantise.py, w' = scale (code - zero), in groups of neighbouring inputs of a row. Scales and zeros of the same
group of `rows` neighbouring rows share a second grid:

    scale = step code + low        code in 0 ... 2^bits - 1; step and low in 16 bits

With groups of 16, 16 rows and 3 bits for both, a weight costs 2 (3 / 16 + 32 / 256) = 0.625 bits beside its own code,
where scales in 16 bits and zeros in codes would cost more than one. A zero is any number, no code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.quantise import Grid, as_stored, code_of, fit_grid, level_of


class Levels(NamedTuple):
    """Statistics (O, G) in codes, with a grid for each `rows` neighbouring rows."""

    codes: Tensor  # (O, G) uint8
    steps: Tensor  # (ceil(O / rows), G) non-negative, exact in bfloat16
    lows: Tensor  # (ceil(O / rows), G) exact in bfloat16


class Bilevel(NamedTuple):
    """A weight (O, I) in codes, in G groups a row."""

    codes: Tensor  # (O, I) uint8
    scales: Levels
    zeros: Levels


def row_blocks(outputs: int, rows: int) -> int:
    """Blocks of that many rows; the last may be shorter."""
    return -(-outputs // rows)


def round_statistics(values: Tensor, bits: int, rows: int) -> Levels:
    """Statistics (O, G) to the nearest level of their block of rows, from its smallest to its largest."""
    missing = -len(values) % rows
    blocks = torch.cat([values, values[-1:].expand(missing, -1)]).reshape(-1, rows, values.shape[1])
    lows = as_stored(blocks.amin(1))
    steps = as_stored(((blocks.amax(1) - lows) / (2**bits - 1)).clamp(min=0))
    divisor = torch.where(steps > 0, steps, torch.ones_like(steps))[:, None]
    codes = ((blocks - lows[:, None]) / divisor).round().clamp(0, 2**bits - 1)
    return Levels(codes.reshape(-1, values.shape[1])[: len(values)].to(torch.uint8), steps, lows)


def statistics_of(levels: Levels, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """The statistics (O, G) that codes stand for, computed in `dtype` (default: that of the grids)."""
    dtype = dtype or levels.steps.dtype
    steps, lows = (part.to(dtype).repeat_interleave(rows, 0)[: len(levels.codes)] for part in levels[1:])
    return steps * levels.codes.to(dtype) + lows


def dequantise_bilevel(rounded: Bilevel, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (O, I) that codes stand for, computed in `dtype` (default: that of the grids)."""
    scales, zeros = (statistics_of(part, rows, dtype)[..., None] for part in rounded[1:])
    codes = rounded.codes.reshape(*scales.shape[:2], -1).to(scales.dtype)
    return (scales * (codes - zeros)).reshape(rounded.codes.shape)


class BilevelRule:
    """For the column solver: a grid for each small group, its scale and zero rounded before any weight is."""

    def __init__(
        self, weight: Tensor, bits: int, group_size: int, *, statistic_bits: int, rows: int, search: bool = False
    ) -> None:
        self.bits, self.statistic_bits, self.rows, self.search = bits, statistic_bits, rows, search
        self.unit = group_size or weight.shape[1]
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.grid = Grid(torch.empty(0), torch.empty(0))
        self.scales: list[Levels] = []
        self.zeros: list[Levels] = []

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        importance = diagonal.square().reciprocal() if self.search else None
        wanted = fit_grid(weight, self.bits, symmetric=False, importance=importance, search=self.search)
        self.scales.append(round_statistics(wanted.scale[:, None], self.statistic_bits, self.rows))
        scale = statistics_of(self.scales[-1], self.rows)
        # The lowest level stays where it is: its distance from 0, in steps of the scale that the file holds.
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = ((wanted.scale * wanted.zero)[:, None] / divisor).clamp(0, 2**self.bits - 1)
        self.zeros.append(round_statistics(zero, self.statistic_bits, self.rows))
        self.grid = Grid(scale[:, 0], statistics_of(self.zeros[-1], self.rows)[:, 0])

    def round(self, column: int, values: Tensor) -> Tensor:
        codes = code_of(values, self.grid, self.bits)
        self.codes[:, column] = codes.to(torch.uint8)
        return level_of(codes, self.grid)

    def result(self) -> Bilevel:
        """Codes and statistics of all columns."""
        scales, zeros = (
            Levels(*(torch.cat(parts, 1) for parts in zip(*groups, strict=True)))
            for groups in (self.scales, self.zeros)
        )
        return Bilevel(self.codes, scales, zeros)
