"""The layer of mixed-rank fine-tuning: two weights for one place, of which a forward pass uses one.

y = W_low x + bias   or   y = W_full x + bias        W_low trained factors (nn/spectral.py), W_full frozen
"""

import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.nn.spectral import SpectralLinear


class MixedLinear(nn.Module):
    """Low-rank factors beside the weight (O, I) that they stand for; the bias is common to both."""

    full_weight: Tensor

    def __init__(self, low: SpectralLinear, full_weight: Tensor) -> None:
        super().__init__()
        self.low, self.full = low, False
        self.register_buffer("full_weight", full_weight.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O), by the full weight where `full` says so."""
        return F.linear(x, self.full_weight, self.low.bias_now()) if self.full else self.low(x)
