"""Plain truncated SVD (Eckart and Young 1936): the nearest matrix of rank R, blind to what the layer sees.

    W = U diag(s) V^T,   W' = U_R diag(s_R) V_R^T,   error = sum of the squares of the other s

The floor that every other method must beat; on language models it is known to fail beyond a few per cent.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.method import LayerMethod, MethodInfo
from spectrim.stats import Stats


@dataclass(frozen=True, kw_only=True)
class SVD(LayerMethod):
    """Nearest weight of rank R; needs no data."""

    info: ClassVar = MethodInfo(
        name="svd",
        family="weights",
        paper="Eckart-Young 1936",
        promise="nearest weight of rank R; needs no data",
    )

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Singular components of the weight itself."""
        return decompose(weight)
