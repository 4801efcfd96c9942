"""FWSVD: Fisher-weighted SVD (Hsu et al., "Language model compression with weighted low-rank factorization",
arXiv 2207.00112).

    1. I = E[(dL/dW)^2]                     the diagonal Fisher information of the weight, one sample a sequence
    2. D = diag(sum over outputs of I)^1/2  one importance for each input
    3. W D = U diag(s) V^T
    4. W' = U_R diag(s_R) V_R^T D^-1

A weighted SVD exists in closed form only where all entries of a column share their weight. The paper writes y = x W and
weighs rows; here weights are (O, I), so it is the columns. weigh="outputs" is the other orientation, which some codes
have by mistake; it is there to be compared with.

The label of each gradient is sampled from the model, so that I is the Fisher information itself; the paper takes the
labels of its task. Importances are kept above 1e-3 of their mean: an input that no gradient reached would else divide
by zero.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.linalg.metric import diagonal_root
from spectrim.method import LayerMethod, MethodInfo, require_choice
from spectrim.stats import Stat, Stats

LEAST_IMPORTANCE = 1e-3
"""Of D, relative to its mean."""


@dataclass(frozen=True, kw_only=True)
class FWSVD(LayerMethod):
    """SVD of the weight with columns scaled by what the loss's gradient says of each input."""

    info: ClassVar = MethodInfo(
        name="fwsvd",
        family="weights",
        paper="arXiv 2207.00112",
        promise="SVD with inputs weighed by their Fisher information",
    )
    needs: ClassVar = frozenset({Stat.FISHER})

    weigh: Literal["inputs", "outputs"] = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("fwsvd", "weigh", self.weigh, ("inputs", "outputs"))

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric D^2 of the inputs (or of the outputs)."""
        return fisher_spectrum(weight, stats.get(Stat.FISHER), self.weigh)


def fisher_spectrum(weight: Tensor, fisher: Tensor, weigh: Literal["inputs", "outputs"] = "inputs") -> Spectrum:
    """Steps 2 to 4 for one weight (O, I) and its Fisher information (O, I), float64."""
    importance = fisher.sum(dim=0 if weigh == "inputs" else 1).sqrt()
    root = diagonal_root(importance.clamp(min=LEAST_IMPORTANCE * importance.mean()).square())
    return decompose(weight, right=root) if weigh == "inputs" else decompose(weight, left=root)
