"""Codebooks: each row of a weight has 2^bits levels of its own where they serve best (SqueezeLLM, arXiv 2306.07629).

The levels of a row minimise the weighted sum of squares  sum_i f_i (w_i - level_c(i))^2, f the importance of each
weight: weighted k-means on a line. There clusters are intervals of the sorted weights, so that

    exact       dynamic programming over where the intervals end: the oracle, slow, one row at a time
    fast        the same between a few bins, for all rows together, then Lloyd's steps by prefix sums
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.quantise import as_stored
from spectrim.linalg.running import running_sum

CODEBOOK_BITS = (2, 3, 4)
STEPS = 50
"""Lloyd's steps at most."""
BINS = 6
"""For each level, in the seeding."""
ROWS = 64
"""Worked on at a time: the seeding takes the square of the bins for each."""


class Codebook(NamedTuple):
    """A weight (O, I) in codes."""

    codes: Tensor  # (O, I) uint8
    table: Tensor  # (O, 2^bits), ascending, exact in bfloat16


class _Sorted(NamedTuple):
    values: Tensor  # (R, n) ascending
    mass: Tensor  # (R, n + 1) sum of the importance before each
    moment: Tensor  # (R, n + 1) of importance times value
    square: Tensor  # (R, n + 1) of importance times value squared


def from_codebook(codebook: Codebook, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (O, I) that codes stand for."""
    table = codebook.table if dtype is None else codebook.table.to(dtype)
    return table.gather(1, codebook.codes.long())


def fit_codebook(weight: Tensor, importance: Tensor, bits: int) -> Codebook:
    """A table for each row of `weight` (O, I) and the nearest level of each weight; `importance` (O, I) >= 0.

    A weight of importance 0 has no say in the table. In a row in which none has any, all count alike.
    """
    table = as_stored(kmeans(weight, importance, 2**bits)).sort(1).values
    middles = (table[:, 1:] + table[:, :-1]) / 2
    return Codebook(torch.searchsorted(middles, weight.contiguous()).to(torch.uint8), table)


def kmeans(values: Tensor, importance: Tensor, count: int) -> Tensor:
    """Levels (R, count), ascending, of rows (R, n), near the best; all rows together."""
    if len(values) > ROWS:
        pairs = zip(values.split(ROWS), importance.split(ROWS), strict=True)
        return torch.cat([kmeans(own, weights, count) for own, weights in pairs])
    weighed = torch.where(importance.sum(1, keepdim=True) > 0, importance, torch.ones_like(importance))
    order = values.argsort(1)
    ordered, weights = values.gather(1, order), weighed.gather(1, order)
    sums = [_before(weights * ordered**power) for power in range(3)]
    rows = _Sorted(ordered.contiguous(), *sums)
    return _lloyd(rows, _seeds(rows, weights, count))


def _before(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(running_sum(terms, 1), (1, 0))


def _seeds(rows: _Sorted, weights: Tensor, count: int) -> Tensor:
    """The best levels (R, count) of clusters that end between bins of neighbouring weights: dynamic programming."""
    edges = _bin_edges(rows, weights, BINS * count)
    mass, moment, square = (part.gather(1, edges) for part in rows[1:])
    costs = _between(square) - _ratio(_between(moment).square(), _between(mass))
    costs = costs.clamp(min=0).masked_fill(_between(edges) < 0, torch.inf)  # [r, b, a] of bins a up to b
    best, choices = costs[:, :, 0], []
    for _ in range(count - 1):
        best, came = (best[:, None, :] + costs).min(2)
        choices.append(came)
    end = torch.full_like(edges[:, :1], edges.shape[1] - 1)
    cuts = [end]
    for came in reversed(choices):
        end = came.gather(1, end)
        cuts.append(end)
    ends = torch.cat([torch.zeros_like(end), *reversed(cuts)], 1)
    inside, sums = (part.gather(1, ends).diff(dim=1) for part in (mass, moment))
    first = rows.values.gather(1, edges.gather(1, ends[:, :-1]).clamp(max=rows.values.shape[1] - 1))
    return torch.where(inside > 0, sums / inside, first)


def _bin_edges(rows: _Sorted, weights: Tensor, bins: int) -> Tensor:
    """Ends (R, bins + 1) of bins as narrow as the best levels are dense where they are many: as the third root of the
    importance along the line (Panter and Dite 1951).
    """
    values, n = rows.values, rows.values.shape[1]
    padded = torch.nn.functional.pad(values[:, None], (1, 1), mode="replicate")[:, 0]
    widths = (padded[:, 2:] - padded[:, :-2]) / 2
    sums = running_sum((weights * widths.square()).pow(1 / 3), 1)
    shares = torch.arange(1, bins, device=values.device, dtype=values.dtype) / bins
    inner = torch.searchsorted(sums, (sums[:, -1:] * shares).contiguous())
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)


def _between(sums: Tensor) -> Tensor:
    """[r, b, a] = sums[r, b] - sums[r, a]."""
    return sums[:, :, None] - sums[:, None, :]


def _ratio(of: Tensor, to: Tensor) -> Tensor:
    """0 where the divisor is not above 0."""
    return torch.where(to > 0, of / to, torch.zeros_like(of))


def _ends(rows: _Sorted, levels: Tensor) -> Tensor:
    """Where the interval of each level begins and the last ends: (R, count + 1)."""
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    inner = torch.searchsorted(rows.values, middles)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=rows.values.shape[1])


def _lloyd(rows: _Sorted, levels: Tensor) -> Tensor:
    """Each level to the mean of the weights that are nearest to it, until none moves; one without weights stays."""
    ends = _ends(rows, levels)
    for _ in range(STEPS):
        mass, moment = (part.gather(1, ends).diff(dim=1) for part in (rows.mass, rows.moment))
        levels = (
            torch.where(mass > 0, moment / mass, levels).clamp(rows.values[:, :1], rows.values[:, -1:]).sort(1).values
        )
        before, ends = ends, _ends(rows, levels)
        if torch.equal(before, ends):
            break
    return levels


def kmeans_exact(values: Tensor, importance: Tensor, count: int) -> tuple[Tensor, float]:
    """The best levels (at most `count`, ascending) of values (n,) and their cost: count n^2 steps."""
    order = values.argsort()
    ordered, weights = values[order].double(), importance[order].double()
    n = len(ordered)
    mass, moment, square = (_before((weights * ordered**power)[None])[0] for power in range(3))

    def cost(first: Tensor, end: int) -> Tensor:
        """Of one level for the values from each of `first` on, up to `end`."""
        m, s = mass[end] - mass[first], moment[end] - moment[first]
        return (square[end] - square[first] - torch.where(m > 0, s.square() / m, torch.zeros_like(m))).clamp(min=0)

    best = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    choices = []
    for _ in range(count):
        new, came = best.clone(), torch.arange(n + 1)  # a level that is not used costs nothing
        for end in range(1, n + 1):
            first = torch.arange(end)
            totals = best[:end] + cost(first, end)
            at = int(totals.argmin())
            if totals[at] < new[end]:
                new[end], came[end] = totals[at], at
        best = new
        choices.append(came)
    levels, end = [], n
    for came in reversed(choices):
        first = int(came[end])
        if first < end:
            m = mass[end] - mass[first]
            levels.append((moment[end] - moment[first]) / m if m > 0 else ordered[first])
        end = first
    return torch.stack(levels[::-1]), float(best[n])
