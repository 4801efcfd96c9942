"""GPTQ (Frantar et al., arXiv 2210.17323): rounding in which later columns make up for the error of earlier ones.

    1. H = E[x x^T] + damping mean(diag)          the inputs that the layer sees
    2. U^T U = H^-1, U upper triangular
    3. column by column: w'_j the nearest level of its group, fitted when the group is reached
       e = (w_j - w'_j) / U_jj,   W[:, j+1:] -= e U[j, j+1:]

`sequential`, as in the paper's code: going through the model in order, H is measured behind the blocks that are already
rounded. Without it H is the dense model's, measured once.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.columns import DAMPING, gptq
from spectrim.linalg.quantise import Rounded
from spectrim.method import MethodInfo, require_range
from spectrim.methods.weights.rtn import RTN
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class GPTQ(RTN):
    """Codes of few bits that make up for each other's error."""

    info: ClassVar = MethodInfo(
        name="gptq",
        family="weights",
        paper="arXiv 2210.17323",
        promise="few bits a weight, errors made up for by later columns",
    )
    needs: ClassVar = frozenset({Stat.GRAM})

    damping: float = DAMPING

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "damping", self.damping, 1e-8, 100.0)

    def rounded(self, weight: Tensor, stats: Stats) -> Rounded:
        """Steps 1 to 3."""
        return gptq(
            weight, stats.get(Stat.GRAM), self.bits, self.group_size, symmetric=self.symmetric, search=self.search,
            damping=self.damping,
        )  # fmt: skip
