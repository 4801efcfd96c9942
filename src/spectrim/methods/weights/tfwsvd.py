"""TFWSVD: truly Fisher-weighted SVD (Hua et al., "Numerical Optimizations for Weighted Low-rank Estimation on
Language Model", arXiv 2211.09718).

    minimise  sum_ij (I_ij + damping mean(I)) (W - B A)_ij^2      I = E[(dL/dW)^2], one weight for each entry
    1. ranks and the start from `fwsvd`, which sums I over the outputs
    2. solver="adam-sgd"  the paper's: Adam, then gradient steps once it stalls
       solver="adam"      Adam alone
       solver="als"       alternating weighted least squares, exact in each half-step; 4 iterations are many

Without the damping, entries that no gradient reached are free, and B A puts anything there. A matrix whose Fisher
information hardly varies within its columns is done after one iteration: FWSVD is its optimum already.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Factors, Spectrum
from spectrim.linalg.weighted import Solver, damped, weighted_factors
from spectrim.method import LayerMethod, MethodInfo, require_choice, require_range
from spectrim.methods.weights.fwsvd import fisher_spectrum
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class TFWSVD(LayerMethod):
    """Least error with every entry weighed by its own Fisher information, found by iteration."""

    info: ClassVar = MethodInfo(
        name="tfwsvd",
        family="weights",
        paper="arXiv 2211.09718",
        promise="least error weighed entry by entry with the Fisher information",
    )
    needs: ClassVar = frozenset({Stat.FISHER})

    solver: Solver = "adam-sgd"
    iterations: int = 60
    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("tfwsvd", "solver", self.solver, ("als", "adam", "adam-sgd"))
        require_range("tfwsvd", "iterations", self.iterations, 1, 100_000)
        require_range("tfwsvd", "damping", self.damping, 1e-6, 1e6)

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """FWSVD's components."""
        return fisher_spectrum(weight, stats.get(Stat.FISHER))

    def at_rank(self, weight: Tensor, cut: Factors, stats: Stats) -> Factors:
        """Step 2 from those components."""
        weights = damped(stats.get(Stat.FISHER), self.damping)
        return weighted_factors(weight, weights, cut, solver=self.solver, iterations=self.iterations)
