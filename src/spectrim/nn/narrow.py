"""Codec "narrow": a weight of which whole rows and columns are 0, stored without them."""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.pivot import pack_mask, unpack_mask
from spectrim.nn.codecs import StoredLinear


def _after_loading(layer: "NarrowLinear", _keys: object) -> None:
    """Not a lambda: layers can be pickled."""
    layer.refresh()


class NarrowLinear(StoredLinear):
    """Reads some of its inputs, computes some of its outputs; the others are 0.

    Stored: `kept.weight` (R, C), `kept.bias` (R,) if any, and for a side that is cut one bit for each of its places:
    `rows` (ceil(O / 8),) and `columns` (ceil(I / 8),), both uint8.
    """

    codec: Literal["narrow"] = "narrow"
    rows: Tensor | None
    columns: Tensor | None
    places: Tensor
    reads: Tensor

    def __init__(
        self, inputs: int, outputs: int, kept: tuple[int, int], *, bias: bool, device=None, dtype=None
    ) -> None:
        """`kept` is (R, C): rows of `outputs`, columns of `inputs`."""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.kept_rows, self.kept_columns = kept
        self.rank = min(kept)
        self.kept = nn.Linear(self.kept_columns, self.kept_rows, bias=bias, device=device, dtype=dtype)
        for name, count, all_of in (("rows", kept[0], outputs), ("columns", kept[1], inputs)):
            bits = torch.zeros((all_of + 7) // 8, dtype=torch.uint8, device=device) if count < all_of else None
            self.register_buffer(name, bits)
        # They follow from the bits, so they are not stored. `places`: of each output among the computed ones, and of a
        # 0 behind them; `reads`: which inputs.
        self.register_buffer("places", torch.arange(outputs, device=device).clamp(max=kept[0]), persistent=False)
        self.register_buffer("reads", torch.arange(self.kept_columns, device=device), persistent=False)
        self.add_guard(device, dtype)
        self.register_load_state_dict_post_hook(_after_loading)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor) -> Self:
        """`weight` (R, C) and `bias` (R,) in the places that `rows` (O,) and `columns` (I,) mark; all bool."""
        made = cls(
            len(columns), len(rows), (len(weight), weight.shape[1]), bias=bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        made.kept.weight.data.copy_(weight)
        if bias is not None:
            made.kept.bias.data.copy_(bias)
        for buffer, mask in ((made.rows, rows), (made.columns, columns)):
            if buffer is not None:
                buffer.copy_(pack_mask(mask))
        made.refresh()
        return made

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "rows": self.kept_rows, "columns": self.kept_columns}

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        rows, columns = _count("rows", entry, outputs), _count("columns", entry, inputs)
        if entry["rank"] != min(rows, columns):
            raise ValueError(f"rank {entry['rank']}; its {rows} kept rows and {columns} columns make it the smaller")
        return cls(inputs, outputs, (rows, columns), bias=entry["bias"], device=device, dtype=dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the entry, as for every codec."""
        found: dict[str, tuple[int, ...]] = {"kept.weight": (self.kept_rows, self.kept_columns)}
        if self.has_bias:
            found["kept.bias"] = (self.kept_rows,)
        if self.rows is not None:
            found["rows"] = ((self.out_features + 7) // 8,)
        if self.columns is not None:
            found["columns"] = ((self.in_features + 7) // 8,)
        return found

    def after_load(self) -> None:
        if any(bits is not None and bits.is_meta for bits in (self.rows, self.columns)):
            raise ValueError("its masks were offloaded before they could be read; load without offload_buffers=True")
        self.refresh()

    def refresh(self) -> None:
        """Work out the places from the bits (loading does this)."""
        if self.places.is_meta or any(bits is not None and bits.is_meta for bits in (self.rows, self.columns)):
            return
        rows = _marked("rows", self.rows, self.out_features, self.kept_rows, self.places)
        columns = _marked("columns", self.columns, self.in_features, self.kept_columns, self.places)
        self.places = torch.where(rows, rows.cumsum(0) - 1, self.kept_rows)
        self.reads = columns.nonzero().flatten()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        y = self.kept(x if self.columns is None else x.index_select(-1, self.reads))
        return y if self.rows is None else self._spread(y)

    def _spread(self, y: Tensor) -> Tensor:
        """(..., R) in its places of (..., O)."""
        return nn.functional.pad(y, (0, 1)).index_select(-1, self.places)

    def dense_weight(self) -> Tensor:
        weight = self.kept.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        wide = weight.new_zeros(self.kept_rows, self.in_features).index_copy(1, self.reads, weight)
        return wide if self.rows is None else self._spread(wide.mT).mT

    @property
    def has_bias(self) -> bool:
        return self.kept.bias is not None

    @property
    def bias(self) -> Tensor | None:
        """For code that treats this layer as an `nn.Linear`: (O,), 0 where no output is computed."""
        bias = self.kept.bias
        return bias if bias is None or self.rows is None else self._spread(bias)


def _count(what: str, entry: Mapping[str, Any], most: int) -> int:
    """How many rows or columns are kept, from an entry that is not trusted."""
    count = entry.get(what)
    if type(count) is not int or not 1 <= count <= most:
        raise ValueError(f"{count!r} kept {what}; a whole number from 1 to {most} is possible")
    return count


def _marked(what: str, bits: Tensor | None, count: int, kept: int, like: Tensor) -> Tensor:
    """The mask (count,) bool; all where there are no bits. ValueError unless it marks `kept`."""
    if bits is None:
        return torch.ones(count, dtype=torch.bool, device=like.device)
    mask = unpack_mask(bits, count)
    if int(mask.sum()) != kept:
        raise ValueError(f"its mask marks {int(mask.sum())} {what}, the layer has {kept}: damaged file")
    return mask
