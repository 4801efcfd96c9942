"""Truncated decompositions in a metric, without inverses of what was measured.

With roots L (outputs) and R (inputs) of the metric and M = L^T W R, the rank-R matrix nearest to W in
`|| L^T (W - W') R ||_F` is found from the eigenvectors of the smaller of M M^T and M^T M:

    O <= I:   M M^T = U diag(e) U^T     W = (L^-T U) (U^T L^T W)      left, right
    O >  I:   M^T M = V diag(e) V^T     W = (W R V) (V^T R^-1)

Both are products that give W back at full rank whatever the accuracy of the eigenvectors, and cutting them to
R columns gives the optimum (Eckart-Young). One-sided (L = 1) this is W' = U_R U_R^T W, the inversion-free form of
SVD-LLM. The energies e are squared singular values of M: the error of keeping R components is the sum of the rest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.linalg.metric import Root, Triangle, safe_cholesky, triangle_of
from spectrim.linalg.running import running_sum
from spectrim.linalg.solver import eigh, svd

Half = Root | Triangle
"""One side of a metric."""


class Spectrum(NamedTuple):
    """A weight as an ordered sum of rank-one components: `W = left @ right`, strongest first."""

    left: Tensor  # (O, K)
    right: Tensor  # (K, I)
    energy: Tensor  # (K,) squared error, in the metric, of removing each component alone; descending

    def tail(self) -> Tensor:
        """Error (K+1,) of keeping the first 0, 1, ..., K components."""
        return tail_energy(self.energy)

    def order_by(self, importance: Tensor) -> "Spectrum":
        """The same sum with components in descending order of `importance` (K,)."""
        order = importance.argsort(descending=True, stable=True)
        return Spectrum(self.left[:, order], self.right[order], self.energy[order])


class Factors(NamedTuple):
    """A rank-R matrix as `left @ right`."""

    left: Tensor  # (O, R)
    right: Tensor  # (R, I)


def tail_energy(energy: Tensor) -> Tensor:
    """Sums of the last K, K-1, ..., 0 entries of `energy` (K,): shape (K+1,)."""
    return torch.cat([running_sum(energy.flip(0)).flip(0), energy.new_zeros(1)])


def decompose(weight: Tensor, left: Half | None = None, right: Half | None = None) -> Spectrum:
    """All components of `weight` (O, I) in the metric given by two roots; None is the identity.

    Cost: one symmetric eigenproblem on the smaller side, two products. Precision is that of `weight`: pass float64.
    """
    measured = weight
    if left is not None:
        measured = left.root.mT @ measured
    if right is not None:
        measured = measured @ right.root
    outputs, inputs = measured.shape
    if outputs <= inputs:
        energy, basis = descending_eigh(measured @ measured.mT)
        left_OK = basis if left is None else left.dual_times(basis)
        right_KI = basis.mT @ (weight if left is None else left.root.mT @ weight)
    else:
        energy, basis = descending_eigh(measured.mT @ measured)
        left_OK = (weight if right is None else weight @ right.root) @ basis
        right_KI = basis.mT if right is None else right.dual_times(basis).mT
    return Spectrum(left_OK, right_KI, energy)


def decompose_between(weight: Tensor, output: Tensor, inputs: Tensor) -> Spectrum:
    """`decompose` in the roots of two covariances, `output` (O, O) and `inputs` (I, I), float64.

    For O <= I only L is a root: with T = L^T W is M M^T = T R R^T T^T = T A T^T. A root of the larger side, which is
    most of the work beside the eigenproblem, is never formed. O > I is the same of W^T.
    """
    if weight.shape[0] > weight.shape[1]:
        turned = decompose_between(weight.mT, inputs, output)
        return Spectrum(turned.right.mT, turned.left.mT, turned.energy)
    left = triangle_of(output)
    measured = left.root.mT @ weight
    energy, basis = descending_eigh(_gram_in(measured, inputs))
    return Spectrum(left.dual_times(basis), basis.mT @ measured, energy)


def energies_between(weight: Tensor, output: Tensor, inputs: Tensor) -> Tensor:
    """The energies (K,) of `decompose_between` alone."""
    if weight.shape[0] > weight.shape[1]:
        return energies_between(weight.mT, inputs, output)
    # With vectors or without, a GPU takes as long; with them the answer can be checked.
    return descending_eigh(_gram_in(triangle_of(output).root.mT @ weight, inputs))[0]


def _gram_in(measured: Tensor, covariance: Tensor) -> Tensor:
    """`T A T^T` (K, K) of T (K, I); a covariance of zeros says nothing about directions and counts as the identity."""
    return measured @ (measured if not bool(covariance.any()) else measured @ covariance).mT


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clamped at 0) and eigenvectors of a symmetric non-negative matrix."""
    values, vectors = eigh((gram + gram.mT) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def truncate(spectrum: Spectrum, rank: int) -> Factors:
    """Keep the first `rank` components."""
    return Factors(spectrum.left[:, :rank], spectrum.right[:rank])


def balance(factors: Factors) -> Factors:
    """The same product with `left^T left = right right^T`: both factors then round and quantise equally well.

    left = Q_l S_l, right = S_r Q_r (thin QR); SVD(S_l S_r) = U s V^T; left = Q_l U s^1/2, right = s^1/2 V^T Q_r.
    """
    q_left, s_left = torch.linalg.qr(factors.left)
    q_right, s_right = torch.linalg.qr(factors.right.mT)
    u, s, vt = svd(s_left @ s_right.mT)
    half = s.sqrt()
    return Factors(q_left @ (u * half), (half[:, None] * vt) @ q_right.mT)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the dtype they have, also under autocast.

    Components of a metric are far from orthogonal: their sum cancels, and factors rounded to bf16 do not give it.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def randomised_factors(
    weight: Tensor,
    rank: int,
    right: Root | None = None,
    *,
    oversample: int = 16,
    power_iterations: int = 4,
    seed: int = 0,
) -> Factors:
    """Near-optimal rank-`rank` factors of `weight` (O, I) when the rank is far below the full one.

    Range finder with power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4) on W R, then the projection
    U U^T W. Error at most a few per cent above the optimum for spectra that decay.
    """
    measured = weight if right is None else weight @ right.root
    generator = torch.Generator(device="cpu").manual_seed(seed)
    width = min(rank + oversample, *measured.shape)
    probe = torch.randn(measured.shape[1], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(measured @ probe.to(measured)).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(measured @ torch.linalg.qr(measured.mT @ basis).Q).Q
    rotation, _, _ = svd(basis.mT @ measured)
    basis = basis @ rotation[:, :rank]
    return Factors(basis, basis.mT @ weight)


def refit_left(weight: Tensor, right: Tensor, cross: Tensor, gram: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Least-squares left factor for a fixed `right` (R, I): minimise E|| W x - B right x' ||^2 over B (O, R).

    `cross` is E[x x'^T] between the dense model's inputs and the compressed model's, `gram` is E[x' x'^T]
    (both (I, I)). The ridge is relative to the mean diagonal of the R x R system, so few tokens cannot blow it up:
    it pulls towards the least-squares answer of the undisturbed problem, not towards zero.
    Source: the sequential update of SVD-LLM (arXiv 2403.07378).
    """
    system = right @ gram @ right.mT
    target = weight @ cross @ right.mT
    damping = ridge * system.diagonal().mean()
    # Anchor: where x' = x is all there is to learn from, B0 = W G right^T (right G right^T)^-1 is the answer.
    anchor = solve_symmetric(system, (weight @ gram @ right.mT).mT).mT
    eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
    return solve_symmetric(system + damping * eye, (target + damping * anchor).mT).mT


def refit_right(
    weight: Tensor, left: Tensor, right: Tensor, cross: Tensor, gram: Tensor, *, ridge: float = 1e-3
) -> Tensor:
    """Least-squares right factor for a fixed `left` (O, R): minimise E|| W x - left A x' ||^2 over A (R, I).

    `cross` and `gram` as in `refit_left`. Solved for the change of `right` (R, I); the ridge, relative to the mean
    input variance, pulls towards what was there. Source: the second half of MPIFA's reconstruction (ICML 2025).
    """
    damping = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    missing = left.mT @ (weight @ cross - left @ (right @ gram))
    change = solve_symmetric(left.mT @ left, missing)
    return right + solve_symmetric(gram + damping, change.mT).mT


DRIFT_RIDGE = 0.1
"""Of the mean input variance. Directions in which the compressed model's inputs hardly vary would else be given large
weights for what is noise there; as much again as an average direction has still lets the strong ones through."""


DRIFT_TOKENS = 16
"""Tokens for each input at which a measured drift is trusted by half; see `token_share`. Tokens of running text
resemble each other, so it is far above 1. Chosen on builtin:tiny, where 4,096 tokens made the full correction worse
than none (docs/log.md); 131,072 tokens for 1,024 inputs still count for 0.98."""


def token_share(tokens: int, inputs: int) -> float:
    """How far to trust moments of `inputs` numbers over this many tokens, in [0, 1): T^2 / (T^2 + (DRIFT_TOKENS I)^2).

    C - S has a relative error of the order of sqrt(I / T). Solved for with S, it makes I coefficients for each output,
    which fit noise too: with e^2 the part of the drift that x' explains and f^2 the rest, a share m of the answer has
    the error (1 - m)^2 e^2 + m^2 f^2 I / T, least at m = 1 / (1 + (f^2 / e^2) I / T). S^-1 and the metric come from the
    same tokens, with an error of order I / T of their own that multiplies it. Where tokens are few, so that m matters,
    the second term goes as (I / T)^2.
    """
    return tokens**2 / (tokens**2 + (DRIFT_TOKENS * inputs) ** 2)


def drift_target(weight: Tensor, cross: Tensor, gram: Tensor, *, mix: float, ridge: float = DRIFT_RIDGE) -> Tensor:
    """The weight (O, I) that makes up for inputs x' having drifted from x: W + mix W (C - S) (S + r)^-1.

    The minimum over W' of  E|| mix W x + (1 - mix) W x' - W' x' ||^2 + r || W' - W ||_F^2,  r = ridge tr(S) / I

    `cross` C is E[x x'^T] between the dense model's inputs and the compressed model's, `gram` S is E[x' x'^T] (both
    (I, I)). mix 0 gives W back, mix 1 asks for the dense model's outputs, whatever they now have to be made from.
    Works with singular S; with S = 0 (an input that never fires) there is nothing to make up for, and W is returned.
    """
    damping = ridge * gram.diagonal().mean()
    if mix == 0 or gram.diagonal().max() <= 0:
        return weight
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    system, missing = gram + damping * eye, (weight @ (cross - gram)).mT
    lower = safe_cholesky(system)  # the ridge makes it safe but for inputs of wildly different sizes
    solved = solve_symmetric(system, missing) if lower is None else torch.cholesky_solve(missing, lower)
    return weight + mix * solved.mT


def solve_symmetric(system: Tensor, target: Tensor) -> Tensor:
    """`system^-1 target` for a symmetric non-negative system (n, n), small eigenvalues cut relative to the largest."""
    values, vectors = eigh((system + system.mT) / 2)
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
    return vectors @ (inverse[:, None] * (vectors.mT @ target))
