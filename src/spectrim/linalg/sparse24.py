"""2:4 sparsity: of every four neighbouring inputs of a row, two weights stay.

Stored as the values that stay, in order, and the place (0 to 3) of each in its four: two bits each, as NVIDIA's sparse
tensor cores take them. 9/16 of the dense weight in 16 bits.

    magnitude    |w|
    wanda        |w| E[x^2]^1/2                            Sun et al., arXiv 2306.11695
    sparsegpt    w^2 / U_jj^2, the other columns make up    Frantar and Alistarh, arXiv 2301.00774; see columns.py
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.columns import DAMPING, inverse_root, solve_columns


class Half(NamedTuple):
    """A weight (O, I) of which two in four are left."""

    values: Tensor  # (O, I / 2)
    places: Tensor  # (O, I / 2) uint8 in 0 ... 3, ascending in each pair


def two_of_four(scores: Tensor) -> Tensor:
    """The two largest of every four: a mask (O, I) bool; of equal ones the first."""
    fours = scores.reshape(len(scores), -1, 4)
    chosen = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, chosen, True).reshape(scores.shape)


def to_half(weight: Tensor, mask: Tensor) -> Half:
    """The weights (O, I) at `mask`, which marks two in every four."""
    outputs, inputs = weight.shape
    places = (torch.arange(inputs, device=weight.device) % 4).to(torch.uint8).expand(outputs, inputs)
    return Half(weight[mask].reshape(outputs, inputs // 2), places[mask].reshape(outputs, inputs // 2))


def from_half(half: Half) -> Tensor:
    """The weight (O, I), zeros where nothing is left."""
    outputs, kept = half.values.shape
    places = half.places.reshape(outputs, -1, 2).long()
    dense = half.values.new_zeros(outputs, kept // 2, 4)
    return dense.scatter(-1, places, half.values.reshape(outputs, -1, 2)).reshape(outputs, 2 * kept)


def wanda(weight: Tensor, gram: Tensor) -> Half:
    """The weights (O, I) that are largest times the size of their inputs, from `gram` (I, I)."""
    return to_half(weight, two_of_four(weight.abs() * gram.diagonal().clamp(min=0).sqrt()))


def sparsegpt(weight: Tensor, gram: Tensor, *, damping: float = DAMPING) -> Half:
    """Masks chosen four columns at a time; the columns to the right make up for what is lost."""
    rule = PruneRule(weight)
    pruned = solve_columns(weight, inverse_root(gram, damping=damping), rule)
    return to_half(pruned, rule.mask)


class PruneRule:
    """Of four columns, those two stay in each row whose loss would cost most."""

    unit = 4

    def __init__(self, weight: Tensor) -> None:
        self.mask = torch.zeros_like(weight, dtype=torch.bool)

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        self.mask[:, start : start + 4] = two_of_four((weight / diagonal).square())

    def round(self, column: int, values: Tensor) -> Tensor:
        return values * self.mask[:, column]
