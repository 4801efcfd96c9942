"""Low-rank layers whose two parts are stores (nn/stores.py): factors, or pivot rows and coefficients, in few bits.

They are `factor` and `pivot` (nn/linears.py) with `V`, `U` and `pivot`, `rest` in another form than 16-bit numbers. A
part stays packed in memory: a forward pass makes the two matrices one after the other and lets them go.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.bits import size_of
from spectrim.nn.codecs import StoredLinear, check_rank
from spectrim.nn.linears import order_of
from spectrim.nn.stores import Store, store_from_entry


class QuantisedLinear(StoredLinear):
    """What both have in common: two stores, `parts` their names, and a bias."""

    parts: ClassVar[tuple[str, str]]
    """The one that reads the inputs first."""

    def __init__(self, first: Store, second: Store, outputs: int, *, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = first.inputs, outputs, first.outputs
        for name, store in zip(self.parts, (first, second), strict=True):
            self.add_module(name, store)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None

    @property
    def stores(self) -> dict[str, Store]:
        """Both parts by name."""
        found = {name: self.get_submodule(name) for name in self.parts}
        return {name: store for name, store in found.items() if isinstance(store, Store)}

    @classmethod
    def parts_from(
        cls, shapes: tuple[tuple[int, int], tuple[int, int]], entry: Mapping[str, Any], **kwargs: Any
    ) -> tuple[Store, Store]:
        """Empty parts as an untrusted entry says; ValueError names the part."""
        made: list[Store] = []
        for name, shape in zip(cls.parts, shapes, strict=True):
            try:
                made.append(store_from_entry(*shape, entry.get(name), **kwargs))
            except ValueError as error:
                raise ValueError(f"a part {name} with {error}") from error
        return made[0], made[1]

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), **{name: store.entry() for name, store in self.stores.items()}}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        parts = {f"{name}.{key}": s for name, store in self.stores.items() for key, s in store.shapes().items()}
        return parts | ({"bias": (self.out_features,)} if self.has_bias else {})

    def after_load(self) -> None:
        for store in self.stores.values():
            store.after_load()

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """What the parts stand for, the one that reads the inputs first."""
        first, second = (store.matrix(dtype) for store in self.stores.values())
        return first, second

    @property
    def counted_bytes(self) -> int:
        """Bytes that all its tensors count, numbers as 16 bits."""
        return size_of(self.state_dict().values(), "bytes")

    def fill_bias(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        """The bias (O,) and the guard, of a layer that was made from full stores."""
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(dtype))
        like = next(next(iter(self.stores.values())).parameters())
        self.weight = torch.empty(0, dtype=dtype, device=like.device)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{name}={store.entry()}" for name, store in self.stores.items())
        return f"{super().extra_repr()}, {parts}"


class QuantisedFactorLinear(QuantisedLinear):
    """`y = U (V x) + bias`. Stored: a store V of (R, I) as `V.KEY`, one U of (O, R) as `U.KEY`, `bias` (O,) if any."""

    codec: Literal["quantised-factor"] = "quantised-factor"
    parts = ("V", "U")

    def __init__(self, right: Store, left: Store, *, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__(right, left, left.outputs, bias=bias, device=device, dtype=dtype)
        self.add_guard(device, dtype)

    @classmethod
    def holding(cls, right: Store, left: Store, bias: Tensor | None, *, dtype: torch.dtype) -> Self:
        """Full parts and a bias, in `dtype`."""
        layer = cls(right, left, bias=bias is not None, device="meta")
        layer.fill_bias(bias, dtype)
        return layer

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        rank = check_rank(entry, inputs, outputs)
        right, left = cls.parts_from(((rank, inputs), (outputs, rank)), entry, device=device, dtype=dtype)
        return cls(right, left, bias=entry["bias"], device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        if self.few is not None and self.few.takes(x):
            return self.few.product(self, x)
        right, left = self.stores.values()
        return nn.functional.linear(nn.functional.linear(x, right.matrix()), left.matrix(), self.bias)

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, in float32 or better."""
        right, left = self.matrices(torch.promote_types(self.weight.dtype, torch.float32))
        return (left @ right).detach()


def _after_loading(layer: "QuantisedPivotLinear", _keys: object) -> None:
    """Not a lambda: layers can be pickled."""
    layer.refresh_order()


class QuantisedPivotLinear(QuantisedLinear):
    """Pivot rows and the coefficients of the other rows; `mask` says which outputs are pivots.

    Stored: a store of (R, I) as `pivot.KEY`, one of (O - R, R) as `rest.KEY`, `mask` (ceil(O / 8),) uint8, `bias` (O,)
    if any. At R = O there are no other rows, and `rest` is empty.
    """

    codec: Literal["quantised-pivot"] = "quantised-pivot"
    parts = ("pivot", "rest")
    mask: Tensor
    order: Tensor

    def __init__(self, rows: Store, rest: Store, *, bias: bool, device: Any = None, dtype: Any = None) -> None:
        outputs = rows.outputs + rest.outputs
        super().__init__(rows, rest, outputs, bias=bias, device=device, dtype=dtype)
        self.register_buffer("mask", torch.zeros((outputs + 7) // 8, dtype=torch.uint8, device=device))
        self.add_guard(device, dtype)
        # Position of each output in [pivots, rest]; follows from the mask, so it is not stored.
        self.register_buffer("order", torch.zeros(outputs, dtype=torch.int64, device=device), persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    @classmethod
    def holding(cls, rows: Store, rest: Store, mask: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> Self:
        """Full parts, the packed `mask` (ceil(O / 8),) and a bias, in `dtype`."""
        layer = cls(rows, rest, bias=bias is not None, device="meta")
        layer.fill_bias(bias, dtype)
        layer.mask = mask.detach().clone()
        layer.refresh_order()
        return layer

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        rank = check_rank(entry, inputs, outputs)
        rows, rest = cls.parts_from(((rank, inputs), (outputs - rank, rank)), entry, device=device, dtype=dtype)
        return cls(rows, rest, bias=entry["bias"], device=device, dtype=dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "mask": ((self.out_features + 7) // 8,)}

    def after_load(self) -> None:
        super().after_load()
        if self.mask.is_meta:  # the order of the outputs follows from it and would be left as found in memory
            raise ValueError("its pivot mask was offloaded before it could be read; load without offload_buffers=True")
        self.refresh_order()

    def refresh_order(self) -> None:
        """Recompute `order` after the mask has changed (loading does this)."""
        self.few = self.many = None  # they know the places of the outputs
        if not self.mask.is_meta:
            self.order = order_of(self.mask, self.out_features, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        if self.few is not None and self.few.takes(x):
            return self.few.product(self, x)
        if self.many is not None and self.many.takes(x):
            return self.many.product(self, x)
        rows, rest = self.stores.values()
        pivots = nn.functional.linear(x, rows.matrix())
        others = nn.functional.linear(pivots, rest.matrix())
        y = torch.cat([pivots, others], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, in float32 or better."""
        rows, rest = self.matrices(torch.promote_types(self.weight.dtype, torch.float32))
        return torch.cat([rows, rest @ rows]).index_select(0, self.order).detach()


QUANTISED: dict[str, type[QuantisedFactorLinear] | type[QuantisedPivotLinear]] = {
    "quantised-factor": QuantisedFactorLinear,
    "quantised-pivot": QuantisedPivotLinear,
}
"""The low-rank codecs in few bits."""
