"""Streaming sums over calibration tokens, from which every metric is made.

Products are formed in float32 over at most `CHUNK` tokens and added in float64: the float32 error of one product is
averaged out, the running sum loses nothing. (Gram matrices accumulated in float32 alone had negative eigenvalues
once activations spread over four decades.)
"""

import torch
from torch import Tensor

CHUNK = 4096


def add_gram(total: Tensor, rows: Tensor, other: Tensor | None = None) -> None:
    """`total += rows^T other` in place. rows (N, n), other (N, m) or the same, total (n, m) in float64."""
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK].float()
        second = part if other is None else other[start : start + CHUNK].float()
        total += part.mT @ second


def add_squares(total: Tensor, gradients: Tensor, inputs: Tensor) -> None:
    """Diagonal Fisher: `total += sum over sequences of (sum over tokens g x^T)^2`, elementwise.

    gradients (B, S, O), inputs (B, S, I), total (O, I) in float64.
    """
    for gradient, rows in zip(gradients, inputs, strict=True):
        total += (gradient.float().mT @ rows.float()).square()


def clip_rows(rows: Tensor, *, ratio: float) -> Tensor:
    """Scale rows (N, n) whose norm exceeds `ratio` times the root mean square norm down to that norm.

    A few tokens carry gradients a hundred times the rest; unclipped they decide the whole covariance.
    """
    norms = rows.float().norm(dim=1, keepdim=True)
    limit = ratio * norms.square().mean().sqrt()
    return rows * (limit / norms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0).to(rows.dtype)
