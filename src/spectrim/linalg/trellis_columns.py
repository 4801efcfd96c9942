"""A weight in trellis codes, later columns making up for the error of earlier ones.

A weight (O, I) is cut into strips of 16 rows. The stream of a strip runs down its first column, then its second, and so
on: one stream of 16 I weights, which starts in state 0 and needs no other bits. Each row has a scale of its own.

    for each few columns b, in order, all strips at once
        path of least   sum_ij c_i (w_ij - s_i v_ij)^2 / U_jj^2    through b and a little beyond, where the strip stands
        e = (w_b - w'_b) U_bb^-1,     W[:, b+] -= e U[b, b+]       U^T U = H^-1, as in linalg/columns.py

A path is looked for beyond the columns that it decides (`AHEAD` steps): else each piece would end where it pleases
and leave the next one a bad start (squared error at 2 bits: .088 in pieces of 64 weights, .077 so, .073 in one piece).

Source: block feedback of QuIP# and QTIP (arXiv 2402.04396, 2406.11235); streams that go on across pieces are ours.
"""

from math import erfc, exp, pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.bits import VALUE_BYTES, Account
from spectrim.linalg.outliers import Entries, entries_at
from spectrim.linalg.quantise import as_stored, packed_width
from spectrim.linalg.trellis import Rate, code_table, decode, distortion, viterbi

STRIP = 16
BLOCK = 8
"""Columns that are decided at once: errors inside a block are not made up for, and the ends of blocks cost something.
On a weight of the reference model the error is .0716, .0655, .0623, .0616, .0619 of 1, 2, 4, 8, 16 at 2 bits."""
AHEAD = 8


SCALES = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""Of a row's root mean square, that are considered: a table ends, and rows with large weights may need more of it."""


class Coded(NamedTuple):
    """A weight (O, I) in codes."""

    codes: Tensor  # (strips, steps) uint8
    scales: Tensor  # (O,) exact in bfloat16


def strips_of(outputs: int) -> int:
    """Strips of a weight; the last is filled up with rows that are not there."""
    return -(-outputs // STRIP)


def steps_of(inputs: int, rate: Rate) -> int:
    """Codes in the stream of a strip."""
    return inputs * STRIP // rate.width


def trellis_account(outputs: int, inputs: int, rate: Rate) -> Account:
    """Codes and scales."""
    return Account(
        codes=strips_of(outputs) * packed_width(steps_of(inputs, rate), rate.step_bits), scales=outputs * VALUE_BYTES
    )


def decode_weight(coded: Coded, rate: Rate, inputs: int, table: Tensor) -> Tensor:
    """The weight (O, I), in the dtype of `table`."""
    return unscaled_weight(coded.codes, rate, len(coded.scales), inputs, table) * coded.scales.to(table.dtype)[:, None]


def unscaled_weight(codes: Tensor, rate: Rate, outputs: int, inputs: int, table: Tensor) -> Tensor:
    """The weight (O, I) for scales of 1, in the dtype of `table`."""
    return decode(codes, rate, table).view(len(codes), inputs, STRIP).mT.flatten(0, 1)[:outputs]


def trellis_columns(
    weight: Tensor, upper: Tensor, rate: Rate, *, importance: Tensor | None = None, block: int = BLOCK
) -> Coded:
    """`weight` (O, I) in codes for `upper` (I, I) of `columns.inverse_root`, float64.

    `importance` (O,) says what an error of each row counts (default: all the same). Codes are chosen for the rows'
    root mean squares as scales; the scales that are kept are the best for these codes (least squares in the metric).
    """
    return trellis_with_entries(weight, upper, rate, None, importance=importance, block=block)[0]


def trellis_with_entries(
    weight: Tensor,
    upper: Tensor,
    rate: Rate,
    kept: Tensor | None,
    *,
    importance: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Coded, Entries]:
    """As `trellis_columns`, with the entries where `kept` (O, I) bool is true beside the codes, exact in bfloat16.

    They take what feedback has made of them by the time their column comes, and whatever the codes say there does not
    count.
    """
    others = None if kept is None else ~kept
    own = weight if others is None else weight * others
    best = row_losses(own, upper, rate.window).best(within_table(rate))
    scales = as_stored(own.square().mean(1).sqrt() * best.scales)
    coded, stored = _path(weight, upper, rate, scales, importance, block, kept)
    table = code_table(rate, weight.device, torch.float64)
    unscaled = unscaled_weight(coded.codes, rate, len(weight), weight.shape[1], table)
    if kept is None or others is None:
        entries = Entries(torch.empty(0, dtype=torch.int64, device=weight.device), weight.new_empty(0))
    else:
        entries = entries_at(stored, kept)
        weight, unscaled = weight - torch.where(kept, stored, 0), unscaled * others
    # Of either sign: a row whose errors hardly count is coded as its neighbours like it, and may come out reversed.
    return coded._replace(scales=as_stored(best_scales(weight, unscaled, upper))), entries


class RowLosses(NamedTuple):
    """What codes of the rows lose for each of `SCALES`, up to what an output counts."""

    size: Tensor  # (O,) mean square times sum_j 1 / U_jj^2: times D and the scale squared, the code's error
    overload: Tensor  # (scales, O) sum_j of squares beyond the table's end / U_jj^2

    def best(self, distortion: float) -> "BestScales":
        """The least loss of each row and the scale that has it."""
        squares = torch.tensor(SCALES, dtype=self.size.dtype, device=self.size.device).square()[:, None]
        least = (distortion * squares * self.size + self.overload).min(0)
        return BestScales(least.values, squares[:, 0].sqrt()[least.indices])


class BestScales(NamedTuple):
    """Both (O,)."""

    losses: Tensor
    scales: Tensor


def code_end(window: int) -> float:
    """The largest value of a table, in units of the scale; all rates have the same quantiles."""
    return float(code_table(Rate(1, 1, window)).max())


def within_table(rate: Rate) -> float:
    """D without what a normal weight loses beyond the table's end, which `RowLosses` counts by itself."""
    end, whole = code_end(rate.window), distortion(rate)
    tail, density = erfc(end / sqrt(2)), 2 * exp(-(end**2) / 2) / sqrt(2 * pi)
    return max(whole - ((1 + end**2) * tail - end * density), whole / 2)


def row_losses(weight: Tensor, upper: Tensor, window: int) -> RowLosses:
    """For a weight (O, I); nothing of it is coded."""
    columns = upper.diagonal().square().reciprocal()
    squares = weight.square().mean(1)
    ends = [code_end(window) * scale * squares.sqrt()[:, None] for scale in SCALES]
    overload = torch.stack([(weight.abs() - end).clamp(min=0).square() @ columns for end in ends])
    return RowLosses(squares * columns.sum(), overload)


def best_scales(weight: Tensor, unscaled: Tensor, upper: Tensor) -> Tensor:
    """For each row the s of least (w - s v) H (w - s v)^T, H^-1 = U^T U; 0 where v is 0."""
    whitened = torch.linalg.solve_triangular(upper, torch.stack([weight, unscaled]), upper=True, left=False)
    # w H w^T = |w U^-1|^2, since H = U^-1 U^-T
    cross, own = (whitened[0] * whitened[1]).sum(1), whitened[1].square().sum(1)
    return torch.where(own > 0, cross / own.clamp(min=torch.finfo(own.dtype).tiny), 0.0)


def _path(
    weight: Tensor,
    upper: Tensor,
    rate: Rate,
    scales: Tensor,
    importance: Tensor | None,
    block: int,
    kept: Tensor | None,
) -> tuple[Coded, Tensor]:
    """Codes for these scales, and the weight (O, I) that they and the entries kept stand for."""
    outputs, inputs = weight.shape
    strips, device = strips_of(outputs), weight.device
    table = code_table(rate, device)
    missing = strips * STRIP - outputs
    now = torch.nn.functional.pad(weight, (0, 0, 0, missing))
    free = None if kept is None else torch.nn.functional.pad(kept, (0, 0, 0, missing))
    divisors = torch.nn.functional.pad(
        torch.where(scales > 0, scales, torch.ones_like(scales)), (0, missing), value=1.0
    )
    rows = torch.nn.functional.pad(scales.square() * (1 if importance is None else importance), (0, missing))
    rows = rows / rows.mean().clamp(min=1e-300)
    columns = upper.diagonal().square().reciprocal()
    columns = columns / columns.mean()
    state = torch.zeros(strips, dtype=torch.int64, device=device)
    codes = torch.empty(strips, steps_of(inputs, rate), dtype=torch.uint8, device=device)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        beyond = min(stop + 1, inputs)
        targets = (now[:, start:beyond] / divisors[:, None]).view(strips, STRIP, -1).mT.reshape(strips, -1, rate.width)
        prices = torch.outer(rows, columns[start:beyond])
        if free is not None:
            prices = torch.where(free[:, start:beyond], 0, prices)
        costs = prices.view(strips, STRIP, -1).mT.reshape(strips, -1, rate.width)
        here = (stop - start) * STRIP // rate.width
        seen = slice(0, here + AHEAD)
        path = viterbi(targets[:, seen].float(), costs[:, seen].float(), state, rate)
        states = path.states[:, :here]
        state = states[:, -1]
        first = start * STRIP // rate.width
        codes[:, first : first + here] = (states & ((1 << rate.step_bits) - 1)).to(torch.uint8)
        values = table[states].double().view(strips, stop - start, STRIP).mT.reshape(-1, stop - start)
        stored = values * divisors[:, None]
        if free is not None:
            stored = torch.where(free[:, start:stop], as_stored(now[:, start:stop]), stored)
        error = now[:, start:stop] - stored
        now[:, start:stop] = stored
        spread = torch.linalg.solve_triangular(upper[start:stop, start:stop], error, upper=True, left=False)
        now[:, stop:] -= spread @ upper[start:stop, stop:]
    return Coded(codes, scales), now[:outputs]
