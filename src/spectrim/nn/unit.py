"""A tensor trained in units of its own size: one learning rate is then relative for every tensor of every model."""

import torch
from torch import Tensor, nn

ZERO_BIAS = 0.01
"""The scale on which a bias of zeros is trained."""


class Unit(nn.Module):
    """A float32 parameter of root mean square 1 at the start, times a fixed scale."""

    def __init__(self, value: Tensor, *, of_zero: float = 1.0) -> None:
        """`of_zero` is the scale of a tensor of zeros."""
        super().__init__()
        wide = value.detach().double()
        size = float(wide.square().mean().sqrt())
        self.scale = size if size > 0 else of_zero
        self.unit = nn.Parameter((wide / self.scale).float().contiguous())

    def forward(self) -> Tensor:
        """The tensor as it is now."""
        return self.unit * self.scale

    @torch.no_grad()
    def value(self) -> Tensor:
        """The same in float64, detached."""
        return self.unit.double() * self.scale
