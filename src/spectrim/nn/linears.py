"""Linear layers in low-rank storage: two factors, or pivot rows and coefficients.

Both hold real `nn.Linear` children, so that PEFT, torchao and exporters find them.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.pivot import unpack_mask
from spectrim.nn.codecs import StoredLinear, check_rank


class RankLinear(StoredLinear):
    """What its rank alone describes."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        rank = check_rank(entry, inputs, outputs)
        return cls(inputs, outputs, rank, bias=entry["bias"], device=device, dtype=dtype)


class LowRankLinear(RankLinear):
    """`y = U (V x) + bias`. Stored: `V.weight` (R, I), `U.weight` (O, R), `U.bias` (O,) if any."""

    codec: Literal["factor"] = "factor"

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__(inputs, outputs, rank, bias=bias)
        self.V = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, outputs, bias=bias, device=device, dtype=dtype)
        self.add_guard(device, dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        bias = {"U.bias": (self.out_features,)} if self.has_bias else {}
        return {"V.weight": (self.rank, self.in_features), "U.weight": (self.out_features, self.rank), **bias}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        if self.few is not None and self.few.takes(x):
            return self.few.product(self, x)
        return self.U(self.V(x))

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        wide = torch.promote_types(self.U.weight.dtype, torch.float32)
        return self.U.weight.detach().to(wide) @ self.V.weight.detach().to(wide)

    @property
    def bias(self) -> Tensor | None:
        """Where code that treats this layer as an `nn.Linear` looks for the bias."""
        return self.U.bias


def order_of(packed: Tensor, outputs: int, rank: int) -> Tensor:
    """Position (O,) of each output in [pivots, rest] by a packed mask; ValueError unless it marks R rows."""
    mask = unpack_mask(packed, outputs)
    counted = int(mask.sum())
    if counted != rank:
        raise ValueError(f"pivot mask marks {counted} rows, the layer has rank {rank}: damaged file")
    return torch.where(mask, mask.cumsum(0) - 1, rank + (~mask).cumsum(0) - 1)


def _after_loading(layer: "PivotLinear", _keys: object) -> None:
    """Not a lambda: layers can be pickled."""
    layer.refresh_order()


class PivotLinear(RankLinear):
    """A rank-R weight as R of its rows and the coefficients of the others.

    `p = pivot(x)`, the other outputs are `rest(p)`, both put in place by `mask`. Stored: `pivot.weight` (R, I),
    `rest.weight` (O - R, R), `mask` (ceil(O / 8),) uint8, `bias` (O,) if any: R (O + I - R) numbers and the mask.
    """

    codec: Literal["pivot"] = "pivot"
    mask: Tensor
    order: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__(inputs, outputs, rank, bias=bias)
        self.pivot = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.rest = nn.Linear(rank, outputs - rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.register_buffer("mask", torch.zeros((outputs + 7) // 8, dtype=torch.uint8, device=device))
        self.add_guard(device, dtype)
        # Position of each output in [pivots, rest]; follows from the mask, so it is not stored.
        self.register_buffer("order", torch.zeros(outputs, dtype=torch.int64, device=device), persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        bias = {"bias": (self.out_features,)} if self.has_bias else {}
        return {
            "pivot.weight": (self.rank, self.in_features),
            "rest.weight": (self.out_features - self.rank, self.rank),
            "mask": ((self.out_features + 7) // 8,),
            **bias,
        }

    def after_load(self) -> None:
        if self.mask.is_meta:  # the order of the outputs follows from it and would be left as found in memory
            raise ValueError("its pivot mask was offloaded before it could be read; load without offload_buffers=True")
        self.refresh_order()

    def refresh_order(self) -> None:
        """Recompute `order` after the mask has changed (loading does this)."""
        self.few = self.many = None  # they know the places of the outputs
        if self.mask.is_meta:
            return
        self.order = order_of(self.mask, self.out_features, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        if self.few is not None and self.few.takes(x):
            return self.few.product(self, x)
        if self.many is not None and self.many.takes(x):
            return self.many.product(self, x)
        pivots = self.pivot(x)
        y = torch.cat([pivots, self.rest(pivots)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        wide = torch.promote_types(self.pivot.weight.dtype, torch.float32)
        rows = self.pivot.weight.detach().to(wide)
        return torch.cat([rows, self.rest.weight.detach().to(wide) @ rows]).index_select(0, self.order)


LINEARS: dict[str, type[LowRankLinear] | type[PivotLinear]] = {"factor": LowRankLinear, "pivot": PivotLinear}
"""The low-rank codecs: those whose layers hold factors that recovery can train."""
