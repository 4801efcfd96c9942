"""Turning and cutting a residual stream h (D,) that is read through RMSNorm.

    rotation     Q (D, K) with orthonormal columns; the stream becomes z = Q^T h
    reading      W diag(g) norm(h)  ->  (W diag(g) Q) norm'(z)         g: the gains of the norm
    writing      h + W y + b        ->  z + (Q^T W) y + Q^T b
    norm'        z / sqrt(|z|^2 / D + eps): RMSNorm over K numbers with eps D / K and all gains sqrt(D / K)

At K = D nothing changes but rounding: |Q^T h| = |h|. Source: SliceGPT (arXiv 2401.15024), section 3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.factor import descending_eigh


class NarrowNorm(NamedTuple):
    """Constants of an RMSNorm over fewer numbers that divides by the root mean square over all of them."""

    gain: float
    eps: float


def narrow_norm(eps: float, before: int, after: int) -> NarrowNorm:
    """For `after` of `before` numbers."""
    return NarrowNorm(math.sqrt(before / after), eps * before / after)


def principal_basis(gram: Tensor, width: int) -> Tensor:
    """The `width` directions (D, width) in which rows with this Gram matrix (D, D) are largest.

    The paper first adds 1 % of the mean diagonal to the diagonal, which changes no eigenvector.
    """
    return descending_eigh(gram)[1][:, :width]


def largest_axes(gram: Tensor, width: int) -> Tensor:
    """The `width` coordinates of most variance, unturned (D, width): what slicing is without a rotation."""
    axes = gram.diagonal().argsort(descending=True, stable=True)[:width]
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[:, axes]


def random_basis(gram: Tensor, width: int, seed: int) -> Tensor:
    """`width` random orthonormal directions (D, width)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(len(gram), len(gram), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal.to(gram)).Q[:, :width]


def turn_reader(weight: Tensor, gain: Tensor, basis: Tensor) -> Tensor:
    """A weight (O, D) that reads a norm with `gain` (D,), for the turned stream: (O, K)."""
    return (weight * gain) @ basis


def turn_writer(weight: Tensor, basis: Tensor) -> Tensor:
    """A weight (D, I), or bias (D,), that writes to the stream, for the turned stream: (K, I) or (K,)."""
    return basis.mT @ weight
