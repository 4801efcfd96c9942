"""Ranks by a method's own order of removal: one layer after the other loses its last component, down to the budget."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from spectrim.engines.ranks import Plan, Priced, budget_under, menu_of, plan_of, rank_step
from spectrim.errors import NumericalError
from spectrim.linalg.allocate import cut_in_order
from spectrim.linalg.factor import Spectrum
from spectrim.method import OrderedMethod
from spectrim.models.walk import Walk, weight_of
from spectrim.stats import Stats


def ordered_plan(
    method: OrderedMethod,
    dense: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    stats: Mapping[str, Stats],
    keep: float,
) -> Plan:
    """Targets that keep `keep` of the numbers. Removals save nothing until a layer takes less than when dense."""
    # The order names single components, so the menu has every rank; multiples come last, downwards.
    menu = menu_of(method, walk, {name: spectrum.energy for name, spectrum in spectra.items()}, step=1)
    if keep >= 1:
        return plan_of(menu, [len(own.targets) - 1 for own in menu], walk)
    prices = [
        method.prices(weight_of(dense.get_submodule(la.name)).detach().double(), spectra[la.name], stats[la.name]).cpu()
        for la in walk.layers
    ]
    for own, price in zip(menu, prices, strict=True):
        if not bool(torch.isfinite(price).all()):
            raise NumericalError(
                f"{own.layer.name}: {int((~price.isfinite()).sum())} of {len(price)} prices of its components are NaN "
                f"or Inf ({method.info.name}); use more calibration text"
            )
    costs = [costs_by_rank(own, len(price)) for own, price in zip(menu, prices, strict=True)]
    kept = cut_in_order(costs, method.removal_order(prices), budget_under(method, walk, keep))
    return plan_of(menu, [_rounded(own, rank, method) for own, rank in zip(menu, kept, strict=True)], walk)


def _rounded(own: Priced, rank: int, method: OrderedMethod) -> int:
    """The place in a menu of every rank, for a rank down to a multiple; the dense layer is the last."""
    if rank >= len(own.targets):
        return len(own.targets) - 1
    step = rank_step(own.layer, method.rank_multiple)
    return max(1, rank // step * step) - 1


def costs_by_rank(own: Priced, components: int) -> torch.Tensor:
    """Numbers (K,) of rank 1, 2, ..., K: where a rank does not pay, those of the dense layer."""
    dense = own.options.cost[-1]
    paying = own.options.cost[:-1]
    return torch.cat([paying, dense.expand(components - len(paying))])
