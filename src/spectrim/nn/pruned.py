"""A dense layer that is being pruned by movement (linalg/movement.py): its weight, which entries count, their scores.

Values of pruned entries are 0 in the product but not in the gradient (straight-through): the score of an entry goes on
while it is pruned, and it returns with the value it had once its score is among the largest again.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.movement import add_movement, strongest

Scores = Literal["movement", "size"]


class PrunedLinear(nn.Module):
    """`y = (W * mask) x + bias`."""

    mask: Tensor
    scores: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool), persistent=False)
        self.register_buffer("scores", torch.zeros_like(self.weight, requires_grad=False), persistent=False)

    def weight_now(self) -> Tensor:
        """The pruned weight (O, I), with the gradient of a dense one."""
        return self.weight + (self.weight * ~self.mask).detach().neg()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return F.linear(x, self.weight_now(), self.bias)

    @torch.no_grad()
    def tally(self) -> None:
        """After a backward pass: add to the scores, and leave pruned entries without a gradient."""
        gradient = self.weight.grad
        if gradient is None:
            return  # an expert that no token reached
        add_movement(self.scores, self.weight, gradient)
        gradient *= self.mask

    @torch.no_grad()
    def prune(self, sparsity: float, scores: Scores = "movement") -> None:
        """Keep the largest `1 - sparsity` by their movement so far, or by the size of the weight."""
        self.mask.copy_(strongest(self.scores if scores == "movement" else self.weight.abs(), sparsity))

    @torch.no_grad()
    def pruned(self) -> Tensor:
        """The weight (O, I) with zeros where it is pruned."""
        return self.weight * self.mask
