"""The metric in which an error is measured: `error = || L^T (W - W') R ||_F^2`.

    plain SVD   (I, I)                         ASVD   (I, diag(mean|x|^alpha))
    SVD-LLM     (I, root of E[x x^T])          FWSVD  (I, diag(input Fisher)^1/2)
    two-sided   (root of E[g g^T], root of E[x x^T])

A root R of a covariance C satisfies R R^T = C. Eigenvalues below `floor` times the largest are raised to that
level, never dropped and never given an absolute jitter: the metric stays invertible, so a full-rank compression
gives the weight back exactly, and scaling the inputs by c scales the metric by c and changes nothing else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.solver import eigh

RELATIVE_FLOOR = 1e-10
"""Smallest eigenvalue kept, relative to the largest (float64). Its root, 1e-5, bounds the condition of a metric."""


SAFE_PIVOT = 1e-8
"""Cholesky pivots further apart than this leave less than half of float64 to the inverse."""


class Root(NamedTuple):
    """A square root of a covariance and its inverse transposed: `root @ root.T = C`, `dual.T @ root = 1`."""

    root: Tensor  # (n, n)
    dual: Tensor  # (n, n), the transpose of the inverse of `root`

    def dual_times(self, columns: Tensor) -> Tensor:
        """`dual @ columns` (n, m)."""
        return self.dual @ columns


class Triangle(NamedTuple):
    """A lower triangular root of a covariance, which needs no inverse: `root @ root.T = C`."""

    root: Tensor  # (n, n)

    def dual_times(self, columns: Tensor) -> Tensor:
        """`root^-T columns` (n, m): a triangular system, a third of the work of inverting first."""
        return torch.linalg.solve_triangular(self.root.mT, columns, upper=True)


def shrink(covariance: Tensor, ratio: float) -> Tensor:
    """Mix a covariance (n, n) with a multiple of the identity of the same trace: `(1-ratio) C + ratio tr(C)/n 1`.

    Few tokens give noisy eigenvectors; shrinkage is the standard cure (Ledoit and Wolf 2004). Relative by design.
    """
    shrunk = (1 - ratio) * covariance
    shrunk.diagonal().add_(ratio * covariance.diagonal().mean())
    return shrunk


def root_of(covariance: Tensor, *, floor: float = RELATIVE_FLOOR) -> Root:
    """Eigen root of a symmetric non-negative matrix (n, n). Works with singular and slightly indefinite input.

    An all-zero covariance (an input that never fires) says nothing about directions: the identity is returned.
    """
    eigenvalues, vectors = eigh((covariance + covariance.mT) / 2)
    largest = eigenvalues[-1]
    if largest <= 0:
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return Root(eye, eye)
    half = eigenvalues.clamp(min=largest * floor).sqrt()
    return Root(vectors * half, vectors / half)


def quick_root(covariance: Tensor) -> Root:
    """A root of a covariance (n, n) that was shrunk: its Cholesky factor, a twentieth of the work of an eigen root.

    Any root gives the same decomposition of a weight. Where the factorisation fails or is close to it (no shrinkage and
    fewer tokens than dimensions), the eigen root is taken, which never fails.
    """
    lower = safe_cholesky(covariance)
    if lower is None:
        return root_of(covariance)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return Root(lower, torch.linalg.solve_triangular(lower, eye, upper=False).mT)


def triangle_of(covariance: Tensor) -> Triangle | Root:
    """The root that `quick_root` takes, for whoever multiplies by its dual once."""
    lower = safe_cholesky(covariance)
    return root_of(covariance) if lower is None else Triangle(lower)


def safe_cholesky(covariance: Tensor) -> Tensor | None:
    """The Cholesky factor (n, n) of a symmetric matrix; None where it fails or leaves too little to the inverse."""
    lower, failed = torch.linalg.cholesky_ex((covariance + covariance.mT) / 2)
    pivots = lower.diagonal().square()
    return None if int(failed) or not bool(pivots.min() > pivots.max() * SAFE_PIVOT) else lower


def diagonal_root(weights: Tensor, *, floor: float = RELATIVE_FLOOR) -> Root:
    """Root of a diagonal metric from its diagonal (n,) of non-negative weights; an all-zero diagonal gives 1."""
    largest = weights.max()
    if largest <= 0:
        weights = torch.ones_like(weights)
    half = weights.clamp(min=weights.max() * floor).sqrt()
    return Root(torch.diag(half), torch.diag(1 / half))
