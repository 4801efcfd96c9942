"""What an any-size run finds: components in order, when each layer grows, how strongly each component counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg.factor import Spectrum
from spectrim.linalg.ladder import growth_order, hull_slopes, ladder_costs, ladder_errors, levels_of
from spectrim.method import LayerMethod
from spectrim.models.walk import Layer, Walk


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one run found: components in order, their scores at each anchor, and when each layer grows."""

    spectra: Mapping[str, Spectrum]
    anchors: tuple[float, ...]  # sizes of the rows of the scores, descending from 1
    scores: Mapping[str, Tensor]  # (A, K)
    levels: Mapping[str, Tensor]  # (S,)
    adapter_rank: int = 0
    """The first so many components of every layer are an adapter, which is there at every size."""
    losses: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts of one engine, JSON-ready."""


def closed_order(method: LayerMethod, walk: Walk, spectra: Mapping[str, Spectrum], anchors: tuple[float, ...]) -> Order:
    """Components in the order of their spectra, all scores 1; one row of scores would do, the anchors are kept."""
    worth = [
        worth_of_steps(method, la, ladder_costs(la.outputs, la.inputs, method.alone), spectra[la.name].energy)
        for la in walk.layers
    ]
    levels = levels_of(growth_order(worth), len(walk.layers))
    rows = (1.0, *anchors)
    return Order(
        spectra=spectra,
        anchors=rows,
        scores={name: torch.ones(len(rows), len(s.energy)) for name, s in spectra.items()},
        levels={layer.name: level for layer, level in zip(walk.layers, levels, strict=True)},
    )


def worth_of_steps(method: LayerMethod, layer: Layer, costs: Tensor, price: Tensor) -> Tensor:
    """What each step of a ladder with `costs` (S+1,) is worth (S,), not ascending; `price` (K,) strongest first.

    Global budget: error saved a number. Equal shares: the layer that has the smaller share grows first.
    """
    if method.allocation == "uniform":
        return -costs[1:].double() / layer.weight_numbers
    return hull_slopes(costs, ladder_errors(price, len(costs)).cpu())
