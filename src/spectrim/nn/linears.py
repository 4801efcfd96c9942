"""Linear layers in low-rank storage: two factors, or pivot rows and coefficients.

Both hold real `nn.Linear` children, so that PEFT, torchao and exporters find them, and a zero-element buffer named
`weight`: a program that loads the folder without spectrim meets a shape mismatch and stops, where it would
otherwise fill the layer with random numbers and go on.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from spectrim.linalg.pivot import unpack_mask


class LowRankLinear(nn.Module):
    """`y = U (V x) + bias`. Stored: `V.weight` (R, I), `U.weight` (O, R), `U.bias` (O,) if any."""

    codec: Literal["factor"] = "factor"
    weight: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.V = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, outputs, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return self.U(self.V(x))

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        wide = torch.promote_types(self.U.weight.dtype, torch.float32)
        return self.U.weight.detach().to(wide) @ self.V.weight.detach().to(wide)

    @property
    def bias(self) -> Tensor | None:
        """Where code that treats this layer as an `nn.Linear` looks for the bias."""
        return self.U.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotLinear(nn.Module):
    """A rank-R weight as R of its rows and the coefficients of the others.

    `p = pivot(x)`, the other outputs are `rest(p)`, both put in place by `mask`. Stored: `pivot.weight` (R, I),
    `rest.weight` (O - R, R), `mask` (ceil(O / 8),) uint8, `bias` (O,) if any: R (O + I - R) numbers and the mask.
    """

    codec: Literal["pivot"] = "pivot"
    weight: Tensor
    mask: Tensor
    order: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.pivot = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.rest = nn.Linear(rank, outputs - rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.register_buffer("mask", torch.zeros((outputs + 7) // 8, dtype=torch.uint8, device=device))
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        # Position of each output in [pivots, rest]; follows from the mask, so it is not stored.
        self.register_buffer("order", torch.zeros(outputs, dtype=torch.int64, device=device), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh_order())

    def refresh_order(self) -> None:
        """Recompute `order` after the mask has changed (loading does this)."""
        if self.mask.is_meta:
            return
        mask = unpack_mask(self.mask, self.out_features)
        counted = int(mask.sum())
        if counted != self.rank:
            raise ValueError(f"pivot mask marks {counted} rows, the layer has rank {self.rank}: damaged file")
        place = torch.where(mask, mask.cumsum(0) - 1, self.rank + (~mask).cumsum(0) - 1)
        self.order = place

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        pivots = self.pivot(x)
        y = torch.cat([pivots, self.rest(pivots)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        wide = torch.promote_types(self.pivot.weight.dtype, torch.float32)
        rows = self.pivot.weight.detach().to(wide)
        return torch.cat([rows, self.rest.weight.detach().to(wide) @ rows]).index_select(0, self.order)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


LINEARS: dict[str, type[LowRankLinear] | type[PivotLinear]] = {"factor": LowRankLinear, "pivot": PivotLinear}
"""Codec name in the file to module class."""
