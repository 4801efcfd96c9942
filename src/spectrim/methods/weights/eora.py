"""EoRA (Liu et al., arXiv 2410.21271): a low-rank correction of a compressed weight, in the eigenspace of its inputs.

    1. W_c       the base: rounded to 2, 3 or 4 bits, pruned to 2:4, or both
    2. D         = W - W_c, what is missing
    3. E[x x^T]  = Q L Q^T
    4. D Q L^1/2 = U s V^T,   the first R:   B A = U_R s_R V_R^T L^-1/2 Q^T = U_R U_R^T D
    5. y         = W_c x + B (A x)

No training. The last form of step 4 needs no inverse. R is the same in all layers, as large as `keep` allows. With
`metric`, the same with another idea of which errors count:  svd  all alike (step 3 left out);  diagonal  inputs by
mean |x|.

`sequential`, as in the paper's code: step 3 is measured behind the blocks that are already corrected. Without it, it is
the dense model's, measured once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from spectrim.errors import UsageError
from spectrim.linalg.allocate import fill_uniform
from spectrim.linalg.bits import Account, correction_account, sparse24_account, uniform_account
from spectrim.linalg.columns import gptq
from spectrim.linalg.factor import Factors, balance, decompose, truncate
from spectrim.linalg.metric import Root, diagonal_root, root_of
from spectrim.linalg.quantise import Rounded, round_to_nearest
from spectrim.linalg.sparse24 import sparsegpt, wanda
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.methods.weights.packed import PackedMethod, check_group
from spectrim.models.walk import Layer
from spectrim.nn.stores import PlainStore, Store
from spectrim.nn.stores_half import HalfStore
from spectrim.nn.stores_uniform import UniformStore
from spectrim.stats import Stat, Stats

BASES = ("rtn2", "rtn3", "rtn4", "gptq2", "gptq3", "gptq4", "2:4", "2:4+rtn3", "2:4+rtn4")
METRICS = ("eora", "svd", "diagonal")
Metric = Literal["eora", "svd", "diagonal"]


@dataclass(frozen=True, kw_only=True)
class EoRA(PackedMethod):
    """A rounded or pruned weight with the best low-rank correction for the inputs it sees."""

    info: ClassVar = MethodInfo(
        name="eora",
        family="weights",
        paper="arXiv 2410.21271",
        promise="low-rank correction of a rounded or pruned weight",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.MEAN_ABS})

    base: str = "gptq3"
    metric: Metric = "eora"
    group_size: int = 128
    symmetric: bool = False
    search: bool = True
    pruner: Literal["sparsegpt", "wanda"] = "sparsegpt"

    def __post_init__(self) -> None:
        require_choice("eora", "base", self.base, BASES)
        require_choice("eora", "metric", self.metric, METRICS)
        require_choice("eora", "pruner", self.pruner, ("sparsegpt", "wanda"))
        require_range("eora", "group_size", self.group_size, 0, 1_000_000)

    @property
    def prunes(self) -> bool:
        """Whether half of the weights are left out."""
        return self.base.startswith("2:4")

    @property
    def bits(self) -> int | None:
        """Width of the codes; None where values are kept in 16 bits."""
        return None if self.base == "2:4" else int(self.base[-1])

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the size of the base."""
        return {"base": self.base, "group_size": self.group_size, "symmetric": self.symmetric}

    def account(self, layer: Layer) -> Account:
        """Kept values or codes with their scales, and where they stand."""
        inputs = layer.inputs
        if self.prunes and inputs % 4:
            raise UsageError(f"method eora: base 2:4 needs fours of inputs; {layer.name} has {inputs}")
        whole = sparse24_account(layer.outputs, inputs) if self.prunes else Account()
        if self.bits is None:
            return whole
        kept = inputs // 2 if self.prunes else inputs
        check_group("eora", layer, self.group_size, kept)
        codes = uniform_account(layer.outputs, kept, self.bits, self.group_size, symmetric=self.symmetric)
        return codes + Account(indices=whole.indices)

    def ranks(self, layers: Sequence[Layer], left: int) -> list[int]:
        """The same rank everywhere; what is left goes to single layers, one rank each."""
        costs = [correction_costs(layer) for layer in layers]
        equal = min(left // sum(int(cost[1]) for cost in costs), *(len(cost) - 1 for cost in costs))
        return fill_uniform(costs, [equal] * len(costs), left)

    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """Step 1."""
        gram = stats.get(Stat.GRAM)
        if not self.prunes:
            return self._codes(self._rounded(weight, gram), dtype)
        half = sparsegpt(weight, gram) if self.pruner == "sparsegpt" else wanda(weight, gram)
        if self.bits is None:
            return HalfStore.holding(PlainStore.holding(half.values.to(dtype)), half.places)
        rounded = round_to_nearest(
            half.values, self.bits, self.group_size, symmetric=self.symmetric, search=self.search
        )
        return HalfStore.holding(self._codes(rounded, dtype), half.places)

    def _rounded(self, weight: Tensor, gram: Tensor) -> Rounded:
        assert self.bits is not None
        if self.base.startswith("gptq"):
            return gptq(weight, gram, self.bits, self.group_size, symmetric=self.symmetric, search=self.search)
        return round_to_nearest(weight, self.bits, self.group_size, symmetric=self.symmetric, search=self.search)

    def _codes(self, rounded: Rounded, dtype: torch.dtype) -> Store:
        assert self.bits is not None
        return UniformStore.holding(rounded, bits=self.bits, group_size=self.group_size, dtype=dtype)

    def correction(self, missing: Tensor, stats: Stats, rank: int) -> Factors | None:
        """Steps 3 and 4."""
        return balance(truncate(decompose(missing, right=self.root(stats)), rank))

    def root(self, stats: Stats) -> Root | None:
        """Of the metric in which what is missing is measured."""
        if self.metric == "eora":
            return root_of(stats.get(Stat.GRAM))
        return diagonal_root(stats.get(Stat.MEAN_ABS).square()) if self.metric == "diagonal" else None


def correction_costs(layer: Layer) -> Tensor:
    """Bytes (K + 1,) of a correction of rank 0, 1, ..., K = min(O, I)."""
    one = correction_account(layer.outputs, layer.inputs, 1).total
    return torch.arange(min(layer.outputs, layer.inputs) + 1) * one
