"""Two of every four weights, and where they stand: linalg/sparse24.py. The values are a store of their own."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from spectrim.linalg.quantise import pack, packed_width, unpack
from spectrim.linalg.sparse24 import Half, from_half
from spectrim.nn.stores import Store, Unpacked, part_of, store_from_entry


class HalfStore(Store):
    """Stored: `places` (O, bytes) uint8, two bits each, and the values (O, I / 2) in a store of their own."""

    kind = "half"
    places: Tensor

    def __init__(self, values: Store, *, device: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs = values.outputs, 2 * values.inputs
        self.values = values
        self.make_empty("places", device=device)

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

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        places, values = unpack(self.places, 2, self.inputs // 2), self.values.unpacked(dtype)
        return lambda numbers: from_half(Half(values(part_of(numbers, "values")), places))

    def after_load(self) -> None:
        self.values.after_load()
        if self.places.is_meta:
            return
        pairs = unpack(self.places, 2, self.inputs // 2).reshape(-1, 2)
        if bool((pairs[:, 0] >= pairs[:, 1]).any()):
            raise ValueError("two weights of a four are said to stand at one place, or out of order: damaged file")
