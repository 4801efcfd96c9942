"""Forms in which the numbers of a weight are kept, each a small module that gives the weight back.

    plain      16-bit numbers
    uniform    codes of 2, 3, 4 or 8 bits with a scale (and a zero) for each group      linalg/quantise.py
    bilevel    such codes in small groups, their scales and zeros in codes too          linalg/bilevel.py
    codebook   codes of 2, 3 or 4 bits with a table of levels for each row              linalg/codebook.py
    normal     codes for quantiles of the normal distribution, scales in few bits       linalg/normal_float.py
    half       two of every four, and where they stand; the values are a store again    linalg/sparse24.py
    groups     some groups of neighbouring inputs, and where they stand; a store again      linalg/groups.py
    outliers   any of these, with a few entries kept apart in 16 bits                   linalg/outliers.py
    trellis    a stream of bits of which every window is a weight                       linalg/trellis.py
    corrected  any of these, and a product of two more beside it                        linalg/predicted.py

A store stays packed in memory: `matrix` makes the weight for one product and it is let go afterwards. Codes are
buffers; scales, tables and plain numbers are parameters, which can be trained (`unpacked`). A new form is a file
`stores_NAME.py` and a line in `STORES`.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

STORES = {
    "plain": "spectrim.nn.stores:PlainStore",
    "uniform": "spectrim.nn.stores_uniform:UniformStore",
    "bilevel": "spectrim.nn.stores_bilevel:BilevelStore",
    "codebook": "spectrim.nn.stores_codebook:CodebookStore",
    "half": "spectrim.nn.stores_half:HalfStore",
    "trellis": "spectrim.nn.stores_trellis:TrellisStore",
    "groups": "spectrim.nn.stores_groups:GroupStore",
    "outliers": "spectrim.nn.stores_outliers:OutlierStore",
    "normal": "spectrim.nn.stores_normal:NormalStore",
    "corrected": "spectrim.nn.stores_corrected:CorrectedStore",
}
"""Kind in the file to class, imported at first use."""


Unpacked = Callable[[Mapping[str, Tensor]], Tensor]
"""The matrix (O, I) that numbers, by key, give with codes that stay."""


class Store(nn.Module):
    """A matrix (O, I) in some form."""

    kind: ClassVar[str]
    outputs: int
    inputs: int

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (O, I), worked out in `dtype` (default: that of its numbers)."""
        return self.unpacked(dtype)(dict(self.named_parameters()))

    @abstractmethod
    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        """Codes unpacked, once; gradients reach the numbers (parameters, by key) that the function is given.

        It works in `dtype` (default: that of the numbers it is given).
        """

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

    def make_empty(self, *codes: str, device: Any = None, dtype: Any = None) -> None:
        """Its own tensors, zeros of the shapes that it says: `codes` are buffers of bytes, all others parameters."""
        for key, shape in self.shapes().items():
            if key in codes:
                self.register_buffer(key, torch.zeros(shape, dtype=torch.uint8, device=device))
            elif "." not in key:  # those of a store inside are there
                self.register_parameter(key, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))

    def after_load(self) -> None:
        """ValueError for tensors that cannot be right."""


class PlainStore(Store):
    """Numbers as they are."""

    kind = "plain"
    numbers: nn.Parameter

    def __init__(self, outputs: int, inputs: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.make_empty(device=device, dtype=dtype)

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

    def unpacked(self, dtype: torch.dtype | None = None) -> Unpacked:
        return lambda numbers: numbers["numbers"] if dtype is None else numbers["numbers"].to(dtype)


def part_of(numbers: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The numbers of a store inside another, under their own keys."""
    return {key.removeprefix(f"{name}."): value for key, value in numbers.items() if key.startswith(f"{name}.")}


def store_from_entry(outputs: int, inputs: int, entry: Any, *, device: Any = None, dtype: Any = None) -> Store:
    """An empty store as an untrusted entry says; ValueError."""
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str) or kind not in STORES:
        raise ValueError(f"a base or values of {entry!r}; its kind must be one of {', '.join(STORES)}")
    fields = cast(Mapping[str, Any], entry)
    return store_class(kind).from_entry(outputs, inputs, fields, device=device, dtype=dtype)


def store_class(kind: str) -> type[Store]:
    """The class of a kind in `STORES`."""
    module, _, name = STORES[kind].partition(":")
    return getattr(import_module(module), name)
