"""Pruning by movement, and factors that know which entries were pruned.

    score     S_ij = - sum over steps of  W_ij dL/dW_ij      entries that training moves away from zero have S > 0
    mask      the (1 - s) O I entries with the largest scores, s rising to its final value along a cubic
    weighing  || (W - W') D ||_F with D = diag(c)^1/2, c_j the survivors in column j: columns that kept more count more

Sources: movement pruning (Sanh, Wolf, Rush 2020, arXiv 2005.07683), the schedule of Zhu and Gupta 2017 (arXiv
1710.01878), sparsity-aware SVD (Ren and Zhu, arXiv 2306.14152).
"""

import torch
from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.linalg.metric import diagonal_root


def sparsity_at(progress: float, final: float) -> float:
    """The share of entries that are zero at `progress` in [0, 1]: s (1 - (1 - t)^3), fast at first, then settling."""
    return final * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


def strongest(scores: Tensor, sparsity: float) -> Tensor:
    """A mask like `scores`: False for the `floor(sparsity * numel)` smallest entries; of equal ones the first go."""
    pruned = int(sparsity * scores.numel())
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(pruned).values
    below, tied = flat < threshold, flat == threshold
    left = pruned - below.sum()
    return ~(below | (tied & (tied.cumsum(0) <= left))).view_as(scores)


def add_movement(scores: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """`scores -= weight * gradient` in place: a gradient step along -g lets |w| grow where w g < 0."""
    scores.addcmul_(weight, gradient, value=-1)


def sparse_spectrum(weight: Tensor, mask: Tensor, *, weigh: bool = True) -> Spectrum:
    """All components of the pruned `weight` (O, I), float64, columns weighed by their survivors in `mask` (O, I).

    A column without survivors is zero in the weight and counts as one survivor: nothing is divided by zero.
    """
    pruned = weight * mask
    if not weigh:
        return decompose(pruned)
    counts = mask.sum(dim=0).clamp(min=1).to(weight.dtype)
    return decompose(pruned, right=diagonal_root(counts))
