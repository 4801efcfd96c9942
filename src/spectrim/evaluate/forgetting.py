"""What compressed language models forget: robustness beside accuracy (arXiv 2110.08419).

    gap    = accuracy on a task - accuracy on a shifted form of it (other sources, harder, adversarial)
    bias   = gap of the compressed model / gap of the dense one        above 1: compression cost robustness

Where the dense model's own gap is about 0 the ratio explodes: it is then None, and the gaps stand for themselves. A
model near chance on the shifted task has nothing left to lose there, which makes its gap small for a bad reason.
"""

import math
from dataclasses import dataclass

from spectrim.evaluate.intervals import Z95, Interval


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Both gaps with 95 % intervals of two independent shares, and the relative bias where it means anything."""

    gap: float
    gap_interval: Interval
    dense_gap: float
    dense_gap_interval: Interval
    relative_bias: float | None


def gap_interval(share: float, shifted: float, items: float, shifted_items: float) -> Interval:
    """Of `share - shifted`, two shares of independent items; one item is added to each side of both, so that it keeps
    a width at 0 and 1 (Agresti and Caffo 2000)."""
    n, m = items + 2, shifted_items + 2
    p, q = (share * items + 1) / n, (shifted * shifted_items + 1) / m
    half = Z95 * math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
    return Interval(max(p - q - half, -1.0), min(p - q + half, 1.0))


def forgetting(model: tuple[float, float], dense: tuple[float, float], items: tuple[float, float]) -> Forgetting:
    """From accuracies (task, shifted) of both models, and how many items each task has.

    The relative bias is None where the interval of the dense gap holds 0.
    """
    gap, dense_gap = model[0] - model[1], dense[0] - dense[1]
    around = gap_interval(*dense, *items)
    known = not around.low <= 0 <= around.high
    return Forgetting(
        gap=gap,
        gap_interval=gap_interval(*model, *items),
        dense_gap=dense_gap,
        dense_gap_interval=around,
        relative_bias=gap / dense_gap if known else None,
    )
