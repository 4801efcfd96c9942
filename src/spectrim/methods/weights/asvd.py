"""ASVD: activation-aware SVD (Yuan et al., arXiv 2312.05821).

    1. S = diag(mean|x|^alpha)            inputs that carry large activations count more
    2. W S = U diag(s) V^T
    3. W' = U_R diag(s_R) V_R^T S^-1

The paper also searches the rank of each layer by its effect on perplexity; here ranks are uniform, which is what
rank-for-rank comparisons use. A diagonal cannot see correlated inputs: `svd-llm` can.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.linalg.metric import diagonal_root
from spectrim.method import LayerMethod, MethodInfo, require_range
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class ASVD(LayerMethod):
    """SVD of the weight with columns scaled by the size of their inputs."""

    info: ClassVar = MethodInfo(
        name="asvd",
        family="weights",
        paper="arXiv 2312.05821",
        promise="SVD with inputs scaled by their mean size",
    )
    needs: ClassVar = frozenset({Stat.MEAN_ABS})

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("asvd", "alpha", self.alpha, 0.0, 2.0)

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric diag(mean|x|^(2 alpha)) of the inputs."""
        squared_scale = stats.get(Stat.MEAN_ABS) ** (2 * self.alpha)
        return decompose(weight, right=diagonal_root(squared_scale))
