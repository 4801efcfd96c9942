"""The layer in which SoCo learns: a frozen sum of rank-one components, one score for each.

    W(s) = left diag(s) right        left (O, K), right (K, I) frozen; s (K,) learned, starts at 1

The product is formed once a forward pass (K O I operations, little beside the tokens) and used as an ordinary weight:
its gradient then reaches *all* scores, also those of components that the mask holds at 0, as a straight-through
estimate of what bringing them back would gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.factor import Factors, Spectrum, wide_product


class ScoredLinear(nn.Module):
    """A linear layer whose singular components carry learnable scores and a 0/1 mask."""

    left: Tensor
    right: Tensor
    energy: Tensor
    mask: Tensor

    def __init__(self, spectrum: Spectrum, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = spectrum.left.shape[0], spectrum.right.shape[1]
        self.register_buffer("left", spectrum.left.float().contiguous(), persistent=False)
        self.register_buffer("right", spectrum.right.float().contiguous(), persistent=False)
        self.register_buffer("energy", spectrum.energy.double(), persistent=False)
        self.register_buffer("mask", torch.ones(len(spectrum.energy), device=self.left.device), persistent=False)
        self.scores = nn.Parameter(torch.ones(len(spectrum.energy), device=self.left.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)

    def effective_scores(self) -> Tensor:
        """Scores (K,) with masked ones at 0 in value but not in gradient (straight-through)."""
        held = self.scores * self.mask
        return held + (self.scores - self.scores.detach()) * (1 - self.mask)

    def weight_now(self) -> Tensor:
        """The weight (O, I) at the present scores."""
        return wide_product(self.left * self.effective_scores(), self.right)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return F.linear(x, self.weight_now(), self.bias)

    def kept(self) -> Factors:
        """The components whose mask is 1, scores folded into the left factor."""
        index = self.mask.nonzero().flatten()
        scores = self.scores.detach()[index]
        return Factors(self.left[:, index] * scores, self.right[index])
