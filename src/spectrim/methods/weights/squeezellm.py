"""SqueezeLLM (Kim et al., arXiv 2306.07629): levels where the sensitive weights are, and a few weights in 16 bits.

    1. F        = E[(dL/dW)^2], what an error of each weight costs (the diagonal of the Fisher matrix)
    2. apart    : the share `sensitive` of a layer with the largest F, and of the others `outliers` with the largest |w|
    3. levels   : for each row the 2^bits that minimise  sum_i F_i (w_i - level)^2  over the weights that are not apart
    4. y        = W_codes x + S x, S sparse

`weigh="none"` leaves F out of step 3: plain k-means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from spectrim.errors import UsageError
from spectrim.linalg.bits import Account, codebook_account, outliers_account
from spectrim.linalg.codebook import CODEBOOK_BITS, fit_codebook
from spectrim.linalg.outliers import entries_at, largest
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.methods.weights.packed import PackedMethod, check_bits
from spectrim.models.walk import Layer
from spectrim.nn.stores import Store
from spectrim.nn.stores_codebook import CodebookStore
from spectrim.nn.stores_outliers import OutlierStore
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class SqueezeLLM(PackedMethod):
    """A codebook for each row, and the most sensitive and the largest weights in 16 bits."""

    info: ClassVar = MethodInfo(
        name="squeezellm",
        family="weights",
        paper="arXiv 2306.07629",
        promise="few bits a weight, levels where the loss is sensitive",
    )
    needs: ClassVar = frozenset({Stat.FISHER})

    bits: int = 4
    weigh: Literal["fisher", "none"] = "fisher"
    sensitive: float = 0.0005
    outliers: float = 0.004

    def __post_init__(self) -> None:
        check_bits("squeezellm", self.bits, CODEBOOK_BITS)
        require_choice("squeezellm", "weigh", self.weigh, ("fisher", "none"))
        require_range("squeezellm", "sensitive", self.sensitive, 0.0, 0.25)
        require_range("squeezellm", "outliers", self.outliers, 0.0, 0.25)
        if self.sequential:
            raise UsageError("method squeezellm: sequential=true needs no gradients, this method does; leave it out")

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the size."""
        return {"bits": self.bits, "sensitive": self.sensitive, "outliers": self.outliers}

    def account(self, layer: Layer) -> Account:
        """Codes, tables, and at most what the entries apart take."""
        sensitive, large = self._counts(layer.outputs * layer.inputs)
        codes = codebook_account(layer.outputs, layer.inputs, self.bits)
        return codes + outliers_account(layer.outputs, layer.inputs, sensitive + large)

    def _counts(self, weights: int) -> tuple[int, int]:
        return int(self.sensitive * weights), int(self.outliers * weights)

    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """Steps 2 and 3."""
        fisher = stats.get(Stat.FISHER)
        apart = self.apart(weight, fisher)
        importance = fisher if self.weigh == "fisher" else torch.ones_like(fisher)
        codebook = fit_codebook(weight, importance.masked_fill(apart, 0), self.bits)
        codes = CodebookStore.holding(codebook, bits=self.bits, dtype=dtype)
        return OutlierStore.holding(codes, entries_at(weight, apart), dtype=dtype)

    def apart(self, weight: Tensor, fisher: Tensor) -> Tensor:
        """Step 2: a mask (O, I)."""
        sensitive, large = self._counts(weight.numel())
        first = largest(fisher, sensitive)
        return first | largest(weight.abs().masked_fill(first, -1), large)
