"""NormalFloat codes by the calibrated column solver: scales by what their block needs, codes with feedback.

    t    scales of the second level, from the largest numbers of the weight as it is given
    s'   a block's scale once feedback has reached it: of the codes for shares of its largest number, the one with the
         least error, where an error at column j counts 1 / U_jj^2
    w'   the nearest level of every weight, column by column; later columns make up for its error

Blocks, levels and second-level scales are those of linalg/normal_float.py; the solver is linalg/columns.py.
"""

import torch
from torch import Tensor

from spectrim.linalg.columns import solve_columns
from spectrim.linalg.normal_float import (
    Form,
    NormalRounded,
    blocks_in,
    nearest_level,
    normal_levels,
    scales_of,
    second_level,
)
from spectrim.linalg.quantise import divisor

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Of a block's largest number, what its scale may be: numbers beyond it are cut to it, all others lie closer."""


class NormalRule:
    """A scale code for each block of each row, then codes, a column at a time."""

    def __init__(self, weight: Tensor, form: Form) -> None:
        self.form, self.unit = form, form.block
        blocks, _ = blocks_in(len(weight), weight.shape[1], form)
        self.scales = second_level(weight, form)
        self.top = scales_of(
            torch.full((len(weight), blocks), 2**form.scale_bits - 1, device=weight.device), self.scales, form
        )
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.scale_codes = torch.empty(len(weight), blocks, dtype=torch.uint8, device=weight.device)
        self.levels = normal_levels(form.bits).to(weight)
        self.scale = weight.new_zeros(len(weight))

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        """The scale of a block (O, block) for each row."""
        block, steps = start // self.unit, 2**self.form.scale_bits
        top, counts = self.top[:, block], diagonal.square().reciprocal()
        largest = weight.abs().amax(1)
        best = torch.full_like(largest, torch.inf)
        for share in SHARES:
            codes = (share * largest / divisor(top) * steps - 1).round().clamp(0, steps - 1)
            scale = top * (codes + 1) / steps
            parts = (weight / divisor(scale)[:, None]).clamp(-1, 1)
            missing = self.levels[nearest_level(parts, self.form.bits)] * scale[:, None] - weight
            error = (missing.square() * counts).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            self.scale = torch.where(better, scale, self.scale)
            self.scale_codes[:, block] = torch.where(better, codes.to(torch.uint8), self.scale_codes[:, block])

    def round(self, column: int, values: Tensor) -> Tensor:
        """The nearest levels of a column (O,)."""
        codes = nearest_level((values / divisor(self.scale)).clamp(-1, 1), self.form.bits)
        self.codes[:, column] = codes.to(torch.uint8)
        return self.levels[codes] * self.scale


def round_columns_to_normal(weight: Tensor, upper: Tensor, form: Form) -> NormalRounded:
    """`weight` (O, I) in codes for inputs with `upper` (I, I) of `inverse_root`; both float64."""
    rule = NormalRule(weight, form)
    solve_columns(weight, upper, rule)
    return NormalRounded(rule.codes, rule.scale_codes, rule.scales)
