"""The calibrated column solver: round a weight column by column, later columns make up for the error of earlier ones.

With the inputs' second moment H = E[x x^T] + damping, the change of the outputs is  tr (W - W') H (W - W')^T. Columns
are rounded in order; after column j the optimal change of those not yet rounded is (OBS; Hassibi and Stork 1993)

    e = (w_j - w'_j) / U_jj         W[:, j+1:] -= e U[j, j+1:]         U^T U = H^-1, U upper triangular

which is GPTQ (Frantar et al., arXiv 2210.17323). A block of columns is finished before the rest of the weight is
touched: the same numbers, by matrix products. How a column is rounded is a rule's business: a grid for each group
(GPTQ), a mask for every four columns (SparseGPT, arXiv 2301.00774), outliers kept as they are (SpQR).
"""

from typing import Protocol

import torch
from torch import Tensor

from spectrim.linalg.fallback import Fallback, tell
from spectrim.linalg.quantise import Grid, Rounded, code_of, fit_grid, level_of
from spectrim.linalg.solver import SolverError

BLOCK = 128
DAMPING = 0.01
"""Of the mean diagonal of the Gram matrix."""


class Rule(Protocol):
    """How columns are rounded. `unit` neighbouring columns are looked at together before the first of them is."""

    unit: int

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        """`weight` (O, unit) from column `start` on, as error feedback has left it; `diagonal` (unit,) of U."""
        ...

    def round(self, column: int, values: Tensor) -> Tensor:
        """What the column (O,) becomes."""
        ...


def inverse_root(gram: Tensor, *, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = (gram + damping mean(diag) 1)^-1; the identity for inputs that never fire.

    From the Cholesky factor of the matrix with rows and columns reversed, which is upper triangular when turned back:
    its inverse is U, without forming the inverse of the Gram matrix. Damping is raised tenfold where that fails.
    """
    mean = gram.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    symmetric = (gram + gram.mT) / (2 * mean)  # scaled first: U of a tiny Gram matrix would overflow
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for tries in range(6):
        raised = damping * 10**tries
        lower, failed = torch.linalg.cholesky_ex((symmetric + raised * eye).flip(0, 1))
        if int(failed) == 0:
            if tries:
                tell(Fallback("cholesky", f"{len(gram)} x {len(gram)}", f"damping {raised:g}", "not positive definite"))
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return upper / mean.sqrt()
    raise SolverError(
        f"Cholesky of a {len(gram)} x {len(gram)} Gram matrix failed up to damping {raised:g}", gram.cpu()
    )


def solve_columns(weight: Tensor, upper: Tensor, rule: Rule, *, block: int = BLOCK) -> Tensor:
    """The rounded weight (O, I) from `upper` (I, I) of `inverse_root`, in the dtype of `weight`: pass float64."""
    if block % rule.unit and rule.unit % block:
        block = rule.unit  # a unit that lay across two blocks would be looked at before its feedback is complete
    now, rounded = weight.clone(), torch.empty_like(weight)
    inputs, diagonal = weight.shape[1], upper.diagonal()
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty_like(now[:, start:stop])
        for column in range(start, stop):
            if column % rule.unit == 0:
                end = min(column + rule.unit, inputs)
                rule.begin(column, now[:, column:end], diagonal[column:end])
            rounded[:, column] = rule.round(column, now[:, column])
            error = (now[:, column] - rounded[:, column]) / diagonal[column]
            now[:, column + 1 : stop] -= torch.outer(error, upper[column, column + 1 : stop])
            errors[:, column - start] = error
        now[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded


class UniformRule:
    """A uniform grid for each group of columns, fitted to what feedback has made of them (GPTQ)."""

    def __init__(self, weight: Tensor, bits: int, group_size: int, *, symmetric: bool, search: bool = False) -> None:
        self.bits, self.symmetric, self.search = bits, symmetric, search
        self.unit = group_size or weight.shape[1]
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.grids: list[Grid] = []

    def begin(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        # An error at a column costs error^2 / U_jj^2 once the later columns have made up for what they can.
        importance = diagonal.square().reciprocal() if self.search else None
        self.grids.append(
            fit_grid(weight, self.bits, symmetric=self.symmetric, importance=importance, search=self.search)
        )

    def round(self, column: int, values: Tensor) -> Tensor:
        grid = self.grids[-1]
        codes = code_of(values, grid, self.bits)
        self.codes[:, column] = codes.to(torch.uint8)
        return level_of(codes, grid)

    def result(self) -> Rounded:
        """Codes and grids of all columns."""
        scales = torch.stack([grid.scale for grid in self.grids], dim=1)
        zeros = None if self.symmetric else torch.stack([grid.zero for grid in self.grids], dim=1).to(torch.uint8)
        return Rounded(self.codes, scales, zeros)


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    search: bool = False,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Rounded:
    """`weight` (O, I) in codes, rounded column by column for inputs with second moment `gram` (I, I), both float64."""
    rule = UniformRule(weight, bits, group_size, symmetric=symmetric, search=search)
    solve_columns(weight, inverse_root(gram, damping=damping), rule, block=block)
    return rule.result()
