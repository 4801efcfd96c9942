"""LoRD: low-rank decomposition of monolingual code models (Kaushal et al., arXiv 2309.14021).

    1. collect the outputs of every linear layer over source files of the one language
    2. W' = U U^T W with the strongest eigenvectors U of their covariance, the mean kept by the bias   (as in `afm`)
    3. sweep: each layer alone at several ranks, the loss of the whole model measured; those that hurt least are taken

Calibrate on code (`--calib FILES`): the point of the paper is that a model used for one language needs fewer
directions. Step 3 is allocation="sensitivity" (engines/search.py), where the paper chooses the layers from plots of the
sweep. It also rounds ranks to multiples of 64 for its kernels and quantises the factors; here ranks are exact and
nothing is quantised.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Spectrum
from spectrim.method import Allocation, LayerMethod, MethodInfo
from spectrim.methods.weights.afm import feature_spectrum
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class LoRD(LayerMethod):
    """Feature mimicking with ranks by measured sensitivity, for models of code."""

    info: ClassVar = MethodInfo(
        name="lord",
        family="weights",
        paper="arXiv 2309.14021",
        promise="best rank-R outputs, ranks by a sweep of measured losses, for code models",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.MEAN})

    allocation: Allocation = "sensitivity"

    @property
    def centres(self) -> bool:
        """As in afm."""
        return True

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric of the inputs' covariance."""
        return feature_spectrum(weight, stats)
