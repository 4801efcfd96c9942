"""Pivot storage: a rank-R matrix is R of its rows and the coefficients that make the other rows from them.

    W' (O, I) of rank R:   pivots = R row indices
                           rows   = W'[pivots]                (R, I)
                           coefficients C, W'[others] = C rows   (O - R, R)

Stored numbers R I + (O - R) R = R (O + I - R): the dimension of the manifold of rank-R matrices, so no exact
storage takes fewer; a mask of O bits tells pivots from others. At full rank it costs what the dense matrix costs.
Source: PIFA (Zhao et al., ICML 2025). Strong pivoting keeps every |C_ij| <= `bound`, which bounds the rounding error
in bf16: LU with partial pivoting to start, then swaps of one row as long as an entry exceeds the bound (maxvol,
Goreinov et al. 2010; each swap multiplies the volume by that entry, so it ends).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import safe_cholesky

MANY = 1024
"""Columns from which a rotation that is drawn on the host takes a GPU longer than all the rest."""


class Pivots(NamedTuple):
    """A rank-R matrix in pivot storage; `mask` (O,) bool marks the R pivot rows, in ascending order in `rows`."""

    rows: Tensor  # (R, I)
    coefficients: Tensor  # (O - R, R)
    mask: Tensor  # (O,) bool


def to_pivots(factors: Factors, *, bound: float = 1.2) -> Pivots:
    """Exact pivot storage of `left @ right`. Needs rank <= outputs; compute in float64.

    Works for rank-deficient factors too (a layer of zeros, pruned rows): coefficients come from a basis that has R
    independent rows even where `left` has not.
    """
    left, right = factors
    outputs, rank = left.shape
    index, coefficients = _start(_generic_basis(left))
    chosen, others = index[:rank], index[rank:]
    chosen, others, coefficients = _swap_until_bounded(chosen, others, coefficients, bound)
    by_pivot, by_other = chosen.argsort(), others.argsort()
    mask = torch.zeros(outputs, dtype=torch.bool, device=left.device)
    mask[chosen] = True
    return Pivots(left[chosen[by_pivot]] @ right, coefficients[by_other][:, by_pivot], mask)


def from_pivots(pivots: Pivots) -> Tensor:
    """The dense matrix (O, I)."""
    dense = pivots.rows.new_empty(len(pivots.mask), pivots.rows.shape[1])
    dense[pivots.mask] = pivots.rows
    dense[~pivots.mask] = pivots.coefficients @ pivots.rows
    return dense


def pack_mask(mask: Tensor) -> Tensor:
    """Bits (n,) bool to bytes (ceil(n / 8),) uint8, lowest bit first."""
    padded = torch.zeros((len(mask) + 7) // 8 * 8, dtype=torch.int64, device=mask.device)
    padded[: len(mask)] = mask.long()
    weights = 2 ** torch.arange(8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(1).to(torch.uint8)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Bytes (ceil(count / 8),) uint8 to bits (count,) bool."""
    bits = (packed.long()[:, None] >> torch.arange(8, device=packed.device)) & 1
    return bits.flatten()[:count].bool()


def _generic_basis(left: Tensor) -> Tensor:
    """Orthonormal columns (O, R) that span those of `left`: what combines its rows combines those of `left` alike.

    Turned by a fixed random rotation, since partial pivoting depends on the columns it is given: on some (lower
    triangles of -1) it leaves coefficients that grow like 2^R, on random ones it does not. Many columns on a GPU are
    mixed by random numbers drawn there: not a rotation, but of a condition (about R) that float64 does not notice.
    """
    rank = left.shape[1]
    if _many_on_a_gpu(left):
        generator = torch.Generator(device=left.device).manual_seed(0)
        mix = torch.randn(rank, rank, generator=generator, dtype=left.dtype, device=left.device)
        return _orthonormal(left) @ mix
    seeded = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(left).Q @ torch.linalg.qr(seeded.to(left)).Q


def _many_on_a_gpu(left: Tensor) -> bool:
    return left.is_cuda and left.shape[1] >= MANY


def _orthonormal(left: Tensor) -> Tensor:
    """Columns (O, R) of the same span, orthonormal to 1e-7: left R^-1 with R^T R = left^T left, products and a
    triangular system alone. Where columns nearly depend on each other, by Householder reflections.
    """
    lower = safe_cholesky(left.mT @ left)
    if lower is None:
        return torch.linalg.qr(left).Q
    return torch.linalg.solve_triangular(lower.mT, left, upper=True, left=False)


def _start(basis: Tensor) -> tuple[Tensor, Tensor]:
    """LU with partial pivoting of `basis` (O, R): the row order (O,) whose first R rows are the starting pivots, and
    the coefficients (O - R, R) of the others. Those are L2 U = C (L1 U) with L = [L1; L2]: U drops out.
    """
    with _cusolver(wanted=_many_on_a_gpu(basis)):
        packed, swaps = torch.linalg.lu_factor(basis)
    index = list(range(basis.shape[0]))  # thousands of swaps: on the host
    for row, other in enumerate((swaps - 1).tolist()):
        index[row], index[other] = index[other], index[row]
    rank = basis.shape[1]
    coefficients = torch.linalg.solve_triangular(
        packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True
    )
    return torch.tensor(index, device=basis.device), coefficients


@contextmanager
def _cusolver(*, wanted: bool) -> Iterator[None]:
    """For more rows than columns torch takes MAGMA's solver of many small matrices, which launches some fifty kernels a
    column and says on stderr that it is not meant for large ones; cuSOLVER's is the one it takes for square ones.
    """
    if not wanted or torch.version.cuda is None:
        yield
        return
    before = torch.backends.cuda.preferred_linalg_library()
    torch.backends.cuda.preferred_linalg_library("cusolver")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(before)


def _swap_until_bounded(
    chosen: Tensor, others: Tensor, coefficients: Tensor, bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange one pivot with one other row while some |coefficient| exceeds `bound`, updating C by rank one."""
    if coefficients.numel() == 0:
        return chosen, others, coefficients
    chosen, others, coefficients = chosen.clone(), others.clone(), coefficients.clone()
    width = coefficients.shape[1]
    # Each swap grows the volume by more than `bound`; partial pivoting starts near the maximum, so few are needed.
    for _ in range(20 * width):
        position = int(coefficients.abs().argmax())
        i, j = divmod(position, width)
        entry = coefficients[i, j].clone()
        if entry.abs() <= bound:
            break
        column = coefficients[:, j].clone()
        row = coefficients[i].clone()
        row[j] -= 1
        column[i] += 1
        coefficients -= torch.outer(column, row) / entry
        chosen[j], others[i] = others[i].clone(), chosen[j].clone()
    return chosen, others, coefficients
