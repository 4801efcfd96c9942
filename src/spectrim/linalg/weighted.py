"""Low rank with a weight for every entry: minimise sum_ij I_ij (W - B A)_ij^2 over B (O, R) and A (R, I).

There is no closed form unless I is of rank one (Srebro and Jaakkola 2003). One call, three ways:

    als       rows of B by weighted least squares, then columns of A; each half-step is exact, so the error never rises
    adam      both factors along the gradient, in units of the problem
    adam-sgd  adam until it stalls, then steepest descent with the exact step in each factor in turn

All work in float64 on a copy scaled so that W and I have unit mean square and unit mean: the answer then scales with W
and does not change with the scale of I.
"""

from typing import Literal

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, balance

Solver = Literal["als", "adam", "adam-sgd"]

ADAM_RATE, ADAM_MOMENTS = 0.02, (0.9, 0.99)
"""Of the root mean square of the factors."""
STALL_WINDOW = 10
"""Iterations over which progress is judged."""
CHUNK_NUMBERS = 2**22
"""Entries of the largest batch of weighted factors that is formed at once."""


def damped(weights: Tensor, damping: float) -> Tensor:
    """`I + damping mean(I)`: an entry without weight would leave the product free there. All zero becomes all one."""
    mean = weights.mean()
    return weights + damping * mean if mean > 0 else torch.ones_like(weights)


def weighted_error(weight: Tensor, weights: Tensor, factors: Factors) -> float:
    """The objective."""
    return float((weights * (weight - factors.left @ factors.right).square()).sum())


def weighted_factors(
    weight: Tensor, weights: Tensor, start: Factors, *, solver: Solver, iterations: int, tolerance: float = 1e-3
) -> Factors:
    """Factors whose weighted error is at most that of `start`; `weights` (O, I) positive, as from `damped`.

    Stops when an iteration (of the gradient solvers: STALL_WINDOW of them) lowers the error by less than `tolerance` of
    it, or when what is left is rounding.
    """
    size, unit = weight.square().mean().sqrt(), weights.mean()
    if size == 0:
        return start
    target, share = weight / size, weights / unit
    left, right = balance(start)
    now = Factors(left / size.sqrt(), right / size.sqrt())
    rounding = float((share * target.square()).sum()) * 1e-18
    solve = _als if solver == "als" else _descend
    if weighted_error(target, share, now) <= rounding:
        return start
    found = solve(target, share, now, iterations, tolerance, solver)
    return Factors(found.left * size.sqrt(), found.right * size.sqrt())


def _als(target: Tensor, share: Tensor, now: Factors, iterations: int, tolerance: float, _solver: Solver) -> Factors:
    """Alternating weighted least squares."""
    error = weighted_error(target, share, now)
    for _ in range(iterations):
        left = _rows(target, share, now.left, now.right)
        right = _rows(target.mT, share.mT, now.right.mT, left.mT).mT
        now, before = Factors(left, right), error
        error = weighted_error(target, share, now)
        if error > before * (1 - tolerance):
            break
    return now


def _rows(target: Tensor, share: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The left factor (O, R) that is best for `right` (R, I): one system of size R for each row.

    Solved for the change of `left`, so that the small damping of the systems pulls towards what was there.
    """
    rank, inputs = right.shape
    residual = share * (target - left @ right)
    moved = torch.empty_like(left)
    count = max(1, CHUNK_NUMBERS // (rank * max(rank, inputs)))
    for rows in torch.arange(len(left), device=left.device).split(count):
        systems = (right * share[rows, None, :]) @ right.mT
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += 1e-10 * diagonal.mean(1, keepdim=True)
        moved[rows] = torch.linalg.solve(systems, (residual[rows] @ right.mT)[..., None])[..., 0]
    return left + moved


def _descend(target: Tensor, share: Tensor, now: Factors, iterations: int, tolerance: float, solver: Solver) -> Factors:
    """Adam, and for "adam-sgd" steepest descent once Adam stalls; the best factors that were seen."""
    best, least = now, weighted_error(target, share, now)
    at_window_start, adam = least, _Adam(now)
    for step in range(iterations):
        now = adam.step(*_gradients(target, share, now)) if adam else _steepest(target, share, now)
        error = weighted_error(target, share, now)
        if error < least:
            best, least = now, error
        if (step + 1) % STALL_WINDOW == 0:
            stalled = least > at_window_start * (1 - tolerance)
            at_window_start = least
            if stalled and (adam is None or solver == "adam"):
                break
            if stalled:
                now, adam = best, None
    return best


def _gradients(target: Tensor, share: Tensor, now: Factors) -> tuple[Tensor, Tensor]:
    slope = 2 * share * (now.left @ now.right - target)
    return slope @ now.right.mT, now.left.mT @ slope


def _steepest(target: Tensor, share: Tensor, now: Factors) -> Factors:
    """One step in each factor, of the length that is exact along the gradient."""
    gradient = _gradients(target, share, now)[0]
    left = now.left - _length(gradient, gradient @ now.right, share) * gradient
    gradient = _gradients(target, share, Factors(left, now.right))[1]
    return Factors(left, now.right - _length(gradient, left @ gradient, share) * gradient)


def _length(gradient: Tensor, change: Tensor, share: Tensor) -> Tensor:
    curvature = 2 * (share * change.square()).sum()
    return gradient.square().sum() / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)


class _Adam:
    """Adam on two factors; the smallest step is relative to the mean gradient, so that noise is not blown up."""

    def __init__(self, start: Factors) -> None:
        self.factors = start
        self.rates = [ADAM_RATE * factor.square().mean().sqrt() for factor in start]
        self.first = [torch.zeros_like(factor) for factor in start]
        self.second = [torch.zeros_like(factor) for factor in start]
        self.steps = 0

    def step(self, *gradients: Tensor) -> Factors:
        self.steps += 1
        slow, fast = ADAM_MOMENTS
        moved = []
        for factor, rate, gradient, first, second in zip(
            self.factors, self.rates, gradients, self.first, self.second, strict=True
        ):
            first.lerp_(gradient, 1 - slow)
            second.lerp_(gradient.square(), 1 - fast)
            spread = (second / (1 - fast**self.steps)).sqrt()
            moved.append(factor - rate * first / (1 - slow**self.steps) / (spread + 1e-2 * spread.mean()))
        self.factors = Factors(*moved)
        return self.factors
