"""MPIFA: pivoting factorisation with reconstruction (PIFA: Zhao et al. 2025, "Pivoting factorization", ICML).

    1. W' = U_R U_R^T W, the best rank-R weight for the inputs                          as in svd-llm
    2. layer after layer: both factors by least squares on the compressed model's inputs, towards a quarter of the dense
       model's output and three quarters of what the dense layer makes of those inputs   recovery step `reconstruct`
    3. pivot storage: R rows and the coefficients of the others, R (O + I - R) numbers   linalg/pivot.py

Ranks are the same share everywhere, and exact; the official code rounds them up to multiples of 16 when it packs. Pivot
rows are marked by one bit an output and chosen so that coefficients stay small, which is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.linalg.metric import root_of
from spectrim.method import LayerMethod, MethodInfo
from spectrim.replacement import Storages
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class MPIFA(LayerMethod):
    """Whitened SVD in pivot storage, both factors refitted in running order."""

    info: ClassVar = MethodInfo(
        name="mpifa",
        family="weights",
        paper="PIFA, ICML 2025",
        promise="whitened SVD in pivot storage, both factors refitted in order",
    )
    needs: ClassVar = frozenset({Stat.GRAM})
    optimal_in_gram: ClassVar = True
    recovery: ClassVar = ("reconstruct",)

    storage: Storages = "pivot"

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric of the input Gram."""
        return decompose(weight, right=root_of(stats.get(Stat.GRAM)))
