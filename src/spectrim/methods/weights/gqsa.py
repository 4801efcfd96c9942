"""GQSA (Zeng et al., arXiv 2412.17560), its first stage: some groups of weights left out, the others in few bits.

    1. H = E[x x^T] + damping mean(diag),   U^T U = H^-1                                  as in `gptq`
    2. each row in groups of `group_size` inputs; what leaving a group out costs in the metric H (linalg/groups.py)
    3. the share `sparsity` of groups that cost least is left out
    4. column by column: 0 in a group left out; in a kept one the nearest level of its grid, fitted when it is reached;
       e = (w_j - w'_j) / U_jj,   W[:, j+1:] -= e U[j, j+1:]                             errors of both made up for

What is stored: codes, a scale and a zero for each kept group, and one bit a group for where they stand. The paper's
training of weights, scales and zeros block by block and then end to end is not here; its saliency is
`saliency=weights`, and it has no step 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectrim.linalg.bits import Account, groups_account, uniform_account
from spectrim.linalg.columns import DAMPING, UniformRule, inverse_root, solve_columns
from spectrim.linalg.groups import (
    BALANCES,
    MOST_SPARSITY,
    SALIENCIES,
    Balance,
    GroupRule,
    Saliency,
    costliest,
    group_costs,
    kept_groups,
)
from spectrim.linalg.quantise import Rounded, group_count
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.methods.weights.packed import PackedMethod, check_bits, check_group
from spectrim.models.walk import Layer
from spectrim.nn.stores import Store
from spectrim.nn.stores_groups import GroupStore
from spectrim.nn.stores_uniform import UniformStore
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class GQSA(PackedMethod):
    """Groups that matter in few bits, the others not at all."""

    info: ClassVar = MethodInfo(
        name="gqsa",
        family="weights",
        paper="arXiv 2412.17560",
        promise="some groups of weights left out, the others in few bits, one-shot",
    )
    needs: ClassVar = frozenset({Stat.GRAM})

    bits: int = 4
    group_size: int = 16
    sparsity: float = 0.5
    """Share of groups left out."""
    saliency: Saliency = "all"
    balance: Balance = "rows"
    symmetric: bool = False
    search: bool = True
    """Whether grids that clip are tried for each group."""
    damping: float = DAMPING

    def __post_init__(self) -> None:
        check_bits("gqsa", self.bits)
        require_range("gqsa", "group_size", self.group_size, 1, 1_000_000)
        require_range("gqsa", "sparsity", self.sparsity, 0.0, MOST_SPARSITY)
        require_choice("gqsa", "saliency", self.saliency, SALIENCIES)
        require_choice("gqsa", "balance", self.balance, BALANCES)
        require_range("gqsa", "damping", self.damping, 1e-8, 100.0)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the size."""
        return {name: getattr(self, name) for name in ("bits", "group_size", "sparsity", "symmetric")}

    def account(self, layer: Layer) -> Account:
        """Codes, scales and zeros of kept groups, and where they stand."""
        check_group("gqsa", layer, self.group_size, layer.inputs)
        outputs, inputs, kept = layer.outputs, layer.inputs, self._kept(layer.outputs, layer.inputs)
        if kept == outputs * group_count(inputs, self.group_size):
            return uniform_account(outputs, inputs, self.bits, self.group_size, symmetric=self.symmetric)
        return groups_account(outputs, inputs, self.bits, self.group_size, kept=kept, symmetric=self.symmetric)

    def _kept(self, outputs: int, inputs: int) -> int:
        return kept_groups(outputs, inputs, self.group_size, self.sparsity, self.balance)

    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """Steps 1 to 4; where nothing is left out it is the store of `gptq`."""
        upper = inverse_root(stats.get(Stat.GRAM), damping=self.damping)
        costs = group_costs(weight, upper, self.group_size, self.saliency)
        mask = costliest(costs, self._kept(*weight.shape), self.balance)
        inner = UniformRule(weight, self.bits, self.group_size, symmetric=self.symmetric, search=self.search)
        solve_columns(weight, upper, GroupRule(inner, mask))
        rounded = inner.result()
        if bool(mask.all()):
            return UniformStore.holding(rounded, bits=self.bits, group_size=self.group_size, dtype=dtype)
        kept = UniformStore.holding(of_groups(rounded, mask), bits=self.bits, group_size=0, dtype=dtype)
        return GroupStore.holding(kept, mask)


def of_groups(rounded: Rounded, mask: Tensor) -> Rounded:
    """Codes and grids of the groups that `mask` (O, G) marks, as a matrix with a group a row."""
    codes = rounded.codes.unflatten(1, (mask.shape[1], -1))[mask]
    zeros = None if rounded.zeros is None else rounded.zeros[mask][:, None]
    return Rounded(codes, rounded.scales[mask][:, None], zeros)
