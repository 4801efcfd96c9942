"""Codes of 2, 3, 4 or 8 bits for quantiles of the normal distribution, scales rounded too: linalg/normal_float.py."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.normal_float import Form, NormalRounded, blocks_in, from_normal
from spectrim.linalg.quantise import BITS, pack, packed_width, unpack
from spectrim.nn.stores import Store, Unpacked


class NormalStore(Store):
    """Stored: `codes` (O, bytes) uint8, `scale_codes` (bytes,) uint8, all as one row, and `scales` (S,)."""

    kind = "normal"
    codes: Tensor
    scale_codes: Tensor
    scales: nn.Parameter

    def __init__(self, outputs: int, inputs: int, form: Form, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs, self.form = outputs, inputs, form
        self.blocks, _ = blocks_in(outputs, inputs, form)
        self.make_empty("codes", "scale_codes", device=device, dtype=dtype)

    @classmethod
    def holding(cls, rounded: NormalRounded, form: Form, *, dtype: torch.dtype) -> Self:
        """Codes packed, scales in `dtype`."""
        outputs, inputs = rounded.codes.shape
        store = cls(outputs, inputs, form, device="meta")
        store.codes = pack(rounded.codes, form.bits)
        store.scale_codes = pack(rounded.scale_codes.flatten(), form.scale_bits)
        store.scales = nn.Parameter(rounded.scales.to(dtype))
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        for name in ("bits", "scale_bits"):
            if type(entry.get(name)) is not int or entry[name] not in BITS:
                raise ValueError(f"{name} {entry.get(name)!r}; it must be one of {', '.join(map(str, BITS))}")
        for name, most in (("block", inputs), ("scale_block", outputs * inputs)):
            if type(entry.get(name)) is not int or not 1 <= entry[name] <= most:
                raise ValueError(f"{name} {entry.get(name)!r}; it must be a number from 1 to {most}")
        form = Form(*(entry[name] for name in Form._fields))
        return cls(outputs, inputs, form, device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.form._asdict()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        blocks, tops = blocks_in(self.outputs, self.inputs, self.form)
        return {
            "codes": (self.outputs, packed_width(self.inputs, self.form.bits)),
            "scale_codes": (packed_width(self.outputs * blocks, self.form.scale_bits),),
            "scales": (tops,),
        }

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        codes = unpack(self.codes, self.form.bits, self.inputs)
        flat = unpack(self.scale_codes, self.form.scale_bits, self.outputs * self.blocks)
        scale_codes = flat.reshape(self.outputs, self.blocks)
        return lambda numbers: from_normal(NormalRounded(codes, scale_codes, numbers["scales"]), self.form, dtype)
