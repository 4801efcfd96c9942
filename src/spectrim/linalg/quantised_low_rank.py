"""A weight as codes plus a low-rank part, W ~ Q + L, both fitted to each other (LQ-LoRA, arXiv 2311.12023).

minimise  sum_ij F_ij (W - Q - L)_ij^2          F: the diagonal Fisher information, or ones

1. L = SVD of rank R of A (W - Q) B, and back by A^-1, B^-1;   Q = 0 at first
   A = diag(mean over inputs of F)^1/2, B = diag(mean over outputs of F)^1/2: the weighted problem has no closed form,
   but where F is of rank one this is it
2. Q = NF(W - L)
3. again, until a round lowers the error no more; the best Q and L that were seen

Calibrated (`calibrated_importance`; ours, not in the paper) it is the second-order loss of the column solver:

minimise  tr A^2 (W - Q - L) G (W - Q - L)^T        G: the inputs' second moment

with G^1/2 in the place of B, where step 1 is exact, and in step 2 later columns make up for the error of earlier ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.columns import inverse_root
from spectrim.linalg.factor import Factors, balance, decompose, truncate
from spectrim.linalg.metric import Root, diagonal_root, root_of
from spectrim.linalg.normal_columns import round_columns_to_normal
from spectrim.linalg.normal_float import Form, NormalRounded, from_normal, round_to_normal, rounding_errors

LEAST_IMPORTANCE = 1e-3
"""Of a row or column, relative to their mean: what no gradient reached would else divide by zero."""


class Importance(NamedTuple):
    """What an error at each number of a weight costs, and its stand-in of rank one."""

    each: Tensor  # (O, I); calibrated: what is left of an error once later columns have made up for what they can
    rows: Root  # (O, O), A
    columns: Root  # (I, I), B
    upper: Tensor | None = None  # (I, I) of `inverse_root`; None: inputs count apart


class CodesAndFactors(NamedTuple):
    """Q in codes, L in factors, and what both together miss of the weight."""

    rounded: NormalRounded
    factors: Factors
    error: float


def importance_of(fisher: Tensor) -> Importance:
    """From the Fisher information (O, I) of single weights; where it is 0 throughout, all count alike."""
    each = fisher if bool((fisher > 0).any()) else torch.ones_like(fisher)
    rows, columns = (_raised(each.mean(dim).sqrt()).square() for dim in (1, 0))
    return Importance(each, diagonal_root(rows), diagonal_root(columns))


def calibrated_importance(fisher: Tensor, gram: Tensor) -> Importance:
    """From the Fisher information (O, I), of which outputs' means count, and the inputs' second moment (I, I)."""
    rows = importance_of(fisher).rows
    upper = inverse_root(gram)
    each = torch.outer(rows.root.diagonal().square(), upper.diagonal().square().reciprocal())
    return Importance(each, rows, root_of(gram), upper)


def _raised(importance: Tensor) -> Tensor:
    return importance.clamp(min=LEAST_IMPORTANCE * importance.mean())


def weighted_error(missing: Tensor, importance: Importance) -> float:
    """What is minimised, of what is missing (O, I)."""
    if importance.upper is not None:
        return float((importance.rows.root @ missing @ importance.columns.root).square().sum())
    return float((missing.square() * importance.each).sum())


def low_rank_part(missing: Tensor, rank: int, importance: Importance) -> Factors:
    """Step 1: factors of L for W - Q (O, I), float64."""
    return truncate(decompose(missing, left=importance.rows, right=importance.columns), rank)


def codes_and_factors(
    weight: Tensor, form: Form, rank: int, importance: Importance, *, iterations: int
) -> CodesAndFactors:
    """Steps 1 to 3 for a weight (O, I), float64; rank 0 has no factors to fit, and rounds once."""
    factors = low_rank_part(weight, rank, importance)
    best = _with_codes(weight, form, factors, importance)
    for _ in range(iterations - 1 if rank else 0):
        factors = low_rank_part(weight - from_normal(best.rounded, form, weight.dtype), rank, importance)
        now = _with_codes(weight, form, factors, importance)
        if now.error >= best.error:
            break
        best = now
    return best._replace(factors=balance(best.factors) if rank else best.factors)


def _with_codes(weight: Tensor, form: Form, factors: Factors, importance: Importance) -> CodesAndFactors:
    """Step 2."""
    left_over = weight - factors.left @ factors.right
    if importance.upper is None:
        rounded = round_to_normal(left_over, form)
    else:
        rounded = round_columns_to_normal(left_over, importance.upper, form)
    error = weighted_error(left_over - from_normal(rounded, form, weight.dtype), importance)
    return CodesAndFactors(rounded, factors, error)


def errors_of_forms(weight: Tensor, forms: Sequence[Form], rank: int, importance: Importance) -> Tensor:
    """The error (len(forms),) of each form after the first round, in which L is the same for all; in float32."""
    factors = low_rank_part(weight, rank, importance)
    left_over = (weight - factors.left @ factors.right).float()
    unit = importance.each.mean()  # single entries may be too small for float32
    return rounding_errors(left_over, forms, (importance.each / unit).float()) * unit.double().cpu()
