"""A linear layer whose weight is kept in few bits, with or without a low-rank correction beside it.

    y = base x + U (V x) + bias          base: any of nn/stores.py          U (O, R), V (R, I), R = 0 for none

What the base is and whether there is a correction are choices of their own: rounding, pruning and both together are
corrected alike.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.bits import size_of
from spectrim.linalg.factor import Factors
from spectrim.linalg.quantise import as_stored
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.stores import Store, store_from_entry
from spectrim.nn.unit import ZERO_BIAS, Unit


class PackedLinear(StoredLinear):
    """Stored: the base's tensors as `base.KEY`, `V.weight` (R, I) and `U.weight` (O, R) where R > 0, `bias` if any."""

    codec: Literal["packed"] = "packed"

    def __init__(self, base: Store, correction: int, *, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = base.inputs, base.outputs
        self.rank = min(base.inputs, base.outputs)  # the weight is a full one
        self.base, self.correction = base, correction
        self.U = nn.Linear(correction, base.outputs, bias=False, device=device, dtype=dtype) if correction else None
        self.V = nn.Linear(base.inputs, correction, bias=False, device=device, dtype=dtype) if correction else None
        self.bias = nn.Parameter(torch.zeros(base.outputs, device=device, dtype=dtype)) if bias else None
        self.add_guard(device, dtype)

    @classmethod
    def holding(cls, base: Store, factors: Factors | None, bias: Tensor | None, *, dtype: torch.dtype) -> Self:
        """A full base, a correction (None or of rank 0: none) and a bias, in `dtype`."""
        correction = 0 if factors is None else factors.left.shape[1]
        layer = cls(base, correction, bias=bias is not None, device="meta")  # all of it is replaced below
        if factors is not None and layer.U is not None and layer.V is not None:
            layer.U.weight = nn.Parameter(factors.left.to(dtype).contiguous())
            layer.V.weight = nn.Parameter(factors.right.to(dtype).contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype))
        layer.weight = torch.empty(0, dtype=dtype, device=next(base.parameters()).device)
        return layer

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        full, correction = min(outputs, inputs), entry.get("correction")
        if entry["rank"] != full:
            raise ValueError(f"rank {entry['rank']}; a packed layer of {outputs} x {inputs} has rank {full}")
        if type(correction) is not int or not 0 <= correction <= full:
            raise ValueError(f"correction {correction!r}; it must be a rank from 0 to {full}")
        base = store_from_entry(outputs, inputs, entry.get("base"), device=device, dtype=dtype)
        return cls(base, correction, bias=entry["bias"], device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "base": self.base.entry(), "correction": self.correction}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {f"base.{key}": shape for key, shape in self.base.shapes().items()}
        if self.correction:
            shapes["V.weight"] = (self.correction, self.in_features)
            shapes["U.weight"] = (self.out_features, self.correction)
        return shapes | ({"bias": (self.out_features,)} if self.has_bias else {})

    def after_load(self) -> None:
        self.base.after_load()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        if self.few is not None and self.few.takes(x):
            return self.few.product(self, x)
        y = nn.functional.linear(x, self.base.matrix(), self.bias)
        return y if self.U is None or self.V is None else y + self.U(self.V(x))

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, in float32 or better."""
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        weight = self.base.matrix(wide).detach()
        if self.U is None or self.V is None:
            return weight
        return weight + self.U.weight.detach().to(wide) @ self.V.weight.detach().to(wide)

    @property
    def counted_bytes(self) -> int:
        """Bytes that all its tensors count, numbers as 16 bits."""
        return size_of(self.state_dict().values(), "bytes")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base.entry()}, correction={self.correction}"


class TrainedPackedLinear(nn.Module):
    """A packed layer while it trains: every trained tensor in units of its own size, codes frozen.

    Trained are U and V, and with `numbers` all that is kept in 16-bit numbers: the base's (scales, tables, entries
    apart) and the bias. Codes are unpacked once; without `numbers` the base's weight is held in full. A tensor of the
    base that is all zeros has no size to be relative to, and stays as it is.
    """

    frozen: Tensor | None
    still_bias: Tensor | None

    def __init__(self, before: PackedLinear, *, numbers: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = before.in_features, before.out_features
        parameters = {key: p.detach() for key, p in before.base.named_parameters()}
        moving = {key: p for key, p in parameters.items() if numbers and bool(p.any())}
        self.units = {key: Unit(p) for key, p in moving.items()}
        self.numbers = nn.ModuleDict({key.replace(".", "/"): unit for key, unit in self.units.items()})
        self.still = {key: p for key, p in parameters.items() if key not in moving}
        self.unpacked = before.base.unpacked(torch.float32) if moving else None
        frozen = None if moving else before.base.matrix(torch.float32).detach()
        self.register_buffer("frozen", frozen, persistent=False)
        bias = None if before.bias is None else before.bias.detach()
        self.bias = Unit(bias, of_zero=ZERO_BIAS) if numbers and bias is not None else None
        self.register_buffer("still_bias", None if numbers or bias is None else bias.float(), persistent=False)
        self.U, self.V = self._correction(before)

    def _correction(self, before: PackedLinear) -> tuple[Unit | None, Unit | None]:
        if before.U is None or before.V is None:
            return None, None
        # A start of zero has no size of its own: that at which the correction would be as large as the base.
        spread = float(before.V.weight.detach().double().square().mean().sqrt()) * before.correction**0.5
        size = float(self.base().detach().double().square().mean().sqrt())
        return Unit(before.U.weight, of_zero=size / spread if size and spread else 1.0), Unit(before.V.weight)

    def base(self) -> Tensor:
        """The base's weight (O, I) as it is now, float32."""
        if self.unpacked is None:
            assert self.frozen is not None
            return self.frozen
        return self.unpacked(self.still | {key: unit() for key, unit in self.units.items()})

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        y = nn.functional.linear(x, self.base(), self.still_bias if self.bias is None else self.bias())
        if self.U is None or self.V is None:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self.V()), self.U())

    @torch.no_grad()
    def stored(self, like: PackedLinear) -> PackedLinear:
        """The packed layer as it is now; what was not trained is that of `like`, as are codes.

        Numbers of the base that were exact in bfloat16 are so again, which files in 16 bits rely on.
        """
        dtype = next(like.parameters()).dtype
        factors = None if self.U is None or self.V is None else Factors(self.U.value(), self.V.value())
        bias = like.bias if self.bias is None else self.bias.value()
        return PackedLinear.holding(self._stored_base(like.base), factors, bias, dtype=dtype)

    def _stored_base(self, like: Store) -> Store:
        if self.unpacked is None:
            return like
        made = copy.deepcopy(like, {id(codes): codes for codes in like.buffers()})
        for key, unit in self.units.items():
            old, new = made.get_parameter(key), unit.value()
            old.copy_(as_stored(new) if torch.equal(as_stored(old), old) else new)
        return made
