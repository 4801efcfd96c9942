"""Ranks for all layers at once, so that the stored numbers meet a budget.

    minimise  sum_l error_l(option)   subject to   sum_l cost_l(option) <= budget

Each layer offers options (a rank, or staying dense), each with an error and a cost. For a multiplier lambda every
layer takes the option with the least `error + lambda * cost`, by enumeration: the cost curves have cliffs (two
factors cost more than dense past the break-even rank) and bends (pivot storage is concave), on which greedy removal
goes wrong. Bisection finds the smallest lambda that fits; what is left is spent on the best single upgrades.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BISECTION_STEPS = 100


class Options(NamedTuple):
    """What one layer can be: `error` and `cost` (stored numbers) of each choice, both (num_options,)."""

    error: Tensor
    cost: Tensor


def factor_cost(outputs: int, inputs: int, rank: Tensor) -> Tensor:
    """Stored numbers of two factors."""
    return rank * (outputs + inputs)


def pivot_cost(outputs: int, inputs: int, rank: Tensor) -> Tensor:
    """Stored numbers in pivot storage: rows, coefficients, and the mask of pivot rows packed in bytes."""
    return rank * (outputs + inputs - rank) + (outputs + 7) // 8


def allocate(layers: list[Options], budget: int) -> list[int]:
    """The index of the option each layer takes. The cheapest options must fit; the sum never exceeds `budget`."""
    errors, costs = padded(layers)
    cheapest = int(costs.min(dim=1).values.sum())
    if cheapest > budget:
        raise ValueError(f"budget {budget:,} is below the cheapest choice of all layers, {cheapest:,}")
    scale = errors[torch.isfinite(errors)].max().clamp(min=torch.finfo(errors.dtype).tiny)
    # Start: as if money did not matter. If everything fits at the least error, take that.
    choice = _best(errors, costs, 0.0)
    if int(_total(costs, choice)) > budget:
        low, high = 0.0, float(scale)  # at `high` one stored number outweighs every possible error
        choice = _best(errors, costs, high)
        for _ in range(BISECTION_STEPS):
            middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
            trial = _best(errors, costs, middle)
            if int(_total(costs, trial)) <= budget:
                choice, high = trial, middle
            else:
                low = middle
            if high <= low * (1 + 1e-12):
                break
    return _spend_rest(errors, costs, choice, budget).tolist()


def fill_uniform(costs: list[Tensor], start: list[int], budget: int) -> list[int]:
    """Raise every layer's option by one in turn, cheapest share first, until no step fits the budget.

    `costs[l]` (num_options,) must ascend. Used by methods with equal ranks: what integer rounding left over
    (up to 0.3 % of the budget in small layers) is spent rather than lost.
    """
    choice = list(start)
    left = budget - sum(int(c[k]) for c, k in zip(costs, choice, strict=True))
    moved = True
    while moved:
        moved = False
        for layer in sorted(range(len(costs)), key=lambda i: choice[i] / max(1, len(costs[i]))):
            if choice[layer] + 1 >= len(costs[layer]):
                continue
            step = int(costs[layer][choice[layer] + 1] - costs[layer][choice[layer]])
            if step <= left:
                choice[layer] += 1
                left -= step
                moved = True
    return choice


def equal_shares(costs: list[Tensor], sizes: list[int], budget: int) -> list[int]:
    """The option of each layer that takes the same share of its size as every other, left-overs handed out in turn.

    `costs[l]` (num_options,) must ascend, `sizes[l]` is what the layer takes when nothing is cut.
    """
    share = budget / sum(sizes)
    start = [max(0, int((cost <= share * size).sum()) - 1) for cost, size in zip(costs, sizes, strict=True)]
    if sum(int(cost[k]) for cost, k in zip(costs, start, strict=True)) > budget:
        start = [0] * len(costs)  # near rank 1 equal shares do not fit: small layers take more than theirs
    return fill_uniform(costs, start, budget)


def cut_in_order(costs: list[Tensor], order: Iterable[int], budget: int) -> list[int]:
    """How many components each layer keeps when they go one by one, until the sum of costs is within `budget`.

    `costs[l]` (K,) is what layer l takes with 1, 2, ..., K components (never more than dense). `order` names the layer
    that loses its last remaining component; a layer's only component stays. ValueError where it ends above the budget.
    """
    kept = [len(cost) for cost in costs]
    total = sum(int(cost[-1]) for cost in costs)
    for layer in order:
        if total <= budget:
            return kept
        if kept[layer] > 1:
            total += int(costs[layer][kept[layer] - 2]) - int(costs[layer][kept[layer] - 1])
            kept[layer] -= 1
    if total > budget:
        raise ValueError(f"the order ends at {total:,} numbers, above the budget of {budget:,}")
    return kept


def hull(options: Options) -> list[int]:
    """Indices of the options that some price of a number makes the best: the lower convex hull, cheapest first."""
    cost, error = options.cost.tolist(), options.error.tolist()
    found: list[int] = []
    for k in sorted(range(len(cost)), key=lambda i: (cost[i], error[i])):
        if found and (cost[k] == cost[found[-1]] or error[k] >= error[found[-1]]):
            continue
        while len(found) > 1:
            a, b = found[-2], found[-1]
            if (error[a] - error[b]) * (cost[k] - cost[b]) > (error[b] - error[k]) * (cost[b] - cost[a]):
                break
            found.pop()
        found.append(k)
    return found


def merged(layers: Sequence[Options]) -> tuple[Options, list[tuple[int, ...]]]:
    """Several layers as one item, and what each option of it is in each of them.

    For every price of a number the best option of the item is the best of each layer: the hulls' steps, steepest first.
    """
    hulls = [hull(options) for options in layers]
    steps = []
    for position, (options, own) in enumerate(zip(layers, hulls, strict=True)):
        for before, after in pairwise(own):
            gain = float(options.error[before] - options.error[after])
            steps.append((-gain / int(options.cost[after] - options.cost[before]), position))
    steps.sort()  # on a hull gains descend, so that a layer's own steps stay in order
    at = [0] * len(layers)
    choices = [tuple(own[0] for own in hulls)]
    for _, position in steps:
        at[position] += 1
        choices.append(tuple(own[k] for own, k in zip(hulls, at, strict=True)))
    picked = torch.tensor(choices)
    error = sum(options.error.cpu().double()[picked[:, i]] for i, options in enumerate(layers))
    cost = sum(options.cost.cpu()[picked[:, i]] for i, options in enumerate(layers))
    assert isinstance(error, Tensor)
    assert isinstance(cost, Tensor)
    return Options(error, cost), choices


def padded(layers: list[Options]) -> tuple[Tensor, Tensor]:
    """Errors and costs as (L, most options); padding can never be chosen."""
    width = max(len(layer.error) for layer in layers)
    errors = torch.full((len(layers), width), torch.inf, dtype=torch.float64)
    costs = torch.full((len(layers), width), 2**62, dtype=torch.int64)
    for row, layer in enumerate(layers):
        errors[row, : len(layer.error)] = layer.error.double().cpu()
        costs[row, : len(layer.cost)] = layer.cost.long().cpu()
    return errors, costs


def _best(errors: Tensor, costs: Tensor, price: float) -> Tensor:
    """Option (L,) with the least `error + price * cost`; ties go to the cheaper one."""
    value = errors + price * costs.double()
    least = value.min(dim=1, keepdim=True).values
    tie = value <= least
    return torch.where(tie, costs, 2**62).argmin(dim=1)


def _total(costs: Tensor, choice: Tensor) -> Tensor:
    return costs.gather(1, choice[:, None]).sum()


def _spend_rest(errors: Tensor, costs: Tensor, choice: Tensor, budget: int) -> Tensor:
    """Take the upgrade with the best error drop per number that still fits, until none does."""
    choice = choice.clone()
    left = budget - int(_total(costs, choice))
    while True:
        now_error = errors.gather(1, choice[:, None])
        now_cost = costs.gather(1, choice[:, None])
        extra = costs - now_cost
        gain = now_error - errors
        fits = (extra > 0) & (extra <= left) & (gain > 0)
        if not bool(fits.any()):
            return choice
        rate = torch.where(fits, gain / extra.clamp(min=1), -1.0)
        layer, option = divmod(int(rate.argmax()), rate.shape[1])
        left -= int(extra[layer, option])
        choice[layer] = option
