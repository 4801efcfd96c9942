"""The layer in which ACIP trains: singular components behind binary masks, and a low-rank adapter beside them.

    W = left diag(1[m > 0]) right + alpha / R up down      left (O, K), right (K, I) frozen; m (K,), up, down trained

The mask is binary going forward; going back it is the ramp  relu(m) / start  (straight-through, arXiv 2502.01717):
a component that is alive passes its gradient to m, one that died passes none and stays dead.
W is formed once a forward pass ((K + R) O I operations, little beside the tokens) and used as an ordinary weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.factor import Factors, Spectrum


def binary(m: Tensor, start: float) -> Tensor:
    """1[m > 0] (K,) in value, d/dm relu(m) / start in gradient."""
    ramp = m.relu() / start
    return (m > 0).to(m.dtype).detach() + ramp - ramp.detach()


class MaskedLinear(nn.Module):
    """A linear layer as masked singular components and an adapter of rank R, which starts at 0."""

    left: Tensor
    right: Tensor
    mask: Tensor
    died: Tensor

    def __init__(
        self, spectrum: Spectrum, bias: Tensor | None, *, rank: int, alpha: float, start: float, seed: int
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = spectrum.left.shape[0], spectrum.right.shape[1]
        self.start, self.scale, self.fixed = start, alpha / rank, False
        device, count = spectrum.left.device, len(spectrum.energy)
        self.register_buffer("left", spectrum.left.float().contiguous(), persistent=False)
        self.register_buffer("right", spectrum.right.float().contiguous(), persistent=False)
        self.register_buffer("mask", torch.ones(count, device=device), persistent=False)  # read once it is fixed
        self.register_buffer("died", torch.full((count,), -1, device=device), persistent=False)  # step; -1: alive
        self.m = nn.Parameter(torch.full((count,), start, device=device))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        # LoRA's start: `down` uniform in +-1 / sqrt(I), `up` zero. Drawn on the CPU: the same on every device.
        draw = torch.rand(rank, self.in_features, generator=torch.Generator().manual_seed(seed))
        self.down = nn.Parameter(((2 * draw - 1) / self.in_features**0.5).to(device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)

    def weight_now(self) -> Tensor:
        """The weight (O, I) at the present masks and adapter."""
        mask = self.mask if self.fixed else binary(self.m, self.start)
        return torch.addmm((self.left * mask) @ self.right, self.up * self.scale, self.down)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return F.linear(x, self.weight_now(), self.bias)

    @torch.no_grad()
    def bury(self, step: int) -> None:
        """Note the components whose mask crossed zero since the last call."""
        self.died[(self.m <= 0) & (self.died < 0)] = step

    def fix(self, kept: Tensor) -> None:
        """From now on the components of `kept` (K,) bool are there, the others are not."""
        self.mask.copy_(kept.to(self.mask.dtype))
        self.fixed = True

    @torch.no_grad()
    def folded(self) -> Factors:
        """The layer as one pair of factors: kept components, then the adapter; rank = their number + R."""
        index = self.mask.nonzero().flatten()
        left = torch.cat([self.left[:, index], self.up * self.scale], dim=1)
        return Factors(left, torch.cat([self.right[index], self.down]))
