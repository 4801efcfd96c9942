"""Pivot layers with many rows (prefill): products of torch, outputs put in place by a kernel where it is quicker.

    merge      both products by torch, then one pass over the outputs instead of two
    scatter    the second product writes its columns to their places

What `StoredLinear.many` refers to. Chosen by the clock for one number of rows, and used from half of it on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.choice import MARGIN, TIMED_GROUPS, Choice, dense_us, differs, seconds_in_graph, shapes_of
from spectrim.nn.kernels.few import is_bare
from spectrim.nn.kernels.launch import Tile
from spectrim.nn.linears import PivotLinear
from spectrim.nn.quantised import QuantisedPivotLinear

Form = Literal["merge", "scatter"]
PIVOTS = (PivotLinear, QuantisedPivotLinear)
MERGE_TILES = (Tile(4, 512, 4, 1), Tile(8, 512, 4, 1), Tile(16, 256, 4, 1), Tile(2, 1024, 4, 1), Tile(16, 128, 4, 1), Tile(8, 256, 8, 1))  # noqa: E501  # fmt: skip
SCATTER_TILES = (Tile(128, 256, 8, 3), Tile(128, 256, 8, 4), Tile(128, 128, 4, 4), Tile(256, 128, 8, 3), Tile(128, 128, 8, 4))  # noqa: E501  # fmt: skip
SCATTER_K = 64
"""Inputs at a time in `scatter`."""


@dataclass(eq=False)
class ManyRows:
    """How one layer puts its outputs in place, from `least` rows on; `index` is its order (merge) or its places."""

    form: Form
    tile: Tile
    least: int
    index: Tensor
    dtype: torch.dtype

    def takes(self, x: Tensor) -> bool:
        """Whether it was chosen for such an x, and no gradient is asked for."""
        as_timed = x.dtype == self.dtype and x.device == self.index.device
        return as_timed and x.numel() // x.shape[-1] >= self.least and not torch.is_grad_enabled()

    def product(self, layer: StoredLinear, x: Tensor) -> Tensor:
        """y (..., O) of x (..., I)."""
        assert isinstance(layer, PIVOTS)
        flat, bias = x.reshape(-1, x.shape[-1]), [] if layer.bias is None else [layer.bias]
        if isinstance(layer, PivotLinear):
            # Modules, not weights: something may be wrapped around them.
            first, second, weight = layer.pivot, layer.rest, layer.rest.weight
        else:
            rows, weight = layer.matrices()
            first, second = partial(nn.functional.linear, weight=rows), partial(nn.functional.linear, weight=weight)
        pivots = first(flat)
        if self.form == "merge":
            y = merged(pivots, second(pivots), self.index, bias, list(self.tile))
        elif is_bare(layer):
            y = scattered(pivots, weight, self.index, bias, list(self.tile))
        else:
            y = torch.cat([pivots, second(pivots)], -1).index_select(-1, layer.order)
            y = y if layer.bias is None else y + layer.bias
        return y.view(*x.shape[:-1], layer.out_features)


@torch.library.custom_op("spectrim::merged", mutates_args=())
def merged(pivots: Tensor, others: Tensor, order: Tensor, bias: Sequence[Tensor], tile: Sequence[int]) -> Tensor:
    """y (T, O) = [pivots, others][:, order] + bias; pivots (T, R), others (T, O - R) contiguous, order (O,) int32."""
    from spectrim.nn.kernels import place

    cut = Tile(*tile)
    y = pivots.new_empty(len(pivots), len(order))
    kernel: Any = place.merge
    with torch.cuda.device_of(pivots):  # Triton launches on the current device
        kernel[_grid(y, cut)](
            pivots, others, order, bias[0] if bias else y, y, len(y), pivots.shape[1], len(order),
            BIAS=bool(bias), ROWS=cut.rows, COLUMNS=cut.columns, num_warps=cut.warps,
        )  # fmt: skip
    return y


@merged.register_fake
def _(pivots, others, order, bias, tile):
    return pivots.new_empty(len(pivots), len(order))


@torch.library.custom_op("spectrim::scattered", mutates_args=())
def scattered(pivots: Tensor, second: Tensor, places: Tensor, bias: Sequence[Tensor], tile: Sequence[int]) -> Tensor:
    """y (T, O): pivots (T, R) and pivots second^T, second (O - R, R), at their `places` (O,) int32, + bias."""
    y = pivots.new_empty(len(pivots), len(places))
    with torch.cuda.device_of(pivots):
        _scatter(pivots, second, places, bias, Tile(*tile), y)
    return y


def _scatter(pivots: Tensor, second: Tensor, places: Tensor, bias: Sequence[Tensor], cut: Tile, y: Tensor) -> None:
    from spectrim.nn.kernels import place

    rank = pivots.shape[1]
    sizes = (len(y), rank, len(places))
    added = bias[0] if bias else y
    copy: Any = place.spread
    copy[_grid(pivots, MERGE_TILES[0])](
        pivots, places, added, y, *sizes, BIAS=bool(bias), ROWS=MERGE_TILES[0].rows,
        COLUMNS=MERGE_TILES[0].columns, num_warps=MERGE_TILES[0].warps,
    )  # fmt: skip
    if not len(second):
        return  # a layer of full rank has no other rows
    blocks = -(-len(y) // cut.rows) * -(-len(second) // cut.columns)
    kernel: Any = place.scatter
    kernel[(blocks,)](
        pivots, second, places[rank:], added, y, len(y), len(second), rank, len(places),
        BIAS=bool(bias), EVEN=rank % SCATTER_K == 0, ROWS=cut.rows, COLUMNS=cut.columns, BLOCK_K=SCATTER_K,
        STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip


@scattered.register_fake
def _(pivots, second, places, bias, tile):
    return pivots.new_empty(len(pivots), len(places))


def _grid(y: Tensor, tile: Tile) -> tuple[int, int]:
    return -(-y.shape[0] // tile.rows), -(-y.shape[1] // tile.columns)


def form_of(layer: StoredLinear, form: Form, tile: Tile, least: int) -> ManyRows:
    """A form of one layer, not yet attached."""
    assert isinstance(layer, PIVOTS)
    index = layer.order if form == "merge" else layer.order.argsort()
    return ManyRows(form, tile, least, index.int(), next(layer.parameters()).dtype)


def choose_many(layers: Iterable[StoredLinear], rows: int) -> list[Choice]:
    """Time each kind of pivot layer for so many rows and attach the quickest form where it beats torch."""
    kinds: dict[tuple[Any, ...], list[StoredLinear]] = {}
    for layer in layers:
        if isinstance(layer, PIVOTS):
            kinds.setdefault(shapes_of([layer]), []).append(layer)
    return [_measured(shapes, members, rows) for shapes, members in kinds.items()]


def _measured(shapes: tuple[Any, ...], members: list[StoredLinear], rows: int) -> Choice:
    timed = members[:TIMED_GROUPS]
    like = next(timed[0].parameters())
    x = torch.randn(rows, timed[0].in_features, dtype=like.dtype, device=like.device)
    for layer in members:
        layer.many = None
    found: dict[tuple[Form, Tile], float] = {}
    notes: list[str] = []
    with torch.no_grad():
        expected = timed[0](x).float()
        torch_s = seconds_in_graph(lambda: [layer(x) for layer in timed]) / len(timed)
        for form, tile in _candidates(x.dtype):
            forms = [form_of(layer, form, tile, rows) for layer in timed]
            try:
                if differs(forms[0].product(timed[0], x), expected):
                    notes.append(f"wrong numbers with {form} {tile}")
                    continue
                run = list(zip(forms, timed, strict=True))
                found[form, tile] = seconds_in_graph(lambda run=run: [f.product(la, x) for f, la in run]) / len(timed)
            except Exception as error:  # a tile that this device or this Triton cannot take
                notes.append(f"{form} {tile}: {type(error).__name__}: {str(error)[:200]}")
        dense = dense_us([[layer] for layer in timed], x)
    best = min(found, key=lambda key: found[key], default=None)
    if best is None or found[best] >= MARGIN * torch_s:
        least = None if best is None else found[best] * 1e6
        return Choice(shapes, rows, len(members), torch_s * 1e6, least, None, "; ".join(notes), dense)
    for layer in members:
        layer.many = form_of(layer, *best, least=rows // 2)
    note = "; ".join([f"outputs by {best[0]}", *(f"{f} at best {_least(found, f):.1f} us" for f in ("merge", "scatter")), *notes])  # noqa: E501  # fmt: skip
    return Choice(shapes, rows, len(members), torch_s * 1e6, found[best] * 1e6, (best[1], best[1]), note, dense)


def _candidates(dtype: torch.dtype) -> list[tuple[Form, Tile]]:
    tiles: dict[Form, Sequence[Tile]] = {"merge": MERGE_TILES}
    if dtype != torch.float32:  # no quick products of our own there
        tiles["scatter"] = SCATTER_TILES
    return [(form, tile) for form, some in tiles.items() for tile in some]


def _least(found: dict[tuple[Form, Tile], float], form: str) -> float:
    return min((seconds for (name, _), seconds in found.items() if name == form), default=float("nan")) * 1e6
