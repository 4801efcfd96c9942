"""Codes of 2, 3 or 4 bits with a table of levels for each row: linalg/codebook.py."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.codebook import CODEBOOK_BITS, Codebook, from_codebook
from spectrim.linalg.quantise import pack, packed_width, unpack
from spectrim.nn.stores import Store, Unpacked


class CodebookStore(Store):
    """Stored: `codes` (O, bytes) uint8 and `table` (O, 2^bits)."""

    kind = "codebook"
    codes: Tensor
    table: nn.Parameter

    def __init__(self, outputs: int, inputs: int, *, bits: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs, self.bits = outputs, inputs, bits
        self.make_empty("codes", device=device, dtype=dtype)

    @classmethod
    def holding(cls, codebook: Codebook, *, bits: int, dtype: torch.dtype) -> Self:
        """Codes packed, levels in `dtype`."""
        store = cls(*codebook.codes.shape, bits=bits, device="meta")
        store.codes = pack(codebook.codes, bits)
        store.table = nn.Parameter(codebook.table.to(dtype))
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        bits = entry.get("bits")
        if type(bits) is not int or bits not in CODEBOOK_BITS:
            raise ValueError(f"bits {bits!r}; of a codebook it must be one of {', '.join(map(str, CODEBOOK_BITS))}")
        return cls(outputs, inputs, bits=bits, device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, "bits": self.bits}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"codes": (self.outputs, packed_width(self.inputs, self.bits)), "table": (self.outputs, 2**self.bits)}

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        codes = unpack(self.codes, self.bits, self.inputs)
        return lambda numbers: from_codebook(Codebook(codes, numbers["table"]), dtype)
