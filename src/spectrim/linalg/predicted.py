"""What a weight loses in some form, to second order, known before anything is coded.

    W (O, I)   A = E[x x^T] = (U^T U)^-1, damped   B = E[g g^T], shrunk, its diagonal b   s_i  root mean square of row i
    loss of an error E:   1/2 tr(B E A E^T)        D   squared error of a code for normal weights of variance 1

    codes       1/2 D sum_i b_i s_i^2 sum_j 1 / U_jj^2             column feedback leaves 1 / U_jj^2 of an input
                and, of weights beyond the end z s_i of the table,   1/2 sum_ij b_i (|w_ij| - z s_i)^2 / U_jj^2;
                rows take the scale, s_i or a multiple of it, that is best for both
    8 bits      D_i = (2 max_j |w_ij| / 255)^2 / 12 of each row in the place of D s_i^2
    a cut       1/2 sum_{k > r} e_k                                e the squared singular values of B^1/2 W A^1/2
    a split     W = W_r + rest, the rest in codes: its rows are smaller.  W_r is the best for diag(b)^1/2 W, since
                codes cost  D / I sum_i b_i |row i of the rest|^2 sum_j 1 / U_jj^2
    entries     kept apart, those that cost most in codes: what is left is smaller, and may end within the table
    two parts   in codes with a random rotation T between them (linalg/quantised_factors.py), t_k = e_k^1/2, k <= r:
                1/2 D g ((1 - r / O) sum_k t_k p_k + sum_k t_k q_k sum_j 1 / U_jj^2 / I)
                g the mean of what feedback leaves of T^T diag(t) T; p_k, q_k what component k is outside of the metric
                (1 where B and A are the identity). r of O dimensions of the left error are made up for by the refit
    pivots      rows P, coefficients C of the others, M = [1; C]^T B [1; C]: the same two sums, of P and C as they are

Codes of two parts cost at full rank, for equal t_k, twice what codes of the weight do. Formulas for two parts are
estimates (a rotation is drawn at random, blocks give less feedback than single rows); tests hold them to what is
measured.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.columns import inverse_root
from spectrim.linalg.factor import Factors, Spectrum, decompose, descending_eigh, truncate
from spectrim.linalg.metric import Root, quick_root
from spectrim.linalg.pivot import Pivots
from spectrim.linalg.quantised_factors import rotation
from spectrim.linalg.running import running_sum
from spectrim.linalg.trellis_columns import RowLosses, code_end, row_losses


class Measured(NamedTuple):
    """A weight with its metric, all float64."""

    weight: Tensor  # (O, I)
    gram: Tensor  # (I, I) A, before damping
    upper: Tensor  # (I, I) U
    outputs: Tensor  # (O, O) B

    @property
    def columns(self) -> float:
        """sum_j 1 / U_jj^2."""
        return float(self.upper.diagonal().square().reciprocal().sum())

    @property
    def roots(self) -> tuple[Root, Root]:
        """Of B and of A."""
        eye = torch.eye(len(self.upper), dtype=self.upper.dtype, device=self.upper.device)
        inverse = torch.linalg.solve_triangular(self.upper, eye, upper=True)
        return quick_root(self.outputs), Root(inverse, self.upper.mT)

    @property
    def by_row(self) -> Tensor:
        """b_i^1/2 w_ij: what codes cost, up to what inputs add."""
        return self.by_row_of(self.weight)

    def by_row_of(self, weight: Tensor) -> Tensor:
        """The same of another weight (O, I)."""
        return self.outputs.diagonal().sqrt()[:, None] * weight


def code_noise(measured: Measured) -> float:
    """Loss of codes over D, up to what lies beyond the end of a table."""
    return float(measured.by_row.square().sum()) / measured.weight.shape[1] * measured.columns / 2


class InCodes(NamedTuple):
    """What codes of a weight, or of what is left of one, lose."""

    counts: Tensor  # (O,) b
    rows: RowLosses
    byte: float

    def at(self, distortion: float) -> float:
        """In trellis codes of this D."""
        return float(self.counts @ self.rows.best(distortion).losses) / 2


def in_codes(measured: Measured, window: int, rest: Tensor | None = None) -> InCodes:
    """Of the weight, or of the `rest` (O, I) that is to be coded in its place."""
    weight = measured.weight if rest is None else rest
    counts = measured.outputs.diagonal()
    grid = (2 / 255 * weight.abs().amax(1)).square() / 12
    return InCodes(counts, row_losses(weight, measured.upper, window), float(counts @ grid) * measured.columns / 2)


RANKING = 0.0056
"""D at which entries are ranked: that of 4 bits."""


def entry_scores(measured: Measured, window: int) -> Tensor:
    """(O, I) what codes lose by each entry: its share of its row's size, and what of it lies beyond the table."""
    columns = measured.upper.diagonal().square().reciprocal()
    ends = code_end(window) * measured.weight.square().mean(1, keepdim=True).sqrt()
    beyond = (measured.weight.abs() - ends).clamp(min=0).square() * columns
    size = RANKING * measured.weight.square() * columns.mean()
    return measured.outputs.diagonal()[:, None] * (beyond + size)


def split_basis(measured: Measured) -> tuple[Tensor, Tensor]:
    """Squared singular values (K,) of diag(b)^1/2 W, and the basis (O, K) or (I, K) of its smaller side."""
    rows = measured.by_row
    return descending_eigh(rows @ rows.mT if rows.shape[0] <= rows.shape[1] else rows.mT @ rows)


def split(measured: Measured, rank: int) -> Factors:
    """W_r (left (O, r), right (r, I)), in which diag(b)^1/2 W_r has the first singular values."""
    _, basis = split_basis(measured)
    first = basis[:, :rank]
    if measured.weight.shape[0] > measured.weight.shape[1]:
        return Factors(measured.weight @ first, first.mT)
    half = measured.outputs.diagonal().sqrt()[:, None]
    return Factors(first / half, first.mT @ (half * measured.weight))


class Parts(NamedTuple):
    """Of a weight as two factors."""

    spectrum: Spectrum
    sizes: Tensor  # (K,) t
    left: Tensor  # (K,) sum_k t_k p_k for ranks 1 to K
    right: Tensor  # (K,) the other sum, inputs counted

    def cut(self, rank: int) -> float:
        """Loss of the cut alone."""
        return float(self.spectrum.energy[rank:].sum()) / 2

    def noise(self, rank: int) -> float:
        """Loss of codes of both parts at this rank over D."""
        turn = rotation(rank, self.sizes)
        missed = 1 - rank / len(self.spectrum.left)
        sums = missed * self.left[rank - 1] + self.right[rank - 1]
        return float(left_over((turn.mT * self.sizes[:rank]) @ turn).mean() * sums) / 2

    def factors(self, rank: int) -> Factors:
        """Those of the cut."""
        return truncate(self.spectrum, rank)


def in_parts(measured: Measured) -> Parts:
    """The cut of least loss, and what codes of its two factors cost."""
    spectrum = decompose(measured.weight, *measured.roots)
    energy = spectrum.energy
    sizes = energy.clamp(min=float(energy.sum()) * 1e-24 + 1e-300).sqrt()
    # Components as decompose leaves them carry all of their size on one side: that side is divided by it.
    outside = measured.outputs.diagonal() @ spectrum.left.square()
    inside = spectrum.right.square().sum(1)
    on_left = measured.weight.shape[0] > measured.weight.shape[1]
    p, q = (outside / sizes.square(), inside) if on_left else (outside, inside / sizes.square())
    share = measured.columns / measured.weight.shape[1]
    return Parts(spectrum, sizes, running_sum(sizes * p), running_sum(sizes * q) * share)


def pivot_noise(pivots: Pivots, measured: Measured) -> float:
    """Loss of codes of pivot rows and coefficients over D."""
    order = torch.cat([pivots.mask.nonzero().flatten(), (~pivots.mask).nonzero().flatten()])
    outputs = measured.outputs[order][:, order]
    rank = len(pivots.rows)
    left = torch.cat([torch.eye(rank, dtype=outputs.dtype, device=outputs.device), pivots.coefficients])
    seen = torch.linalg.solve_triangular(measured.upper, pivots.rows, upper=True, left=False)  # P A P^T = seen seen^T
    rows = (left_over(left.mT @ outputs @ left) * pivots.rows.square().mean(1)).sum() * measured.columns
    sizes = pivots.coefficients.square().mean(1) if len(pivots.coefficients) else pivots.coefficients.new_zeros(0)
    others = (outputs.diagonal()[rank:] * sizes).sum() * left_over(seen @ seen.mT).sum() * (1 - rank / len(left))
    return float(rows + others) / 2


def left_over(moment: Tensor) -> Tensor:
    """(n,) what feedback leaves of each dimension of a second moment: 1 / U_jj^2 of `columns.inverse_root`."""
    return inverse_root(moment).diagonal().square().reciprocal()
