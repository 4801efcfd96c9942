"""The two parts of a low-rank weight in few bits: round one, let the other make up for it, round that one.

    W' = U V      target W (O, I), inputs with A = E[x x^T]; the error of the outputs is  tr (W - W') A (W - W')^T

    1. a basis in which rounding hurts little                          U T, T^-1 V         (factors only)
    2. V_q     V rounded by the column solver, its inputs have A
    3. U'      the least-squares U for V_q, towards T = U V + what V has no row for of W - U V
    4. U_q     U' rounded by the column solver, its inputs have V_q A V_q^T

Step 1. A rounded column of U, or row of V, is off by a share of its own norm, and the error of one is carried to the
outputs by the other: sum_i |u_i|^2 |v_i|^2 over the R rank-one terms. By Cauchy-Schwarz and the triangle inequality it
is at least |W'|_*^2 / R (the nuclear norm), and that is reached by the balanced factors U s^1/2, s^1/2 V^T turned by a
rotation after which all R terms are of one size; the singular vectors themselves give |W'|_F^2. A random rotation comes
close to equal sizes, and leaves no outliers.

Step 3. T, and not W: factors that were learned, or solved for with the errors of other layers in view, are not the
least-squares ones. Of W - U V they could not hold what is orthogonal to the rows of V in the metric; rows that are
rounded can hold a little of it. Without rounding, T gives U back.

Pivot storage has no basis to choose. Its rows are rounded first, and the coefficients of the others made for them:
T is then that of the other outputs alone.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, balance, solve_symmetric

Kept = TypeVar("Kept")
Rounding = Callable[[Tensor, Tensor], tuple[Kept, Tensor]]
"""From a matrix (m, n) and the second moment (n, n) of its inputs to what is stored and what that stands for (m, n)."""

Basis = Literal["rotated", "balanced"]
RIDGE = 1e-4
"""Of the mean variance of what a refitted part reads; it pulls towards the part as it was."""


def round_factors(
    weight: Tensor, factors: Factors, gram: Tensor, rounding: Rounding[Kept], *, basis: Basis = "rotated"
) -> tuple[Kept, Kept]:
    """Both factors (left, right) as `rounding` keeps them, all in float64; `weight` (O, I) is what they stand for."""
    left, right = spread(factors) if basis == "rotated" else balance(factors)
    kept_right, rounded = rounding(right, gram)
    refitted = refit_part(weight, Factors(left, right), rounded, gram)
    kept_left, _ = rounding(refitted, moment_behind(rounded, gram))
    return kept_left, kept_right


def round_pivots(
    others: Tensor, rows: Tensor, coefficients: Tensor, gram: Tensor, rounding: Rounding[Kept]
) -> tuple[Kept, Kept]:
    """Pivot rows (R, I) and the coefficients (O - R, R) of the others as `rounding` keeps them, all in float64.

    `others` (O - R, I) are the rows of the weight that the coefficients stand for.
    """
    kept_rows, rounded = rounding(rows, gram)
    refitted = refit_part(others, Factors(coefficients, rows), rounded, gram)
    kept_coefficients, _ = rounding(refitted, moment_behind(rounded, gram))
    return kept_rows, kept_coefficients


def spread(factors: Factors, *, seed: int = 0) -> Factors:
    """The same product, balanced, with its rank dimension turned by a fixed random rotation (step 1)."""
    left, right = balance(factors)
    rank = left.shape[1]
    drawn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(drawn).Q.to(left)
    return Factors(left @ rotation, rotation.mT @ right)


def refit_part(weight: Tensor, factors: Factors, rounded: Tensor, gram: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Step 3: the left factor (O, R) for `rounded` (R, I) in the place of the right one of `factors`.

    The minimum over B of  tr (T - B V_q) A (T - B V_q)^T + r |B - U|_F^2,  r = ridge tr(V_q A V_q^T) / R
    """
    left, right = factors
    missing = left @ (right - rounded) + beyond(weight - left @ right, right, gram)
    system = moment_behind(rounded, gram)
    eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
    damped = system + ridge * system.diagonal().mean() * eye
    return left + solve_symmetric(damped, (missing @ gram @ rounded.mT).mT).mT


def beyond(missing: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """What rows `right` (R, I) cannot express of `missing` (O, I): its part orthogonal to them in the metric."""
    explained = solve_symmetric(moment_behind(right, gram), right @ gram @ missing.mT)
    return missing - explained.mT @ right


def moment_behind(right: Tensor, gram: Tensor) -> Tensor:
    """E[z z^T] (R, R) of z = right x, for x with E[x x^T] = gram (I, I)."""
    moment = right @ gram @ right.mT
    return (moment + moment.mT) / 2


def size_of_terms(factors: Factors) -> Tensor:
    """sum_i |u_i|^2 |v_i|^2 over the rank-one terms: what step 1 makes small."""
    return (factors.left.square().sum(0) * factors.right.square().sum(1)).sum()
