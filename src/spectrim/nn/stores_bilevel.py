"""Codes of 2, 3, 4 or 8 bits in small groups whose scales and zeros are codes too: linalg/bilevel.py."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.bilevel import Bilevel, Levels, dequantise_bilevel, row_blocks
from spectrim.linalg.quantise import BITS, group_count, pack, packed_width, unpack
from spectrim.nn.stores import Store, Unpacked


class BilevelStore(Store):
    """Stored: `codes` (O, bytes) uint8; of scales and zeros alike `scale_codes` (bytes,) uint8, one stream row after
    row, and `scale_steps`, `scale_lows` (ceil(O / rows), G).
    """

    kind = "bilevel"
    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    scale_steps: nn.Parameter
    scale_lows: nn.Parameter
    zero_steps: nn.Parameter
    zero_lows: nn.Parameter

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        bits: int,
        group_size: int,
        statistic_bits: int,
        rows: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.bits, self.group_size, self.statistic_bits, self.rows = bits, group_size, statistic_bits, rows
        self.groups = group_count(inputs, group_size)
        self.make_empty("codes", "scale_codes", "zero_codes", device=device, dtype=dtype)

    @classmethod
    def holding(
        cls, rounded: Bilevel, *, bits: int, group_size: int, statistic_bits: int, rows: int, dtype: torch.dtype
    ) -> Self:
        """Codes packed, second grids in `dtype`."""
        store = cls(
            *rounded.codes.shape, bits=bits, group_size=group_size, statistic_bits=statistic_bits, rows=rows,
            device="meta",
        )  # fmt: skip
        store.codes = pack(rounded.codes, bits)
        scales, zeros = rounded.scales, rounded.zeros
        store.scale_codes, store.zero_codes = (pack(part.codes.flatten(), statistic_bits) for part in (scales, zeros))
        store.scale_steps, store.scale_lows = (nn.Parameter(part.to(dtype)) for part in scales[1:])
        store.zero_steps, store.zero_lows = (nn.Parameter(part.to(dtype)) for part in zeros[1:])
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        for name in ("bits", "statistic_bits"):
            if type(entry.get(name)) is not int or entry[name] not in BITS:
                raise ValueError(f"{name} {entry.get(name)!r}; it must be one of {', '.join(map(str, BITS))}")
        group_size, rows = entry.get("group_size"), entry.get("rows")
        if type(group_size) is not int or group_size < 0 or (group_size and inputs % group_size):
            raise ValueError(f"group_size {group_size!r}; it must divide the {inputs} inputs, or be 0 for whole rows")
        if type(rows) is not int or not 1 <= rows <= outputs:
            raise ValueError(f"rows {rows!r}; 1 to {outputs} rows may share a grid of scales")
        return cls(
            outputs, inputs, bits=entry["bits"], group_size=group_size, statistic_bits=entry["statistic_bits"],
            rows=rows, device=device, dtype=dtype,
        )  # fmt: skip

    def entry(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "statistic_bits": self.statistic_bits,
            "rows": self.rows,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        codes = (packed_width(self.outputs * self.groups, self.statistic_bits),)
        grid = (row_blocks(self.outputs, self.rows), self.groups)
        return {
            "codes": (self.outputs, packed_width(self.inputs, self.bits)),
            **{f"{name}_codes": codes for name in ("scale", "zero")},
            **{f"{name}_{part}": grid for name in ("scale", "zero") for part in ("steps", "lows")},
        }

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        """Works in float32 or better: zeros are no whole numbers, and bfloat16 would round code - zero."""
        codes = unpack(self.codes, self.bits, self.inputs)
        scale_codes, zero_codes = (self._statistics(packed) for packed in (self.scale_codes, self.zero_codes))

        def matrix(numbers: Mapping[str, Tensor]) -> Tensor:
            scales = Levels(scale_codes, numbers["scale_steps"], numbers["scale_lows"])
            zeros = Levels(zero_codes, numbers["zero_steps"], numbers["zero_lows"])
            wanted = dtype or scales.steps.dtype
            wide = torch.promote_types(wanted, torch.float32)
            return dequantise_bilevel(Bilevel(codes, scales, zeros), self.rows, wide).to(wanted)

        return matrix

    def _statistics(self, packed: Tensor) -> Tensor:
        return unpack(packed, self.statistic_bits, self.outputs * self.groups).reshape(self.outputs, self.groups)
