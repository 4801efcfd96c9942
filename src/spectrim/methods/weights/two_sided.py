"""Two-sided truncation: the closed form behind spectrim's default, and the start of SoCo.

    minimise  1/2 tr(B dW A dW^T)     A = E[x x^T], B = E[g g^T], g the gradient at the output, labels sampled
    1. shrink both towards a multiple of the identity (few tokens give noisy directions)
    2. A = R R^T, B = L L^T;   L^T W R = U diag(s) V^T
    3. W' = L^-T U_R diag(s_R) V_R^T R^-1

The error is the second-order change of the loss under a Kronecker-factored Fisher matrix (K-FAC, Martens and Grosse
2015; used for low rank by KFAC-SVD / LEMS, OBD-LLM, IO-SVD). Squared singular values are then comparable across
layers, so one global budget makes sense: `allocation="global"`. Pivot storage has no break-even cliff.

coupling="sequence": A and B are refined by a second gradient pass, which keeps the correlation between the tokens of a
window that K-FAC drops (engines/couple.py).

rounds=1: both covariances are measured once more in the compressed model and averaged with the first. The loss along
the way from W to W' is an integral of the curvature, for which the mean of its ends stands better than its start.

propagate: going through the model in order, each weight first makes up for that share of the error of its inputs, and
is cut again, to the rank that was planned (engines/propagate.py).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose_between, energies_between
from spectrim.linalg.metric import shrink
from spectrim.method import Allocation, LayerMethod, MethodInfo, require_choice, require_range
from spectrim.replacement import Storages
from spectrim.stats import Coupling, Stat, Stats


@dataclass(frozen=True, kw_only=True)
class TwoSidedMetric(LayerMethod):
    """What methods in this metric share: how its covariances are measured and refined, and what is made up for."""

    needs: ClassVar = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})

    storages: ClassVar = ("factor", "pivot", "shared", "shared-pivot", "best")

    storage: Storages = "pivot"
    allocation: Allocation = "global"
    rounds: int = 1
    coupling: Literal["none", "sequence"] = "sequence"
    propagate: float = 0.5
    input_shrinkage: float = 0.01
    output_shrinkage: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.info.name, "coupling", self.coupling, ("none", "sequence"))
        for name in ("propagate", "input_shrinkage", "output_shrinkage"):
            require_range(self.info.name, name, getattr(self, name), 0.0, 1.0)

    @property
    def refinement(self) -> Coupling | None:
        """With the shrinkages of the metric itself."""
        return Coupling(self.input_shrinkage, self.output_shrinkage) if self.coupling == "sequence" else None

    @property
    def error_share(self) -> float:
        """As asked for."""
        return self.propagate

    def covariances(self, stats: Stats) -> tuple[Tensor | None, Tensor]:
        """Both, shrunk."""
        return _shrunk(stats, self.input_shrinkage, self.output_shrinkage)


@dataclass(frozen=True, kw_only=True)
class TwoSided(TwoSidedMetric):
    """Least second-order loss over all ranks of all layers, in closed form."""

    info: ClassVar = MethodInfo(
        name="two-sided",
        family="weights",
        paper="K-FAC metric; see docs/soco.md",
        promise="least second-order loss, one budget for all layers, no training",
    )

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric (root of the gradient covariance, root of the input Gram)."""
        return two_sided_spectrum(weight, stats, self.input_shrinkage, self.output_shrinkage)

    def energies(self, weight: Tensor, stats: Stats) -> Tensor:
        """Of those components."""
        return two_sided_energies(weight, stats, self.input_shrinkage, self.output_shrinkage)


def two_sided_energies(weight: Tensor, stats: Stats, input_shrinkage: float, output_shrinkage: float) -> Tensor:
    """Squared singular values (K,) of L^T W R for one weight (O, I), float64; no root is inverted for them."""
    return energies_between(weight, *_shrunk(stats, input_shrinkage, output_shrinkage))


def two_sided_spectrum(weight: Tensor, stats: Stats, input_shrinkage: float, output_shrinkage: float) -> Spectrum:
    """Steps 1 to 3 for one weight (O, I), float64."""
    return decompose_between(weight, *_shrunk(stats, input_shrinkage, output_shrinkage))


def _shrunk(stats: Stats, input_shrinkage: float, output_shrinkage: float) -> tuple[Tensor, Tensor]:
    """B (O, O) and A (I, I)."""
    return shrink(stats.get(Stat.OUTPUT_GRAD), output_shrinkage), shrink(stats.get(Stat.GRAM), input_shrinkage)
