"""A stream of bits of which every window is a weight, and a scale for each row: linalg/trellis.py.

Streams are as long whatever window they are decoded with, and any window makes numbers of them that look like weights:
a wrong one shows in nothing but a `check` in the layer's entry, of `bits`, `window`, the shape and the first stream.
"""

import zlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.quantise import pack, packed_width, unpack
from spectrim.linalg.trellis import RATES, WINDOWS, Rate, code_table, rate_of
from spectrim.linalg.trellis_columns import Coded, steps_of, strips_of, unscaled_weight
from spectrim.nn.stores import Store, Unpacked


class TrellisStore(Store):
    """Stored: `codes` (strips, bytes) uint8, `scales` (O,)."""

    kind = "trellis"
    codes: Tensor
    scales: nn.Parameter
    claimed: int | None = None
    """What the file's entry says `check` to be; None where it has none, and of stores that were not loaded."""

    def __init__(self, outputs: int, inputs: int, rate: Rate, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs, self.rate = outputs, inputs, rate
        self.make_empty("codes", device=device, dtype=dtype)

    @classmethod
    def holding(cls, coded: Coded, inputs: int, rate: Rate, *, dtype: torch.dtype) -> Self:
        """Codes packed, scales in `dtype`."""
        store = cls(len(coded.scales), inputs, rate, device="meta")
        store.codes = pack(coded.codes, rate.step_bits)
        store.scales = nn.Parameter(coded.scales.to(dtype))
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        bits, window = entry.get("bits"), entry.get("window")
        if type(bits) not in (int, float) or bits not in {rate.bits for rate in RATES}:
            allowed = ", ".join(f"{rate.bits:g}" for rate in RATES)
            raise ValueError(f"bits {bits!r}; of a trellis it must be one of {allowed}")
        if type(window) is not int or window not in WINDOWS:
            raise ValueError(f"window {window!r}; of a trellis it must be one of {', '.join(map(str, WINDOWS))}")
        check = entry.get("check")
        if check is not None and type(check) is not int:
            raise ValueError(f"check {check!r}; of a trellis it must be a whole number")
        store = cls(outputs, inputs, rate_of(bits, window), device=device, dtype=dtype)
        store.claimed = check
        return store

    def entry(self) -> dict[str, Any]:
        check = self.claimed if self.codes.is_meta else self.check()
        own = {"kind": self.kind, "bits": self.rate.bits, "window": self.rate.window}
        return own if check is None else own | {"check": check}

    def check(self) -> int:
        """CRC-32 of what decides how the first stream is decoded, and of the stream."""
        decided = f"{self.rate.bits:g} {self.rate.window} {self.outputs} {self.inputs}".encode()
        first = self.codes[:1].cpu().contiguous().view(torch.uint8)  # an untrusted file may hold another dtype
        return zlib.crc32(first.numpy().tobytes(), zlib.crc32(decided))

    def after_load(self) -> None:
        """ValueError where bits, window, shape or the first stream are not those that the file was written with."""
        if self.claimed is None or (found := self.check()) == self.claimed:
            return
        raise ValueError(
            f"trellis codes of {self.rate.bits:g} bits and window {self.rate.window} have the check {found}, and "
            f"config.json says {self.claimed}: it or the codes were changed; take the folder from its source again"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        steps = steps_of(self.inputs, self.rate)
        return {
            "codes": (strips_of(self.outputs), packed_width(steps, self.rate.step_bits)),
            "scales": (self.outputs,),
        }

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        codes = unpack(self.codes, self.rate.step_bits, steps_of(self.inputs, self.rate))
        wanted = dtype or self.scales.dtype
        table = code_table(self.rate, self.codes.device, wanted)
        unscaled = unscaled_weight(codes, self.rate, self.outputs, self.inputs, table)
        return lambda numbers: unscaled * numbers["scales"].to(wanted)[:, None]
