"""Round to nearest: every weight to the nearest level of its group.

    1. each row is cut into groups of `group_size` inputs
    2. scale (and zero) of a group from its largest and smallest weight
    3. w' = scale (code - zero), the code of the nearest level

No data. The baseline that every other quantiser has to beat; see `gptq`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectrim.linalg.bits import Account, uniform_account
from spectrim.linalg.quantise import Rounded, round_to_nearest
from spectrim.method import MethodInfo, require_range
from spectrim.methods.weights.packed import PackedMethod, check_bits, check_group
from spectrim.models.walk import Layer
from spectrim.nn.stores import Store
from spectrim.nn.stores_uniform import UniformStore
from spectrim.stats import Stats


@dataclass(frozen=True, kw_only=True)
class RTN(PackedMethod):
    """Codes of few bits without any data."""

    info: ClassVar = MethodInfo(
        name="rtn",
        family="weights",
        paper="arXiv 2206.01861",
        promise="few bits a weight without data",
    )

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    search: bool = True
    """Whether grids that clip are tried for each group."""

    def __post_init__(self) -> None:
        check_bits(self.info.name, self.bits)
        require_range(self.info.name, "group_size", self.group_size, 0, 1_000_000)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the size."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    def account(self, layer: Layer) -> Account:
        """Codes, scales, zeros."""
        check_group(self.info.name, layer, self.group_size, layer.inputs)
        return uniform_account(layer.outputs, layer.inputs, self.bits, self.group_size, symmetric=self.symmetric)

    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """The weight in codes."""
        return UniformStore.holding(
            self.rounded(weight, stats), bits=self.bits, group_size=self.group_size, dtype=dtype
        )

    def rounded(self, weight: Tensor, stats: Stats) -> Rounded:
        """Step 3."""
        return round_to_nearest(weight, self.bits, self.group_size, symmetric=self.symmetric, search=self.search)
