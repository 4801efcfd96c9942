"""One option for each layer, with the least sum of errors under a budget: the multiple-choice knapsack, exactly.

    minimise  sum_l error_l(k_l)   subject to   sum_l cost_l(k_l) <= budget,   one k_l for each layer l

as a 0/1 program for the branch and cut of HiGHS (`scipy.optimize.milp`), down to a gap of 0. `linalg/allocate.py` does
the same by one price for all layers (the convex hull of each menu) and a greedy fill: no package needed, and worse than
the optimum by at most what one layer can gain. It is the check here: the answer is never worse than that one's.

Options that another one of their layer beats in both are left out before. Costs and errors are scaled to about 1e4, so
that HiGHS's absolute tolerances (1e-6) are relative ones: "exactly" is to 1e-9 of the largest error and of the budget,
and the budget itself is held in whole numbers.

Branch and cut can take very long on menus whose options are worth nearly the same. It is stopped after `TIME_LIMIT_S`,
with the best choice that it has by then and the gap to what it could not rule out, which `Settled` tells.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, pairwise
from math import exp, log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.allocate import Options, allocate, padded
from spectrim.linalg.solver import SolverError

SIZE = 1e4
"""Of scaled costs and errors."""
TIME_LIMIT_S = 120.0
"""Of one call of HiGHS, wall time; menus of 224 layers are solved in a second or two."""
OPTIMAL, LIMIT_REACHED = 0, 1
"""Of `scipy.optimize.milp`'s status."""
GOLDEN, PRICES = 0.6180339887498949, 80
TRIES = 8
"""With a budget lower by what rounding went over it."""


def has_solver() -> bool:
    """Whether SciPy, which brings HiGHS, is installed; the package's extra `ilp`."""
    return find_spec("scipy") is not None


class Settled(NamedTuple):
    """A choice, and how much its errors may exceed those of the best choice there is, as a share of them."""

    choice: list[int]
    gap: float


def knapsack(layers: list[Options], budget: int, *, limit_s: float = TIME_LIMIT_S) -> Settled:
    """The index of the option each layer takes; the sum of costs never exceeds `budget`.

    The gap is 0 unless HiGHS was stopped after `limit_s` seconds; it is then of errors above the least of each layer.

    Errors are finite or infinite (never taken), of either sign; costs whole numbers. ValueError when the cheapest
    options do not fit, ModuleNotFoundError without SciPy, SolverError when HiGHS finds nothing that fits.
    """
    usable = [_usable(layer) for layer in layers]
    menus = [
        Options(error - error.min(), cost)  # `allocate` bounds its price by the largest error: least errors must be 0
        for error, cost in (
            (layer.error.double().cpu()[kept], layer.cost.long().cpu()[kept])
            for layer, kept in zip(layers, usable, strict=True)
        )
    ]
    by_price = allocate(menus, budget)
    found, bound = _optimum(menus, budget, limit_s)
    tried = [by_price] if found is None else [found, by_price]
    best = min(tried, key=lambda choice: total_error(menus, choice))
    gap = 0.0 if bound is None else _share_above(total_error(menus, best), max(bound, price_bound(menus, budget)))
    return Settled([int(kept[k]) for kept, k in zip(usable, best, strict=True)], gap)


def settle(layers: list[Options], budget: int, *, gap: float = 1e-3) -> Settled:
    """The choice by one price where that is proven to be within `gap` of the optimum, else by branch and cut.

    Without SciPy the former is taken whatever its gap, which is told. ValueError as `knapsack`.
    """
    choice = allocate(layers, budget)
    own = total_error(layers, choice)
    found = Settled(choice, _share_above(own, price_bound(layers, budget)))
    if found.gap <= gap or not has_solver():
        return found
    exact = knapsack(layers, budget)  # no worse than the choice above, whose gap then is one of this too
    return Settled(exact.choice, min(exact.gap, found.gap))


FRONTIER = (0.07, 0.08, 0.1, 0.12, 0.14, 0.17, 0.2, 0.23, 0.26, 0.3, 0.35, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Budgets of `frontier`, as shares of what all weights take dense."""


class Point(NamedTuple):
    """A choice under one budget: what its options cost together, and the sum of their errors."""

    cost: int
    error: float


def frontier(layers: list[Options], whole: int, shares: Sequence[float] = FRONTIER) -> list[Point]:
    """The least error that one price for all layers finds under each share of `whole`, dearest last.

    Budgets below the cheapest choice are left out, and so is a choice that no larger budget has changed.
    """
    least = sum(int(layer.cost.min()) for layer in layers)
    found: list[Point] = []
    for share in sorted(shares):
        budget = int(share * whole)
        if budget < least:
            continue
        choice = allocate(layers, budget)
        point = Point(total_cost(layers, choice), total_error(layers, choice))
        if not found or point.cost > found[-1].cost:
            found.append(point)
    return found


def price_bound(layers: list[Options], budget: int) -> float:
    """What no choice within `budget` is below: the largest, over prices p, of  sum_l min_k (error + p cost) - p budget.

    Concave in p: by golden sections over log p. Errors are finite and not negative.
    """
    errors, costs = padded(layers)

    def bound(log_price: float) -> float:
        price = exp(log_price)
        return float((errors + price * costs.double()).min(1).values.sum()) - price * budget

    largest = float(errors[torch.isfinite(errors)].max())
    low, high = log(max(largest, 1e-300) / max(budget, 1)) - 40.0, log(max(largest, 1e-300))
    best = max(0.0, float(errors.min(1).values.sum()))
    for _ in range(PRICES):
        a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        at_a, at_b = bound(a), bound(b)
        best = max(best, at_a, at_b)
        low, high = (a, high) if at_a < at_b else (low, b)
    return best


def _share_above(own: float, bound: float) -> float:
    return 0.0 if own <= bound else (own - bound) / own


def total_error(layers: list[Options], choice: list[int]) -> float:
    """The sum that is minimised."""
    return sum(float(layer.error[k]) for layer, k in zip(layers, choice, strict=True))


def total_cost(layers: list[Options], choice: list[int]) -> int:
    """The sum that the budget bounds."""
    return sum(int(layer.cost[k]) for layer, k in zip(layers, choice, strict=True))


def _usable(layer: Options) -> Tensor:
    """Indices of the options that no other beats in both error and cost, cheapest first."""
    error, cost = layer.error.double().cpu(), layer.cost.long().cpu()
    if bool(torch.isnan(error).any()) or not bool(torch.isfinite(error).any()):
        raise ValueError(f"errors of a layer are {error.tolist()[:8]}; NaN is no error, and one option must be finite")
    by_error = error.argsort(stable=True)
    order = by_error[cost[by_error].argsort(stable=True)]  # by cost, among equal costs by error
    before = torch.cat([error.new_full((1,), torch.inf), error[order].cummin(0).values[:-1]])
    return order[error[order] < before]


def _optimum(menus: list[Options], budget: int, limit_s: float) -> tuple[list[int] | None, float | None]:
    """The options that HiGHS finds best, and what no choice is below where it had no time to prove that (else None)."""
    least = sum(int(menu.cost.min()) for menu in menus)
    left = budget - least
    allowed = left
    for _ in range(TRIES):
        choice, bound = _solved(menus, allowed, limit_s)
        if choice is None:
            return None, bound
        over = total_cost(menus, choice) - budget
        if over <= 0:
            return choice, bound
        allowed -= over  # a sum that was within the tolerance of the budget and not within the budget
    raise SolverError(f"HiGHS went over the budget of {budget:,} in {TRIES} tries")


def _solved(menus: list[Options], left: int, limit_s: float) -> tuple[list[int] | None, float | None]:
    """One call of HiGHS, as `_optimum`; `left` is what may be spent above the cheapest options."""
    optimize, sparse = _scipy("scipy.optimize"), _scipy("scipy.sparse")
    extra = torch.cat([menu.cost - menu.cost.min() for menu in menus]).double()
    error = torch.cat([menu.error - menu.error.min() for menu in menus])
    if left >= int(extra.sum()) or float(error.max()) == 0:
        return [int(menu.error.argmin()) for menu in menus], None
    owner = torch.cat([torch.full((len(menu.cost),), row) for row, menu in enumerate(menus)])
    unit = max(left, 1) / SIZE
    entries = torch.cat([torch.ones(len(owner), dtype=torch.float64), extra / unit])
    rows = torch.cat([owner, torch.full_like(owner, len(menus))])
    columns = torch.arange(len(owner)).repeat(2)
    matrix = sparse.csr_array(
        (entries.numpy(), (rows.numpy(), columns.numpy())), shape=(len(menus) + 1, len(owner))
    )  # the last row is the budget
    # Costs are whole: half a unit above the budget forbids nothing that fits and allows nothing that does not.
    limits = optimize.LinearConstraint(matrix, [1.0] * len(menus) + [0.0], [1.0] * len(menus) + [(left + 0.5) / unit])
    answer = optimize.milp(
        (error * (SIZE / error.max())).numpy(),
        constraints=limits,
        integrality=[1] * len(owner),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": limit_s},
    )
    if answer.status not in (OPTIMAL, LIMIT_REACHED):
        raise SolverError(f"HiGHS found no optimum of {len(menus)} menus under {left:,}: {answer.message}")
    bound = None
    if answer.status == LIMIT_REACHED:
        above = float(answer.mip_dual_bound or 0.0) * float(error.max()) / SIZE
        bound = max(0.0, above) + sum(float(menu.error.min()) for menu in menus)
    if answer.x is None:  # no time to find any
        return None, bound
    starts = list(accumulate((len(menu.cost) for menu in menus), initial=0))
    taken = torch.from_numpy(answer.x)
    return [int(taken[a:b].argmax()) for a, b in pairwise(starts)], bound


def _scipy(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("scipy"):
            raise
        raise ModuleNotFoundError(
            "the exact knapsack needs SciPy (HiGHS), which is not installed; install spectrim[ilp]", name="scipy"
        ) from error
