"""One basis for several weights that read the same number of inputs, coefficients for each.

    W_l' = C_l B        B (R, I) shared, C_l (O_l, R) each layer's own;   l = 1 ... L

With the mean G of the layers' input Grams, the stacked weight [W_1; ...; W_L] has one optimum at rank R
(linalg/factor.py): its right factor is the basis, its left factor the coefficients, one below the other. It minimises
sum_l E|| (W_l - W_l') x ||^2 for inputs drawn from all layers alike. A layer's own inputs are not those of its
neighbours: with the basis fixed, `fitted` gives the coefficients that are best for what the layer itself reads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, Spectrum, balance, decompose, solve_symmetric, truncate
from spectrim.linalg.metric import root_of


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
