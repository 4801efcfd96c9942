"""A matrix in any other store, with a few entries kept apart in 16 bits: linalg/outliers.py."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.outliers import JUMP, Entries, from_gaps, most_gap_bytes, to_gaps, with_entries
from spectrim.nn.stores import Store, Unpacked, part_of, store_from_entry


class OutlierStore(Store):
    """Stored: `numbers` (N,), `gaps` (M,) uint8 between their places, and the store of all others as `inner.KEY`.

    An entry that is kept apart takes the place of what the inner store has there.
    """

    kind = "outliers"
    numbers: nn.Parameter
    gaps: Tensor

    def __init__(self, inner: Store, entries: int, gap_bytes: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs = inner.outputs, inner.inputs
        self.entries, self.gap_bytes = entries, gap_bytes
        self.inner = inner
        self.make_empty("gaps", device=device, dtype=dtype)

    @classmethod
    def holding(cls, inner: Store, entries: Entries, *, dtype: torch.dtype) -> Store:
        """The entries in `dtype`; the inner store itself where there are none."""
        if not len(entries.positions):
            return inner
        gaps = to_gaps(entries.positions)
        store = cls(inner, len(entries.values), len(gaps), device="meta")
        store.numbers, store.gaps = nn.Parameter(entries.values.to(dtype)), gaps
        return store

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        entries, gap_bytes, numbers = entry.get("entries"), entry.get("gap_bytes"), outputs * inputs
        if type(entries) is not int or not 1 <= entries <= numbers:
            raise ValueError(f"entries {entries!r}; a matrix of {outputs} x {inputs} has 1 to {numbers} to keep apart")
        most = most_gap_bytes(numbers, entries)
        if type(gap_bytes) is not int or not entries <= gap_bytes <= most:
            raise ValueError(
                f"gap_bytes {gap_bytes!r}; {entries} entries of {outputs} x {inputs} take {entries} to {most}"
            )
        own = entry.get("inner")
        if isinstance(own, Mapping) and own.get("kind") == cls.kind:
            raise ValueError("outliers inside outliers; the entries kept apart are one list")
        inner = store_from_entry(outputs, inputs, own, device=device, dtype=dtype)
        return cls(inner, entries, gap_bytes, device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "entries": self.entries,
            "gap_bytes": self.gap_bytes,
            "inner": self.inner.entry(),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        inner = {f"inner.{key}": shape for key, shape in self.inner.shapes().items()}
        return {"numbers": (self.entries,), "gaps": (self.gap_bytes,), **inner}

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        positions, inner = from_gaps(self.gaps), self.inner.unpacked(dtype)
        return lambda numbers: with_entries(inner(part_of(numbers, "inner")), Entries(positions, numbers["numbers"]))

    def after_load(self) -> None:
        self.inner.after_load()
        if self.gaps.is_meta:
            return
        positions = from_gaps(self.gaps)
        if len(positions) != self.entries or int(self.gaps[-1]) == JUMP:
            raise ValueError(f"the gaps lead to {len(positions)} entries, {self.entries} are kept apart: damaged file")
        if int(positions[-1]) >= self.outputs * self.inputs:
            raise ValueError(f"an entry is kept apart behind the last of {self.outputs} x {self.inputs}: damaged file")
