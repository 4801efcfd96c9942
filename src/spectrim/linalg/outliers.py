"""A few entries of a matrix kept apart in 16 bits: which ones, and where they stand in few bytes.

Positions are numbers row * I + column, ascending; stored are the gaps between them, one byte each:

    a byte below 255    that many entries are passed over, the next one is kept
    255                 255 entries are passed over

At 1 % that is 1.1 bytes an entry, where a column index of two bytes and a counter for each row take more than two.
"""

from collections.abc import Callable
from math import inf, sqrt
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from spectrim.linalg.columns import Rule, solve_columns
from spectrim.linalg.quantise import Grid, as_stored, code_of, fit_grid, level_of

R = TypeVar("R", bound=Rule)
JUMP = 255
"""Entries passed over by the byte that keeps none."""
RAISE = 4.0
BISECTIONS = 3


class Entries(NamedTuple):
    """Entries of a matrix (O, I)."""

    positions: Tensor  # (N,) int64, row * I + column, ascending
    values: Tensor  # (N,)


def entries_at(matrix: Tensor, mask: Tensor) -> Entries:
    """Those of `matrix` (O, I) that `mask` (O, I) bool marks."""
    positions = mask.flatten().nonzero().squeeze(-1)
    return Entries(positions, matrix.flatten()[positions])


def with_entries(matrix: Tensor, entries: Entries) -> Tensor:
    """`matrix` (O, I) with these entries in the place of its own; gradients reach both."""
    flat = matrix.reshape(-1).index_put((entries.positions,), entries.values.to(matrix.dtype))
    return flat.reshape(matrix.shape)


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of all scores (O, I) are: a mask (O, I) bool; of equal ones the first."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    return (
        torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).index_fill_(0, order, True).view_as(scores)
    )


# ---------- positions as gaps


def to_gaps(positions: Tensor) -> Tensor:
    """Ascending positions (N,) to bytes (M,) uint8."""
    before = torch.cat([positions.new_full((1,), -1), positions[:-1]])
    gaps = positions - before - 1
    jumps = gaps // JUMP
    ends = (jumps + 1).cumsum(0)
    stream = torch.full((int(ends[-1]) if len(ends) else 0,), JUMP, dtype=torch.uint8, device=positions.device)
    stream[ends - 1] = (gaps % JUMP).to(torch.uint8)
    return stream


def from_gaps(stream: Tensor) -> Tensor:
    """The inverse of `to_gaps`: positions (N,) int64, ascending whatever the bytes are."""
    kept = stream < JUMP
    return (stream.long() + kept).cumsum(0)[kept] - 1


def most_gap_bytes(numbers: int, entries: int) -> int:
    """The most bytes that so many entries of a matrix of so many numbers take."""
    return entries + (numbers - entries) // JUMP if entries else 0


# ---------- outliers of the column solver (SpQR, arXiv 2306.03078)


def leave_one_out(groups: Tensor, bits: int, importance: Tensor, *, symmetric: bool) -> Tensor:
    """How much less a group (R, n) loses when one weight is kept out of it: gains (R, n), for each weight in turn.

    The grid is fitted to the others anew; losses are squared errors, weighted by `importance` (n,).
    """
    whole = _costs(groups, bits, importance, symmetric=symmetric)
    gains = whole.clone()  # the grid stays where neither the smallest nor the largest weight goes
    for place in (groups.argmin(1, keepdim=True), groups.argmax(1, keepdim=True)):
        neighbour = groups.gather(1, (place + 1) % groups.shape[1])  # moves no grid, and is not counted in this place
        others = _costs(groups.scatter(1, place, neighbour), bits, importance, symmetric=symmetric)
        lost = others.scatter(1, place, 0).sum(1, keepdim=True)
        gains.scatter_(1, place, whole.sum(1, keepdim=True) - lost)
    return gains


def _costs(groups: Tensor, bits: int, importance: Tensor, *, symmetric: bool) -> Tensor:
    grid = Grid(*(part[:, None] for part in fit_grid(groups, bits, symmetric=symmetric)))
    return (level_of(code_of(groups, grid, bits), grid) - groups).square() * importance


class OutlierRule:
    """Another rule, with weights that it would round at a cost above `limit` kept as they are, in bfloat16.

    The cost of a weight is (w - w')^2 / U_jj^2, what is left of its error when later columns have made up for what they
    can. Grids of the other rule are fitted without the weights that are likely to be kept, for which the others gain
    more than `limit`: the mean of the rest stands in for them.
    """

    def __init__(self, weight: Tensor, inner: Rule, bits: int, limit: float, *, symmetric: bool = False) -> None:
        self.inner, self.bits, self.limit, self.symmetric = inner, bits, limit, symmetric
        self.unit = inner.unit
        self.diagonal = torch.ones_like(weight[0])
        self.values = torch.zeros_like(weight)
        self.kept = torch.zeros_like(weight, dtype=torch.bool)

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        gains = leave_one_out(weight, self.bits, diagonal.square().reciprocal(), symmetric=self.symmetric)
        likely = gains > self.limit
        rest = torch.where(likely, 0, weight)
        mean = rest.sum(1, keepdim=True) / (~likely).sum(1, keepdim=True).clamp(min=1)
        self.diagonal[start : start + len(diagonal)] = diagonal
        self.inner.begin(start, torch.where(likely, mean, weight), diagonal)

    def round(self, column: int, values: Tensor) -> Tensor:
        rounded = self.inner.round(column, values)
        costs = ((values - rounded) / self.diagonal[column]).square()
        self.kept[:, column] = kept = costs > self.limit
        self.values[:, column] = torch.where(kept, as_stored(values), 0)
        return torch.where(kept, self.values[:, column], rounded)

    @property
    def entries(self) -> Entries:
        """What was kept as it is."""
        return entries_at(self.values, self.kept)


def outlier_limit(weight: Tensor, upper: Tensor, threshold: float) -> float:
    """A share of the mean cost of setting a weight to its column's mean: threshold mean_j Var_i(W_ij) / U_jj^2.

    At least a millionth of that of setting it to 0: where all rows are equal, or there is one, nothing varies.
    """
    columns = upper.diagonal().square()
    varies, whole = (float((size / columns).mean()) for size in (weight.var(0, correction=0), weight.square().mean(0)))
    return threshold * max(varies, 1e-6 * whole)


def solve_with_outliers(
    weight: Tensor, upper: Tensor, fresh: Callable[[], R], bits: int, limit: float, most: int
) -> tuple[R, Entries]:
    """The rule, full, and at most so many entries kept; `fresh` makes the rule that rounds the others.

    How many weights cost more than `limit` is known at the end of a sweep. Where they are too many it is raised, by
    factors of RAISE and then by bisection, to near the lowest under which they are not, with a sweep for each.
    """

    def sweep(at: float) -> tuple[R, Entries]:
        inner = fresh()
        rule = OutlierRule(weight, inner, bits, at)
        solve_columns(weight, upper, rule)
        return inner, rule.entries

    low = high = limit if most else inf
    found = sweep(high)
    while len(found[1].positions) > most:
        low, high = high, RAISE * high if 0 < high < 1e300 else inf
        found = sweep(high)
    for _ in range(BISECTIONS if low < high < inf else 0):
        middle = sqrt(low * high)
        tried = sweep(middle)
        if len(tried[1].positions) > most:
            low = middle
        else:
            high, found = middle, tried
    return found
