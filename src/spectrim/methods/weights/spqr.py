"""SpQR (Dettmers et al., arXiv 2306.03078): small groups with rounded scales, and the weights that fit none in 16 bits.

    1. H = E[x x^T] + damping mean(diag),   U^T U = H^-1                  as in `gptq`
    2. limit = threshold mean_j Var_i(W_ij) / U_jj^2
    3. at each group of columns: weights without which the others would lose that much less are likely outliers; a grid
       fitted without them; scales and zeros of 16 rows rounded to 3 bits
    4. column by column: w'_j the nearest level, or w_j itself where  (w_j - w'_j)^2 / U_jj^2 > limit
       e = (w_j - w'_j) / U_jj,   W[:, j+1:] -= e U[j, j+1:]

At most the share `outliers` of a layer is kept as it is: where step 4 finds more, the limit is raised and 3 and 4 are
done again. Columns go in their own order: the paper's, by descending H_jj, is not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectrim.linalg.bilevel import BilevelRule
from spectrim.linalg.bits import Account, bilevel_account, outliers_account
from spectrim.linalg.columns import inverse_root
from spectrim.linalg.outliers import outlier_limit, solve_with_outliers
from spectrim.method import MethodInfo, require_range
from spectrim.methods.weights.packed import PackedMethod, check_bits, check_group
from spectrim.models.walk import Layer
from spectrim.nn.stores import Store
from spectrim.nn.stores_bilevel import BilevelStore
from spectrim.nn.stores_outliers import OutlierStore
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class SpQR(PackedMethod):
    """GPTQ in small groups at the price of large ones, without the weights that would spoil them."""

    info: ClassVar = MethodInfo(
        name="spqr",
        family="weights",
        paper="arXiv 2306.03078",
        promise="few bits in small groups, outliers in 16 bits",
    )
    needs: ClassVar = frozenset({Stat.GRAM})

    bits: int = 4
    group_size: int = 16
    statistic_bits: int = 3
    statistic_rows: int = 16
    threshold: float = 0.2
    outliers: float = 0.01
    damping: float = 1.0
    search: bool = False
    """Whether grids that clip are tried for each group."""

    def __post_init__(self) -> None:
        check_bits("spqr", self.bits)
        check_bits("spqr", self.statistic_bits, name="statistic_bits")
        require_range("spqr", "group_size", self.group_size, 0, 1_000_000)
        require_range("spqr", "statistic_rows", self.statistic_rows, 1, 1_000_000)
        require_range("spqr", "threshold", self.threshold, 1e-9, 1e9)
        require_range("spqr", "outliers", self.outliers, 0.0, 0.25)
        require_range("spqr", "damping", self.damping, 1e-8, 100.0)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the size."""
        names = ("bits", "group_size", "statistic_bits", "statistic_rows", "outliers")
        return {name: getattr(self, name) for name in names}

    def account(self, layer: Layer) -> Account:
        """Codes on both levels, and at most what outliers take."""
        check_group("spqr", layer, self.group_size, layer.inputs)
        codes = bilevel_account(
            layer.outputs, layer.inputs, self.bits, self.group_size, statistic_bits=self.statistic_bits,
            rows=self._rows(layer.outputs),
        )  # fmt: skip
        return codes + outliers_account(layer.outputs, layer.inputs, self._most(layer.outputs * layer.inputs))

    def _rows(self, outputs: int) -> int:
        return min(self.statistic_rows, outputs)

    def _most(self, weights: int) -> int:
        return int(self.outliers * weights)

    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """Steps 1 to 4."""
        upper, rows = inverse_root(stats.get(Stat.GRAM), damping=self.damping), self._rows(len(weight))

        def fresh() -> BilevelRule:
            return BilevelRule(
                weight, self.bits, self.group_size, statistic_bits=self.statistic_bits, rows=rows, search=self.search
            )

        limit = outlier_limit(weight, upper, self.threshold)
        rule, apart = solve_with_outliers(weight, upper, fresh, self.bits, limit, self._most(weight.numel()))
        codes = BilevelStore.holding(
            rule.result(), bits=self.bits, group_size=self.group_size, statistic_bits=self.statistic_bits, rows=rows,
            dtype=dtype,
        )  # fmt: skip
        return OutlierStore.holding(codes, apart, dtype=dtype)
