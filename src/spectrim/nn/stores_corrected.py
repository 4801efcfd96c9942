"""A matrix in any other store, and a product of two more beside it: a low-rank part that has its own bits."""

from collections.abc import Mapping
from typing import Any, Self

import torch

from spectrim.nn.stores import Store, Unpacked, part_of, store_from_entry

PARTS = ("inner", "left", "right")


class CorrectedStore(Store):
    """`inner + left^T right`. Stored: what `inner` (O, I), `left` (R, O) and `right` (R, I) store, as `inner.KEY`, ...

    Both parts have a row for each component, so that one scale a row costs nothing. None of them is one of these again.
    """

    kind = "corrected"

    def __init__(self, inner: Store, left: Store, right: Store) -> None:
        super().__init__()
        self.outputs, self.inputs, self.rank = inner.outputs, inner.inputs, left.outputs
        self.inner, self.left, self.right = inner, left, right

    @classmethod
    def from_entry(
        cls, outputs: int, inputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        rank, full = entry.get("rank"), min(outputs, inputs)
        if type(rank) is not int or not 1 <= rank <= full:
            raise ValueError(f"rank {rank!r} of a low-rank part; it must be from 1 to {full}")
        made: list[Store] = []
        for name, shape in zip(PARTS, ((outputs, inputs), (rank, outputs), (rank, inputs)), strict=True):
            own = entry.get(name)
            if isinstance(own, Mapping) and own.get("kind") == cls.kind:
                raise ValueError("a low-rank part beside another; their ranks add up to one")
            try:
                made.append(store_from_entry(*shape, own, device=device, dtype=dtype))
            except ValueError as error:
                raise ValueError(f"a part {name} with {error}") from error
        return cls(*made)

    def _parts(self) -> dict[str, Store]:
        return {"inner": self.inner, "left": self.left, "right": self.right}

    def entry(self) -> dict[str, Any]:
        return {"kind": self.kind, "rank": self.rank} | {name: part.entry() for name, part in self._parts().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{key}": s for name, part in self._parts().items() for key, s in part.shapes().items()}

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        inner, left, right = (part.unpacked(dtype) for part in self._parts().values())
        return lambda numbers: (
            inner(part_of(numbers, "inner")) + left(part_of(numbers, "left")).mT @ right(part_of(numbers, "right"))
        )

    def after_load(self) -> None:
        for part in self._parts().values():
            part.after_load()
