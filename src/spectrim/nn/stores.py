"""Forms in which the numbers of a weight are kept, each a small module that gives the weight back.

    plain      16-bit numbers
    uniform    codes of 2, 3, 4 or 8 bits with a scale (and a zero) for each group      linalg/quantise.py
    half       two of every four, and where they stand; the values are a store again    linalg/sparse24.py

A store stays packed in memory: `matrix` makes the weight for one product and it is let go afterwards. Codes are
buffers; scales and plain numbers are parameters. A new form is a class here and a line in `STORES`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from spectrim.linalg.quantise import BITS, Rounded, dequantise, group_count, pack, packed_width, unpack
from spectrim.linalg.sparse24 import Half, from_half


class Store(nn.Module):
    """A matrix (O, I) in some form."""

    kind: ClassVar[str]
    outputs: int
    inputs: int

    @abstractmethod
    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (O, I), worked out in `dtype` (default: that of its numbers)."""

    @abstractmethod
    def entry(self) -> dict[str, Any]:
        """Its part of a layer's line in config.json."""

    @classmethod
    @abstractmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        """An empty store; ValueError, before anything is allocated, for an entry that no such matrix can have."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors by key."""

    def after_load(self) -> None:
        """ValueError for tensors that cannot be right."""


class PlainStore(Store):
    """Numbers as they are."""

    kind = "plain"

    def __init__(self, outputs: int, inputs: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.numbers = nn.Parameter(torch.zeros(outputs, inputs, device=device, dtype=dtype))

    @classmethod
    def holding(cls, matrix: Tensor) -> Self:
        """The matrix (O, I) itself."""
        store = cls(*matrix.shape, device="meta")
        store.numbers = nn.Parameter(matrix)
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        return cls(outputs, inputs, device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"numbers": (self.outputs, self.inputs)}

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.numbers if dtype is None else self.numbers.to(dtype)


class UniformStore(Store):
    """Stored: `codes` (O, bytes) uint8, `scales` (O, G), and without symmetry `zeros` (bytes,) uint8."""

    kind = "uniform"
    codes: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.groups = group_count(inputs, group_size)
        shapes = self.shapes()
        self.register_buffer("codes", torch.zeros(shapes["codes"], dtype=torch.uint8, device=device))
        self.scales = nn.Parameter(torch.zeros(shapes["scales"], device=device, dtype=dtype))
        zeros = None if symmetric else torch.zeros(shapes["zeros"], dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)

    @classmethod
    def holding(cls, rounded: Rounded, *, bits: int, group_size: int, dtype: torch.dtype) -> Self:
        """Codes packed, scales in `dtype`."""
        symmetric = rounded.zeros is None
        store = cls(*rounded.codes.shape, bits=bits, group_size=group_size, symmetric=symmetric, device="meta")
        store.codes = pack(rounded.codes, bits)
        store.scales = nn.Parameter(rounded.scales.to(dtype))
        if rounded.zeros is not None:
            store.zeros = pack(rounded.zeros.flatten(), bits)
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        bits, group_size, symmetric = entry.get("bits"), entry.get("group_size"), entry.get("symmetric")
        if type(bits) is not int or bits not in BITS:
            raise ValueError(f"bits {bits!r}; it must be one of {', '.join(map(str, BITS))}")
        if type(group_size) is not int or group_size < 0 or (group_size and inputs % group_size):
            raise ValueError(f"group_size {group_size!r}; it must divide the {inputs} inputs, or be 0 for whole rows")
        if type(symmetric) is not bool:
            raise ValueError(f"symmetric {symmetric!r}; it must be true or false")
        return cls(outputs, inputs, bits=bits, group_size=group_size, symmetric=symmetric, device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, "bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        zeros = {} if self.symmetric else {"zeros": (packed_width(self.outputs * self.groups, self.bits),)}
        return {
            "codes": (self.outputs, packed_width(self.inputs, self.bits)),
            "scales": (self.outputs, self.groups),
            **zeros,
        }

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        codes = unpack(self.codes, self.bits, self.inputs)
        zeros = None
        if self.zeros is not None:
            zeros = unpack(self.zeros, self.bits, self.outputs * self.groups).reshape(self.outputs, self.groups)
        return dequantise(Rounded(codes, self.scales, zeros), self.bits, dtype)


class HalfStore(Store):
    """Stored: `places` (O, bytes) uint8, two bits each, and the values (O, I / 2) in a store of their own."""

    kind = "half"
    places: Tensor

    def __init__(self, values: Store, *, device: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs = values.outputs, 2 * values.inputs
        self.values = values
        self.register_buffer("places", torch.zeros(self.shapes()["places"], dtype=torch.uint8, device=device))

    @classmethod
    def holding(cls, values: Store, places: Tensor) -> Self:
        """`places` (O, I / 2) in 0 ... 3 of the values."""
        store = cls(values, device="meta")
        store.places = pack(places, 2)
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        if inputs % 4:
            raise ValueError(f"kind 'half'; the layer has {inputs} inputs, which are no whole fours")
        values = store_from_entry(outputs, inputs // 2, entry.get("values"), device=device, dtype=dtype)
        return cls(values, device=device)

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": self.values.entry()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        values = {f"values.{key}": shape for key, shape in self.values.shapes().items()}
        return {"places": (self.outputs, packed_width(self.inputs // 2, 2)), **values}

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        return from_half(Half(self.values.matrix(dtype), unpack(self.places, 2, self.inputs // 2)))

    def after_load(self) -> None:
        self.values.after_load()
        if self.places.is_meta:
            return
        pairs = unpack(self.places, 2, self.inputs // 2).reshape(-1, 2)
        if bool((pairs[:, 0] >= pairs[:, 1]).any()):
            raise ValueError("two weights of a four are said to stand at one place, or out of order: damaged file")


STORES: dict[str, type[Store]] = {store.kind: store for store in (PlainStore, UniformStore, HalfStore)}


def store_from_entry(outputs: int, inputs: int, entry: Any, *, device: Any = None, dtype: Any = None) -> Store:
    """An empty store as an untrusted entry says; ValueError."""
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str) or kind not in STORES:
        raise ValueError(f"a base or values of {entry!r}; its kind must be one of {', '.join(STORES)}")
    fields = cast(Mapping[str, Any], entry)
    return STORES[kind].from_entry(outputs, inputs, fields, device=device, dtype=dtype)
