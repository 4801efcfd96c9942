"""One order in which all layers grow: every size is a prefix of it, so ranks are monotone in the size.

A layer climbs a ladder of options, cheapest first: rank 1, 2, ... (beside an adapter: its rank, and on from there) as
long as the rank costs less than the dense layer, then dense. A step is one option to the next. All steps of all layers
stand in one global order; the ranks under a budget are those after as many steps, from the start, as the budget pays.
Nothing is solved when a size is asked for: integers are added up, so every machine finds the same ranks.

    levels[l] (S_l,)   place in the global order of layer l's steps, ascending

Under a global budget the order is by slope of the lower convex hull of (numbers, error): a prefix that ends at a
corner of the hull is the optimum that bisection on a multiplier finds (linalg/allocate.py), and between two corners at
most one layer is off its hull.
"""

from typing import Literal

import torch
from torch import Tensor

from spectrim.linalg.allocate import factor_cost, pivot_cost
from spectrim.linalg.running import running_sum


def ladder_costs(outputs: int, inputs: int, storage: Literal["factor", "pivot"], first: int = 1) -> Tensor:
    """Stored numbers (S+1,) int64, ascending: of ranks `first`, ... that cost less than dense, then of dense."""
    ranks = torch.arange(first, max(first, min(outputs, inputs) + 1))
    cost = (factor_cost if storage == "factor" else pivot_cost)(outputs, inputs, ranks)
    return torch.cat([cost[cost < outputs * inputs], torch.tensor([outputs * inputs])])


def ladder_errors(energy: Tensor, options: int) -> Tensor:
    """Error (options,) of the options of a ladder: what each loses of `energy` (K,), strongest first; the last none."""
    tail = running_sum(energy.double().flip(0)).flip(0)
    return torch.cat([tail[1:options], tail.new_zeros(1)])


def hull_slopes(costs: Tensor, errors: Tensor) -> Tensor:
    """Error saved a number (S,) on the lower convex hull of the points (costs, errors), both (S+1,); descending.

    Pool adjacent violators: steps that save more than the ones before them are taken together with those.
    """
    widths, drops = (costs[1:] - costs[:-1]).tolist(), (errors[:-1] - errors[1:]).tolist()
    pools: list[list[float]] = []  # numbers, error saved, steps
    for width, drop in zip(widths, drops, strict=True):
        pools.append([width, drop, 1])
        while len(pools) > 1 and pools[-1][1] * pools[-2][0] > pools[-2][1] * pools[-1][0]:
            width_above, drop_above, steps = pools.pop()
            pools[-1][0] += width_above
            pools[-1][1] += drop_above
            pools[-1][2] += steps
    slopes = torch.tensor([drop / width for width, drop, _ in pools], dtype=torch.float64)
    return slopes.repeat_interleave(torch.tensor([int(steps) for _, _, steps in pools], dtype=torch.int64))


def growth_order(worth: list[Tensor]) -> Tensor:
    """Layer (T,) that grows at each step of the global order, dearest first; `worth[l]` (S_l,) must not ascend.

    Ties go to the earlier layer.
    """
    owner = torch.cat([torch.full((len(w),), layer, dtype=torch.int64) for layer, w in enumerate(worth)])
    return owner[torch.cat([w.double().cpu() for w in worth]).argsort(descending=True, stable=True)]


def levels_of(order: Tensor, layers: int) -> list[Tensor]:
    """Places (S_l,) of each layer's steps in a global order (T,) of layers."""
    return [(order == layer).nonzero().flatten() for layer in range(layers)]


def are_levels(levels: list[Tensor]) -> bool:
    """Whether these are the places 0 ... T-1, each once, ascending in every layer."""
    together = torch.cat([level.long() for level in levels])
    ascending = all(bool((level[1:] > level[:-1]).all()) for level in levels)
    return ascending and torch.equal(together.sort().values, torch.arange(len(together)))


def cut(costs: list[Tensor], levels: list[Tensor], budget: int) -> list[int]:
    """Option (an index into `costs[l]`) of each layer after as many steps as `budget` pays; never above it.

    What is left over is less than the next step costs. The first options of all layers must fit.
    """
    left = budget - sum(int(cost[0]) for cost in costs)
    if left < 0:
        raise ValueError(f"budget {budget:,} is below the first options of all layers, {budget - left:,}")
    steps = torch.zeros(sum(len(level) for level in levels), dtype=torch.int64)
    for cost, level in zip(costs, levels, strict=True):
        steps[level.long()] = cost[1:] - cost[:-1]
    taken = int((steps.cumsum(0) <= left).sum())
    return [int((level < taken).sum()) for level in levels]


def interpolate(table: Tensor, anchors: tuple[float, ...], size: float) -> Tensor:
    """Row (K,) of `table` (A, K) at `size`, linear between the anchors (descending); constant outside them."""
    if size >= anchors[0]:
        return table[0]
    for i in range(1, len(anchors)):
        if size >= anchors[i]:
            share = (anchors[i - 1] - size) / (anchors[i - 1] - anchors[i])
            return table[i - 1] + share * (table[i] - table[i - 1])
    return table[-1]
