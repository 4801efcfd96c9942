"""Group sparsity: of the groups of neighbouring inputs of a row, some are left out and the others are kept.

A weight (O, I) in groups of `size` inputs is a list of O G groups, row after row, G = I / size. Kept ones are a matrix
(N, size) of their own, to be stored in any form; a bitmap, one bit a group, says where they stand. As long as no more
than seven groups of eight are left out that is no more than any index of a byte or more for each kept group takes:
O G / 8 <= N. Column indices of 16 bits and row pointers, as block-sparse rows have them, take 16 times that at half.

What leaving a group w_g out costs in the metric H = E[x x^T] (`Saliency`), U^T U = H^-1 as in columns.py:

    later       || w_g U_gg^-1 ||^2                          exact, when columns to the right make up for it
    all         w_g ([H^-1]_gg)^-1 w_g^T                     exact, when all other columns do (OBS for a group)
    weights     mean over the group of w_j^2 / [H^-1]_jj     OBS of each weight alone (GQSA, arXiv 2412.17560)
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.columns import Rule
from spectrim.linalg.quantise import group_count, in_groups, pack, packed_width, unpack

Saliency = Literal["later", "all", "weights"]
SALIENCIES: tuple[Saliency, ...] = ("later", "all", "weights")
Balance = Literal["rows", "layer"]
BALANCES: tuple[Balance, ...] = ("rows", "layer")
"""Whether every row keeps as many groups, or the layer as a whole."""
MOST_SPARSITY = 0.875
"""Share of groups left out above which a bitmap is not the least."""


class Groups(NamedTuple):
    """Groups of a weight (O, I) that are kept."""

    values: Tensor  # (N, size), row after row
    mask: Tensor  # (O, G) bool, N of them


def group_costs(weight: Tensor, upper: Tensor, size: int, saliency: Saliency) -> Tensor:
    """What leaving out each group of `weight` (O, I) costs, (O, G), from `upper` (I, I) of `inverse_root`."""
    groups = in_groups(weight, size).transpose(0, 1)  # (G, O, size)
    if saliency == "weights":
        return (groups.square() / in_groups(upper.square().sum(0)[None], size).transpose(0, 1)).mean(-1).mT
    if saliency == "later":
        roots = torch.stack([upper[at : at + size, at : at + size] for at in range(0, len(upper), size)])
    else:
        columns = upper.unflatten(1, (-1, size)).transpose(0, 1)  # (G, I, size)
        roots = torch.linalg.cholesky(columns.mT @ columns, upper=True)
    return torch.linalg.solve_triangular(roots, groups, upper=True, left=False).square().sum(-1).mT


def kept_groups(outputs: int, inputs: int, size: int, sparsity: float, balance: Balance) -> int:
    """How many are kept: the share `sparsity` is left out, rounded down, of each row or of all."""
    groups = group_count(inputs, size)
    if balance == "rows":
        return outputs * (groups - int(sparsity * groups + 1e-9))
    return outputs * groups - int(sparsity * outputs * groups + 1e-9)


def costliest(costs: Tensor, kept: int, balance: Balance) -> Tensor:
    """The `kept` groups that cost most to leave out: a mask (O, G) bool; of equal ones the first."""
    table = costs if balance == "rows" else costs.reshape(1, -1)
    order = table.argsort(dim=1, descending=True, stable=True)[:, : kept // len(table)]
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, order, True).view_as(costs)


class GroupRule:
    """Another rule for groups that are kept, zeros for those left out, for which later columns make up too."""

    def __init__(self, inner: Rule, mask: Tensor) -> None:
        self.inner, self.mask, self.unit = inner, mask, inner.unit

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        self.inner.begin(start, weight, diagonal)

    def round(self, column: int, values: Tensor) -> Tensor:
        return torch.where(self.mask[:, column // self.unit], self.inner.round(column, values), 0)


def from_groups(groups: Groups) -> Tensor:
    """The weight (O, I), zeros where groups are left out; gradients reach the values."""
    outputs, count = groups.mask.shape
    places = groups.mask.flatten().nonzero()[:, 0]
    dense = groups.values.new_zeros(outputs * count, groups.values.shape[1])
    return dense.index_copy(0, places, groups.values).reshape(outputs, -1)


def to_bitmap(mask: Tensor) -> Tensor:
    """A mask (O, G) bool to bytes (ceil(O G / 8),) uint8, row after row, the first in the lowest bit."""
    return pack(mask.flatten().to(torch.uint8), 1)


def from_bitmap(bitmap: Tensor, outputs: int, groups: int) -> Tensor:
    """The inverse: a mask (O, G) bool."""
    return unpack(bitmap, 1, outputs * groups).bool().reshape(outputs, groups)


def bitmap_bytes(outputs: int, groups: int) -> int:
    """What it takes."""
    return packed_width(outputs * groups, 1)
