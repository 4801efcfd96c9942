"""The layer in which SoCo learns: a frozen sum of rank-one components, one score for each.

    W(s) = left diag(s) right        left (O, K), right (K, I) frozen; s (K,) learned, starts at 1

The product is formed once a forward pass (K O I operations, little beside the tokens) and used as an ordinary weight:
its gradient then reaches *all* scores, also those of components that the mask holds at 0, as a straight-through
estimate of what bringing them back would gain.

For large models the components are held in bf16, and added to a weight that was formed once from accurate ones:

    W(s) = W(s0) + left diag(s - s0) right        s0: the scores and the mask when it was formed

Components of a metric are far from orthogonal, so that their sum cancels: in bf16 it would not give the weight. Of the
change since s0, which is small, bf16 is as good as it is of any weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.factor import Factors, Spectrum, wide_product

NARROW = torch.bfloat16
"""What components of large models are held in."""


class ScoredLinear(nn.Module):
    """A linear layer whose singular components carry learnable scores and a 0/1 mask."""

    left: Tensor
    right: Tensor
    """Both without components until they are put in by `settle`, where the spectrum came without."""
    energy: Tensor
    mask: Tensor
    anchor: Tensor | None
    """W(s0) (O, I), where components are narrow."""
    start: Tensor | None
    """s0 (K,)."""

    def __init__(self, spectrum: Spectrum, bias: Tensor | None, *, narrow: bool = False) -> None:
        super().__init__()
        dtype = NARROW if narrow else torch.float32
        self.out_features, self.in_features = spectrum.left.shape[0], spectrum.right.shape[1]
        self.register_buffer("left", spectrum.left.to(dtype).contiguous(), persistent=False)
        self.register_buffer("right", spectrum.right.to(dtype).contiguous(), persistent=False)
        self.register_buffer("anchor", None, persistent=False)
        self.register_buffer("start", None, persistent=False)
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
        scores = self.effective_scores()
        if self.anchor is None or self.start is None:
            return wide_product(self.left * scores, self.right)
        change = (self.left * (scores - self.start)).to(NARROW)
        return self.anchor + wide_product(change, self.right.to(NARROW))

    @torch.no_grad()
    def settle(self, spectrum: Spectrum) -> None:
        """Form W(s0) of the present scores from components that are as accurate as there are; narrow from here on.

        Where the layer has no components yet, these become its own.
        """
        if self.left.shape[1] != len(self.scores):
            self.left = spectrum.left.to(self.left.dtype).contiguous()
            self.right = spectrum.right.to(self.right.dtype).contiguous()
        self.start = self.effective_scores().detach().clone()
        formed = wide_product(spectrum.left.float() * self.start, spectrum.right.float())
        self.anchor = formed.to(NARROW)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        weight = self.weight_now()
        return F.linear(x, weight if self.anchor is None else weight.to(x.dtype), self.bias)

    def kept(self, spectrum: Spectrum | None = None) -> Factors:
        """The components whose mask is 1, of `spectrum` if given, scores folded into the left factor."""
        index = self.mask.nonzero().flatten()
        scores = self.scores.detach()[index]
        left, right = (self.left, self.right) if spectrum is None else spectrum[:2]
        return Factors(left[:, index] * scores, right[index])
