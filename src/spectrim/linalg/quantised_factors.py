"""The two parts of a low-rank weight in few bits: round one, let the other make up for it, round that one.

    W' = U V      inputs with A = E[x x^T], outputs weighed by B (the identity, or E[g g^T] of their gradients)
    error of E = W' - U_q V_q:   tr (B E A E^T)

    1. a basis in which rounding hurts little                          U T, T^-1 V
    2. U_q     U rounded by the column solver: it reads V x, with the second moment V A V^T
    3. V'      the V that fits best to U_q:  (U_q^T B U_q)^-1 U_q^T B U V
    4. V_q     V' rounded by the column solver, in a few blocks of rows; rows that are not rounded yet make up for
               those that are, as later columns do for earlier ones

Step 1. A rounded column of U, or row of V, is off by a share of its own norm, and the error of one is carried to the
outputs by the other: sum_i |u_i|^2 |v_i|^2 over the R rank-one terms. It is at least |W'|_*^2 / R (nuclear norm;
Cauchy-Schwarz), and that is reached by balanced factors U s^1/2, s^1/2 V^T turned by a rotation after which all terms
are of one size; balanced factors as they are give |W'|_F^2. A random rotation comes close to equal sizes and leaves no
outliers.

Step 4. With M = U_q^T B U_q the error of the rows of V is tr (M D A D^T), D = V' - V_q. Once the rows K are rounded,
the best change of the others L is  -D_L = M_LL^-1 M_LK D_K,  whatever A is.

Pivot storage is U = [1; C] with the outputs in the order pivots, others: there is no basis to choose, and of U only C
is rounded. Columns of [1; C] are far from orthogonal, and step 4 is worth most there.

The target is W' and not the dense weight: factors that were learned, or solved for with the errors of other layers in
view, are not the least-squares ones. At 16 bits nothing would change.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, balance, solve_symmetric
from spectrim.linalg.metric import quick_root

Kept = TypeVar("Kept")
Rounding = Callable[[Tensor, Tensor], tuple[Kept, Tensor]]
"""From a matrix (m, n) and the second moment (n, n) of its inputs to what is stored and what that stands for (m, n)."""

Basis = Literal["rotated", "balanced"]
BLOCKS, LEAST_ROWS = 8, 16
"""Blocks of rows in step 4, at most, each of at least so many: a block costs one run of the column solver."""
RIDGE = 1e-4
DAMPING = 0.01
"""Both of the mean diagonal of M: in step 3, where it pulls towards V, and in step 4."""


def round_factors(
    factors: Factors,
    gram: Tensor,
    rounding: Rounding[Kept],
    together: Callable[[list[Kept]], Kept],
    *,
    outputs: Tensor | None = None,
    basis: Basis = "rotated",
    rows_at_once: int | None = None,
) -> tuple[Kept, Kept]:
    """Both factors (left, right) as `rounding` keeps them, all in float64.

    `gram` (I, I) is A and `outputs` (O, O) is B (None: 1). `together` makes one of what was kept of blocks of rows,
    `rows_at_once` of them each in step 4 (default: as `round_rows`).
    """
    left, right = spread(factors, outputs) if basis == "rotated" else balance(factors)
    kept_left, rounded = rounding(left, moment_behind(right, gram))
    weighed = _weighed(rounded, outputs)
    refitted = refit_rows(left, rounded, right, weighed)
    return kept_left, together(round_rows(refitted, gram, rounded.mT @ weighed, rounding, size=rows_at_once))


def round_pivots(
    rows: Tensor,
    coefficients: Tensor,
    gram: Tensor,
    rounding: Rounding[Kept],
    together: Callable[[list[Kept]], Kept],
    *,
    outputs: Tensor | None = None,
    rows_at_once: int | None = None,
) -> tuple[Kept, Kept]:
    """Pivot rows (R, I) and the coefficients (O - R, R) of the others as `rounding` keeps them, all in float64.

    `outputs` is B with the outputs in the order pivots, others.
    """
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    kept_coefficients, rounded = rounding(coefficients, moment_behind(rows, gram))
    left = torch.cat([eye, rounded])
    weighed = _weighed(left, outputs)
    refitted = refit_rows(torch.cat([eye, coefficients]), left, rows, weighed)
    return together(round_rows(refitted, gram, left.mT @ weighed, rounding, size=rows_at_once)), kept_coefficients


def spread(factors: Factors, outputs: Tensor | None = None, *, seed: int = 0) -> Factors:
    """The same product, balanced, with its rank dimension turned by a fixed random rotation (step 1).

    With `outputs` (O, O), B, the left factor is measured in it.
    """
    if outputs is None:
        left, right = balance(factors)
    else:
        root = quick_root(outputs)
        measured, right = balance(Factors(root.root.mT @ factors.left, factors.right))
        left = root.dual @ measured
    turn = rotation(left.shape[1], left, seed=seed)
    return Factors(left @ turn, turn.mT @ right)


def rotation(rank: int, like: Tensor, *, seed: int = 0) -> Tensor:
    """The fixed random rotation (R, R), in the dtype and on the device of `like`."""
    drawn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(like)


def refit_rows(left: Tensor, rounded: Tensor, right: Tensor, weighed: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Step 3: the right factor (R, I) for `rounded` (O, R) in the place of `left`; `weighed` is B times `rounded`.

    The minimum over V' of  tr B (U V - U_q V')(U V - U_q V')^T + r |V' - V|_F^2,  r = ridge tr(U_q^T B U_q) / R
    """
    system = rounded.mT @ weighed
    eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
    damped = system + ridge * system.diagonal().mean() * eye
    return right + solve_symmetric(damped, (weighed.mT @ (left - rounded)) @ right)


def round_rows(
    right: Tensor, gram: Tensor, between: Tensor, rounding: Rounding[Kept], *, size: int | None = None
) -> list[Kept]:
    """Step 4: what is kept of each block of `size` rows of `right` (R, I); `between` (R, R) is M."""
    rank = len(right)
    size = max(LEAST_ROWS, -(-rank // BLOCKS)) if size is None else size
    eye = torch.eye(rank, dtype=right.dtype, device=right.device)
    damped = between + DAMPING * between.diagonal().mean() * eye
    missing, kept = torch.zeros_like(right), []
    for start in range(0, rank, size):
        rows = slice(start, min(start + size, rank))
        made_up = solve_symmetric(damped[start:, start:], damped[start:, :start] @ missing[:start])[: rows.stop - start]
        part, rounded = rounding(right[rows] + made_up, gram)
        missing[rows] = right[rows] - rounded
        kept.append(part)
    return kept


def moment_behind(right: Tensor, gram: Tensor) -> Tensor:
    """E[z z^T] (R, R) of z = right x, for x with E[x x^T] = gram (I, I)."""
    moment = right @ gram @ right.mT
    return (moment + moment.mT) / 2


def size_of_terms(factors: Factors) -> Tensor:
    """sum_i |u_i|^2 |v_i|^2 over the rank-one terms: what step 1 makes small."""
    return (factors.left.square().sum(0) * factors.right.square().sum(1)).sum()


def _weighed(left: Tensor, outputs: Tensor | None) -> Tensor:
    return left if outputs is None else outputs @ left
