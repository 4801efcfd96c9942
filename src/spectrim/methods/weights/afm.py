"""AFM: atomic feature mimicking, the low-rank form of a layer's outputs (Yu and Wu, "Compressing transformers: features
are low-rank, but weights are not!", AAAI 2023; the unified framework for recommenders, Yu et al., arXiv 2405.18146).

    y = W x + b over the calibration text
    1. m = E[y],  C = E[(y - m)(y - m)^T] = W (E[x x^T] - E[x] E[x]^T) W^T
    2. U = the R strongest eigenvectors of C
    3. y' = U U^T (y - m) + m:   W' = U U^T W,   b' = b + (W - W') E[x]

Without centring this is whitened SVD, `svd-llm`, by another road: if W S = U s V^T with S S^T = E[x x^T],
then U_R s_R V_R^T S^-1 = U_R U_R^T W. So it shares that code, which takes the eigenvectors of the smaller side. What
AFM adds is step 1's centring: the mean output needs no rank, the bias keeps it. A layer without a bias gets one; its
numbers are charged.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.linalg.metric import root_of
from spectrim.method import LayerMethod, MethodInfo
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class AFM(LayerMethod):
    """Best rank-R output of each layer, its mean kept by the bias."""

    info: ClassVar = MethodInfo(
        name="afm",
        family="weights",
        paper="arXiv 2405.18146",
        promise="best rank-R output of each layer, its mean kept by the bias",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.MEAN})

    @property
    def centres(self) -> bool:
        """Always: without it this is svd-llm."""
        return True

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric of the inputs' covariance."""
        return feature_spectrum(weight, stats)


def feature_spectrum(weight: Tensor, stats: Stats) -> Spectrum:
    """Steps 1 and 2 for one weight (O, I), all ranks."""
    mean = stats.get(Stat.MEAN)
    return decompose(weight, right=root_of(stats.get(Stat.GRAM) - mean[:, None] * mean))
