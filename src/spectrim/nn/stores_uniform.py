"""Codes of 2, 3, 4 or 8 bits with a scale (and a zero) for each group: linalg/quantise.py."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.quantise import BITS, Rounded, dequantise, group_count, pack, packed_width, unpack
from spectrim.nn.stores import Store, Unpacked


class UniformStore(Store):
    """Stored: `codes` (O, bytes) uint8, `scales` (O, G), and without symmetry `zeros` (bytes,) uint8."""

    kind = "uniform"
    codes: Tensor
    scales: nn.Parameter
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
        self.make_empty("codes", "zeros", device=device, dtype=dtype)
        if symmetric:
            self.register_buffer("zeros", None)

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

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        codes = unpack(self.codes, self.bits, self.inputs)
        zeros = None
        if self.zeros is not None:
            zeros = unpack(self.zeros, self.bits, self.outputs * self.groups).reshape(self.outputs, self.groups)
        return lambda numbers: dequantise(Rounded(codes, numbers["scales"], zeros), self.bits, dtype)
