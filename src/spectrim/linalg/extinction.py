"""One order over the components of all layers, from when their masks went out, and cuts of it to a size.

A component that is still there is worth its mask value; of those that went out, the earlier one is worth less, and at
the same step the one with the lower value. Ties go to the component nearer the top of its spectrum.
"""

import torch
from torch import Tensor

from spectrim.linalg.allocate import factor_cost, pivot_cost


def cost_table(outputs: int, inputs: int, extra: int, *, pivot: bool) -> Tensor:
    """Stored numbers (K + 1,) of a layer with 0, 1, ..., K components and `extra` more ranks, at most dense."""
    ranks = torch.arange(min(outputs, inputs) + 1) + extra
    full = ranks >= min(outputs, inputs)
    cost = (pivot_cost if pivot else factor_cost)(outputs, inputs, ranks)
    return cost.clamp(max=outputs * inputs).masked_fill(full, outputs * inputs)


def order_of(masks: list[Tensor], died: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The layer and the position in it of every component, most wanted first; both (N,), on the CPU.

    masks[l], died[l] (K_l,): value, and the step at which it crossed zero (-1: it has not).
    """
    sizes = torch.tensor([len(m) for m in masks])
    layer = torch.arange(len(masks)).repeat_interleave(sizes)
    position = torch.cat([torch.arange(n) for n in sizes.tolist()])
    depth = position.double() / sizes[layer]
    value, step = torch.cat(masks).detach().cpu(), torch.cat(died).cpu()
    step = step.where(step >= 0, torch.iinfo(step.dtype).max)
    order = depth.argsort(stable=True)
    for key in (value, step):  # the last key decides first
        order = order[key[order].argsort(descending=True, stable=True)]
    return layer[order], position[order]


def counts_within(layer: Tensor, tables: list[Tensor], budget: int) -> Tensor:
    """How many components each layer keeps (L,) when the order `layer` (N,) is cut as late as `budget` allows."""

    def counts(kept: int) -> Tensor:
        return torch.bincount(layer[:kept], minlength=len(tables))

    low, high = 0, len(layer)
    assert numbers_of(counts(0), tables) <= budget, "the adapters alone are above the budget"
    while low < high:
        middle = (low + high + 1) // 2
        if numbers_of(counts(middle), tables) <= budget:
            low = middle
        else:
            high = middle - 1
    return counts(low)


def first_of_each(layer: Tensor, counts: list[int]) -> Tensor:
    """The order `layer` (N,) without what comes after the first `counts[l]` components of each layer l."""
    kept = torch.zeros(len(layer), dtype=torch.bool)
    for index, count in enumerate(counts):
        kept[(layer == index).nonzero().flatten()[:count]] = True
    return layer[kept]


def numbers_of(counts: Tensor, tables: list[Tensor]) -> int:
    """Stored numbers of all layers at `counts` (L,)."""
    return sum(int(table[k]) for table, k in zip(tables, counts.tolist(), strict=True))
