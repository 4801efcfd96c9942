"""What a run has seen of its layers, in a form small enough for report.json: spectra, what was kept of them, scores.

A spectrum of K values is kept at some of its places, half of them spaced evenly and half by a constant factor: the
steep head and the cut, which is anywhere, both show. Where the kept components are not the first ones (learned scores,
masks), the share of kept components between neighbouring places is kept too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

POINTS_MOST, POINTS_LEAST = 64, 8
ALL_POINTS = 16_384
"""Of all layers together, about: with more than 256 layers each gets fewer."""
DIGITS = 5
"""Of every value that is kept: more than a plot can show."""


def places(count: int, most: int) -> list[int]:
    """At most `most` (4 or more) ascending places in range(count), the first and the last among them."""
    if count <= most:
        return list(range(count))
    half, rest = most // 2, most - most // 2
    even = {round((count - 1) * i / (half - 1)) for i in range(half)}
    return sorted(even | {round(count ** (i / (rest - 1))) - 1 for i in range(rest)})


def points_for(layers: int) -> int:
    """How many places of each spectrum are kept when there are so many layers."""
    return max(POINTS_LEAST, min(POINTS_MOST, ALL_POINTS // max(layers, 1)))


def spectrum_of(energy: Tensor, kept: Tensor | None, rank: int | None, *, most: int) -> dict[str, Any]:
    """JSON-ready: singular values at some places, and how much of the energy and which components were kept.

    `energy` (K,) are squared singular values; `kept` (K,) bool says which were kept, or None for the first `rank`.
    Without a rank either, nothing is said of what was kept.
    """
    wide, order = energy.detach().double().cpu().clamp(min=0).sort(descending=True, stable=True)
    where = places(len(wide), most)
    facts: dict[str, Any] = {
        "components": len(wide),
        "places": where,
        "singular_values": [rounded(value) for value in wide[where].sqrt().tolist()],
    }
    if kept is None and rank is None:
        return facts
    mask = (torch.arange(len(wide)) < (rank or 0) if kept is None else kept.detach().cpu())[order]
    count, total = int(mask.sum()), float(wide.sum())
    facts |= {"kept": count, "energy_kept": rounded(float(wide[mask].sum()) / total) if total > 0 else 1.0}
    if bool(mask[count:].any()):
        ends = [*where[1:], len(wide)]
        shares = [float(mask[a:b].double().mean()) for a, b in zip(where, ends, strict=True)]
        facts["kept_shares"] = [round(share, 3) for share in shares]
    return facts


def spectra_of(
    energies: Mapping[str, Tensor], ranks: Mapping[str, int | None], kept: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, Any]]:
    """`spectrum_of` of every layer that was decomposed; `kept` names those whose components were chosen by a mask."""
    most = points_for(len(energies))
    return {name: spectrum_of(e, (kept or {}).get(name), ranks[name], most=most) for name, e in energies.items()}


def rounded(value: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{value:.{DIGITS - 1}e}")
