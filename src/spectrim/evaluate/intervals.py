"""95 % intervals for shares of items, alone and paired.

Shares are means over groups of the mean within a group (BLiMP: 67 uids; elsewhere one group). The intervals use the
number of items that such a mean is worth, `effective_items`; they leave aside that strata lower the variance, and so
err to the wide side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def named(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A `dict_factory` of dataclasses.asdict that gives intervals as {low, high}."""
    return {key: value._asdict() if isinstance(value, Interval) else value for key, value in pairs}


def grouped_mean(values: Sequence[float], groups: Sequence[str]) -> float:
    """Mean over the groups of the mean in each."""
    sums: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        total = sums.setdefault(group, [0.0, 0])
        total[0] += value
        total[1] += 1
    return sum(total / count for total, count in sums.values()) / len(sums)


def effective_items(groups: Sequence[str]) -> float:
    """How many equally weighted items have the same variance: K^2 / sum 1/n_k, which is n for equal groups."""
    counts: dict[str, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    return len(counts) ** 2 / sum(1 / n for n in counts.values())


def wilson(share: float, num_items: float) -> Interval:
    """Wilson's score interval of a share (Wilson 1927)."""
    z2 = Z95**2 / num_items
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(share * (1 - share) / num_items + z2 / (4 * num_items))
    # At 0 and 1 an end is the share itself, which rounding must not pass.
    return Interval(min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))


def paired(won: float, lost: float, num_items: float) -> Interval:
    """Interval of `won - lost`: shares of the items that only the one, or only the other, of two models has right.

    Wald's interval for matched pairs with half an item added to each of the four cells (Agresti and Min 2005), which
    keeps a width when the two models never differ.
    """
    n = num_items + 2
    b, c = (won * num_items + 0.5) / n, (lost * num_items + 0.5) / n
    half = Z95 * math.sqrt((b + c - (b - c) ** 2) / n)
    return Interval(max(b - c - half, -1.0), min(b - c + half, 1.0))


def of_mean(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Interval | None:
    """Interval of the mean of independent values: Student's t times the standard error; None for fewer than two.

    Cut to [`least`, `most`], which the mean cannot leave (a share: 0 and 1): nothing that could be true is lost.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    half = student95(n - 1) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    # The mean itself may pass its bounds by rounding, and stays inside the interval.
    return Interval(min(max(mean - half, least), mean), max(min(mean + half, most), mean))


def student95(freedom: int) -> float:
    """Student's t at 97.5 %: exact for 1 and 2 degrees of freedom, else Hill's expansion (1970), 1e-3 at worst."""
    if freedom == 1:
        return 12.706204736174694
    if freedom == 2:
        return 4.302652729749462
    z, v = Z95, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4
