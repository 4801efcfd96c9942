"""A layer that holds all of its components in order, so that any rank is a slice of it: what an any-size folder stores.

    W = left^T right        left (K, O), right (K, I): one component a row, the first to be kept first

`scores` (A, K) says how strongly each component counts at each anchor size, `levels` (S,) when the layer grows by one
step among all layers (linalg/ladder.py). Rows of both factors, so that a rank is one run of bytes in the file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NestedLinear(nn.Module):
    """`y = (left^T right) x + bias`, all components at score 1. Made to be saved; loading makes plain layers of it."""

    weight: Tensor
    scores: Tensor
    levels: Tensor

    def __init__(self, left: Tensor, right: Tensor, scores: Tensor, levels: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("scores", scores)
        self.register_buffer("levels", levels)
        # A program without spectrim meets a shape mismatch here and stops (see nn/linears.py).
        self.register_buffer("weight", torch.empty(0, device=left.device, dtype=left.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return F.linear(F.linear(x, self.right), self.left.mT, self.bias)
