"""One basis for several weights that read the same number of inputs, coefficients for each.

    W_l' = C_l B        B (R, I) shared, C_l (O_l, R) each layer's own;   l = 1 ... L

With the mean G of the layers' input Grams, the stacked weight [W_1; ...; W_L] has one optimum at rank R
(linalg/factor.py): its right factor is the basis, its left factor the coefficients, one below the other. It minimises
sum_l E|| (W_l - W_l') x ||^2 for inputs drawn from all layers alike. A layer's own inputs are not those of its
neighbours: with the basis fixed, `fitted` gives the coefficients that are best for what the layer itself reads.

Layers that read the very same input (q, k, v; gate, up), each with a metric B_l of its outputs (K-FAC), lose

    sum_l tr(B_l D_l A_l D_l^T),   D_l = W_l - C_l B            A_l the inputs' covariance; A their mean

With one A for all, the roots of the B_l make one block-diagonal root of the stacked weight, and Eckart-Young holds: the
eigenvectors of R^T (sum_l W_l^T B_l W_l) R, A = R R^T, give the components of all layers at once (`common_spectrum`).
No root of any B_l is needed where the outputs are more than the inputs, as they nearly always are. Where A_l differ
(token correlations measured at each layer's own outputs), components are those of the mean, and what the first r of
them lose is counted in every layer's own A_l, cross terms included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.factor import (
    Factors,
    Spectrum,
    balance,
    decompose,
    descending_eigh,
    solve_symmetric,
    truncate,
)
from spectrim.linalg.metric import root_of, triangle_of
from spectrim.linalg.pivot import to_pivots
from spectrim.linalg.running import running_sum


class SharedFactors(NamedTuple):
    """Weights of rank R with a common right factor: `W_l' = coefficients[l] @ basis`."""

    basis: Tensor  # (R, I)
    coefficients: tuple[Tensor, ...]  # each (O_l, R)


def stacked_spectrum(weights: Sequence[Tensor], gram: Tensor) -> Spectrum:
    """All components of the weights (O_l, I), one below the other, in the metric of `gram` (I, I); float64."""
    return decompose(torch.cat(list(weights)), right=root_of(gram))


def split(factors: Factors, outputs: Sequence[int]) -> SharedFactors:
    """Factors of stacked weights as one basis and each weight's coefficients; balanced, so that both round alike."""
    left, right = balance(factors)
    return SharedFactors(right, left.split(list(outputs)))


def shared_factors(weights: Sequence[Tensor], gram: Tensor, rank: int) -> SharedFactors:
    """The optimum of rank `rank` for inputs of the Gram matrix `gram` (I, I), the mean of the layers' own."""
    return split(truncate(stacked_spectrum(weights, gram), rank), [len(weight) for weight in weights])


def fitted(weight: Tensor, basis: Tensor, gram: Tensor) -> Tensor:
    """The coefficients (O, R) that are best for a fixed `basis` (R, I) and inputs of the Gram matrix `gram` (I, I).

    Minimises tr (W - C B) G (W - C B)^T: C = W G B^T (B G B^T)^-1. Directions of the basis that these inputs never
    excite get no coefficient.
    """
    return solve_symmetric(basis @ gram @ basis.mT, basis @ gram @ weight.mT).mT


def group_cost(outputs: Sequence[int], inputs: int, rank: Tensor) -> Tensor:
    """Stored numbers of one basis and the coefficients of all."""
    return rank * (inputs + sum(outputs))


def pivoted_group_cost(outputs: Sequence[int], inputs: int, rank: Tensor) -> Tensor:
    """Stored numbers with the basis in pivot storage: R of the inputs pass as they are, and their mask in bytes."""
    return rank * (inputs - rank + sum(outputs)) + (inputs + 7) // 8


class CommonSpectrum(NamedTuple):
    """Weights with one input as sums of components that have their right factors in common: `W_l = lefts[l] @ right`.

    `error` is of the whole group and counts every layer in its own metric; `energies` are of each layer alone.
    """

    lefts: tuple[Tensor, ...]  # each (O_l, K), K = min(I, sum O_l)
    right: Tensor  # (K, I)
    energies: tuple[Tensor, ...]  # each (K,): what the layer loses with that component alone
    error: Tensor  # (K+1,) of keeping the first 0, 1, ..., K components in all layers

    def spectra(self) -> list[Spectrum]:
        """Of each layer; right factors are the same tensor. Energies do not descend in each of them."""
        return [Spectrum(left, self.right, own) for left, own in zip(self.lefts, self.energies, strict=True)]


def common_spectrum(
    weights: Sequence[Tensor], outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> CommonSpectrum:
    """All common components of weights W_l (O_l, I), strongest first, float64.

    `outputs`: B_l (O_l, O_l) of each layer, None for the identity; `inputs`: A_l (I, I) of each layer. Source: the
    grouping is Basis Sharing's (arXiv 2410.03765) for layers of one block, the two-sided metric is ours.
    """
    mean = torch.stack(list(inputs)).mean(0)
    if sum(len(weight) for weight in weights) > mean.shape[0]:
        lefts, right = _by_inputs(weights, outputs, mean)
    else:
        lefts, right = _by_outputs(weights, outputs, mean)
    lost = [_lost_together(*given, right) for given in zip(lefts, outputs, inputs, strict=True)]
    return CommonSpectrum(
        tuple(lefts), right, tuple(own.diagonal().clamp(min=0) for own in lost), _cut_errors(torch.stack(lost).sum(0))
    )


def _by_inputs(
    weights: Sequence[Tensor], outputs: Sequence[Tensor | None], mean: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Through the (I, I) eigenproblem: W_l = (W_l R V) (V^T R^-1)."""
    right = triangle_of(mean)
    measured = sum(w.mT @ (w if b is None else b @ w) for w, b in zip(weights, outputs, strict=True))
    _, basis = descending_eigh(right.root.mT @ measured @ right.root)
    return [weight @ (right.root @ basis) for weight in weights], right.dual_times(basis).mT


def _by_outputs(
    weights: Sequence[Tensor], outputs: Sequence[Tensor | None], mean: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Through the (sum O, sum O) one: with T = [L_l^T W_l], W_l = (L_l^-T U_l) (U^T T)."""
    roots = [None if b is None else triangle_of(b) for b in outputs]
    measured = torch.cat([w if b is None else b.root.mT @ w for w, b in zip(weights, roots, strict=True)])
    _, basis = descending_eigh(measured @ (mean if bool(mean.any()) else torch.eye(len(mean)).to(mean)) @ measured.mT)
    parts = basis.split([len(weight) for weight in weights])
    lefts = [part if b is None else b.dual_times(part) for part, b in zip(parts, roots, strict=True)]
    return lefts, basis.mT @ measured


def _lost_together(left: Tensor, output: Tensor | None, inputs: Tensor, right: Tensor) -> Tensor:
    """H (K, K): losing the components of a set S costs the layer the sum of H_ij over i, j in S."""
    return (left.mT @ (left if output is None else output @ left)) * (right @ inputs @ right.mT)


def _cut_errors(lost: Tensor) -> Tensor:
    """Sums (K+1,) of the last K, K-1, ..., 0 rows and columns."""
    corners = running_sum(running_sum(lost.flip(0, 1), 0), 1).diagonal().flip(0).clamp(min=0)
    return torch.cat([corners, corners.new_zeros(1)])


class PivotedBasis(NamedTuple):
    """A basis (R, I) that is the identity in R of its columns, and coefficients that fit it."""

    rest: Tensor  # (R, I - R), the other columns in their order
    mask: Tensor  # (I,) bool: the R columns
    coefficients: tuple[Tensor, ...]  # each (O_l, R): the columns of W_l' at the mask

    def basis(self) -> Tensor:
        """(R, I)."""
        return spread_basis(self.rest, self.mask)


def spread_basis(rest: Tensor, mask: Tensor) -> Tensor:
    """The basis (R, I) of which `rest` (R, I - R) are the columns that `mask` (I,) does not mark."""
    basis = rest.new_zeros(len(rest), len(mask))
    basis[:, mask] = torch.eye(len(rest), dtype=rest.dtype, device=rest.device)
    basis[:, ~mask] = rest
    return basis


def pivoted(shared: SharedFactors) -> PivotedBasis:
    """The same weights, exactly, in R^2 numbers less: pivot storage of the stacked weight's transpose.

    R inputs pass as they are. Needs R <= I; compute in float64.
    """
    stacked = torch.cat(list(shared.coefficients))
    found = to_pivots(Factors(shared.basis.mT, stacked.mT))
    parts = found.rows.mT.split([len(own) for own in shared.coefficients])
    return PivotedBasis(found.coefficients.mT, found.mask, tuple(parts))
