"""What a layer becomes: a rank and a codec that are asked for, and the tensors that are stored."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from spectrim.linalg.allocate import factor_cost, pivot_cost
from spectrim.linalg.bits import Unit, size_of
from spectrim.linalg.factor import Factors, balance
from spectrim.linalg.pivot import Pivots, from_pivots, pack_mask, to_pivots, unpack_mask
from spectrim.linalg.shared import SharedFactors, group_cost, pivoted, pivoted_group_cost, split

Codec = str
"""dense, factor or pivot of methods that treat one weight at a time; others: nn/codecs.py."""
Storage = Literal["factor", "pivot"]
"""Of a layer by itself."""
Storages = Literal["factor", "pivot", "shared", "shared-pivot", "best"]
"""What a method may be asked for: with `shared` and `shared-pivot` layers that read one input keep its factor once;
`best` is `pivot` or `shared-pivot`, group by group."""
SHARED = ("shared", "shared-pivot")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one layer is to become; `basis` names the layer that holds its right factor, None where it is its own."""

    rank: int
    codec: Codec
    basis: str | None = None


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One compressed layer: its codec, its tensors named as in the file, its bias, and the error it predicts."""

    codec: Codec
    rank: int
    tensors: Mapping[str, Tensor]
    bias: Tensor | None = None
    predicted_error: float = 0.0
    basis: str | None = None
    """Of a layer that shares: the one that holds the right factor, None where it does itself."""

    @property
    def numbers(self) -> int:
        """Stored numbers, everything counted."""
        bias = 0 if self.bias is None else self.bias.numel()
        return bias + sum(t.numel() for t in self.tensors.values())

    def size(self, unit: Unit) -> int:
        """What it stores, everything counted, in numbers or bytes."""
        bias = () if self.bias is None else (self.bias,)
        return size_of([*self.tensors.values(), *bias], unit)

    def dense(self) -> Tensor:
        """The weight (O, I) this layer now stands for."""
        if self.codec == "dense":
            return self.tensors["weight"]
        if self.codec == "factor":
            return self.tensors["U.weight"] @ self.tensors["V.weight"]
        rows, coefficients = self.tensors["pivot.weight"], self.tensors["rest.weight"]
        mask = unpack_mask(self.tensors["mask"], len(rows) + len(coefficients))
        return from_pivots(Pivots(rows, coefficients, mask))


def dense_replacement(weight: Tensor, bias: Tensor | None = None) -> Replacement:
    """A layer that stays as it is."""
    return Replacement(codec="dense", rank=min(weight.shape), tensors=MappingProxyType({"weight": weight}), bias=bias)


def encode(
    factors: Factors, codec: Codec, *, like: Tensor, bias: Tensor | None = None, error: float = 0.0
) -> Replacement:
    """Factors (float64) in the given codec, cast once to the dtype of `like`."""
    if codec == "factor":
        left, right = balance(factors)
        tensors = {"U.weight": left, "V.weight": right}
    elif codec == "pivot":
        pivots = to_pivots(factors)
        tensors = {
            "pivot.weight": pivots.rows,
            "rest.weight": pivots.coefficients,
            "mask": pack_mask(pivots.mask),
        }
    else:
        raise AssertionError(f"cannot encode factors as {codec!r}")
    stored = {
        name: tensor.to(like.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    return Replacement(
        codec=codec,
        rank=factors.left.shape[1],
        tensors=MappingProxyType(stored),
        bias=bias,
        predicted_error=error,
    )


def encode_shared(
    factors: Sequence[Factors],
    codec: Codec,
    owner: str,
    *,
    like: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    errors: Sequence[float],
) -> list[Replacement]:
    """Factors (float64) of a group, all with the same right one, which the first layer keeps as `owner`."""
    found: SharedFactors = split(
        Factors(torch.cat([own.left for own in factors]), factors[0].right), [len(own.left) for own in factors]
    )
    if codec == "shared":
        basis, coefficients = {"V.weight": found.basis}, found.coefficients
    elif codec == "shared-pivot":
        turned = pivoted(found)
        basis, coefficients = {"V.rest.weight": turned.rest, "V.mask": pack_mask(turned.mask)}, turned.coefficients
    else:
        raise AssertionError(f"cannot encode a group as {codec!r}")
    made = []
    for i, (own, weight, bias, error) in enumerate(zip(coefficients, like, biases, errors, strict=True)):
        tensors = {"U.weight": own, **({} if i else basis)}
        stored = {
            name: (t.to(weight.dtype) if t.is_floating_point() else t).contiguous() for name, t in tensors.items()
        }
        made.append(
            Replacement(
                codec=codec, rank=len(found.basis), tensors=MappingProxyType(stored), bias=bias, predicted_error=error,
                basis=owner if i else None,
            )
        )  # fmt: skip
    return made


def with_mean_kept(placed: Replacement, weight: Tensor, mean: Tensor) -> Replacement:
    """The bias moved by (W - W') E[x], so that the mean output is that of `weight` (O, I); W' as stored."""
    moved = (weight.double() - placed.dense().double()) @ mean
    bias = moved if placed.bias is None else placed.bias.double() + moved
    return dataclasses.replace(placed, bias=bias.to(weight.dtype))


def stored_numbers(outputs: int, inputs: int, target: Target) -> int:
    """Numbers that a weight (bias apart) takes in the given codec at the given rank."""
    rank = torch.tensor(target.rank)
    if target.codec == "dense":
        return outputs * inputs
    if target.codec in SHARED:
        if target.basis is not None:
            return target.rank * outputs
        return int((group_cost if target.codec == "shared" else pivoted_group_cost)([outputs], inputs, rank))
    cost = factor_cost if target.codec == "factor" else pivot_cost
    return int(cost(outputs, inputs, rank))
