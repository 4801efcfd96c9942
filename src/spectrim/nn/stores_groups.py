"""Some groups of neighbouring inputs, a store of their own, and a bitmap of where they stand: linalg/groups.py."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from spectrim.linalg.groups import Groups, bitmap_bytes, from_bitmap, from_groups, to_bitmap
from spectrim.nn.stores import Store, Unpacked, part_of, store_from_entry


class GroupStore(Store):
    """Stored: `bitmap` (ceil(O G / 8),) uint8, one bit a group, and the kept groups (N, group_size) as `kept.KEY`."""

    kind = "groups"
    bitmap: Tensor

    def __init__(self, outputs: int, inputs: int, kept: Store, *, device: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.groups = inputs // kept.inputs
        self.kept = kept
        self.make_empty("bitmap", device=device)

    @classmethod
    def holding(cls, kept: Store, mask: Tensor) -> Self:
        """`mask` (O, G) bool marks where the rows of `kept` stand, row after row."""
        store = cls(len(mask), mask.shape[1] * kept.inputs, kept, device="meta")
        store.bitmap = to_bitmap(mask)
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        size, count = entry.get("group_size"), entry.get("groups")
        if type(size) is not int or size < 1 or inputs % size:
            raise ValueError(f"group_size {size!r}; it must divide the {inputs} inputs")
        most = outputs * (inputs // size)
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"groups {count!r}; {outputs} x {inputs} in groups of {size} has 1 to {most} to keep")
        kept = store_from_entry(count, size, entry.get("kept"), device=device, dtype=dtype)
        return cls(outputs, inputs, kept, device=device)

    def entry(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "group_size": self.kept.inputs,
            "groups": self.kept.outputs,
            "kept": self.kept.entry(),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        kept = {f"kept.{key}": shape for key, shape in self.kept.shapes().items()}
        return {"bitmap": (bitmap_bytes(self.outputs, self.groups),), **kept}

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        mask, kept = from_bitmap(self.bitmap, self.outputs, self.groups), self.kept.unpacked(dtype)
        return lambda numbers: from_groups(Groups(kept(part_of(numbers, "kept")), mask))

    def after_load(self) -> None:
        self.kept.after_load()
        if self.bitmap.is_meta:
            return
        marked = int(from_bitmap(self.bitmap, self.outputs, self.groups).sum())
        if marked != self.kept.outputs:
            raise ValueError(f"the bitmap marks {marked} groups, {self.kept.outputs} are kept: damaged file")
