"""Products of up to three layers with one input, in one launch or two: calls into the kernels and their twins.

    mid_g = V_g x        y_g = U_g mid_g + b_g                             factor
    mid = V x            y_g = U_g mid + b_g                               shared
    mid = x_p + C x_o    y_g = U_g mid + b_g                               shared, its V in pivot storage
    mid_g = A_g x        y_g[place] = [mid_g, C_g mid_g]  (+ b_g)          pivot
                         y_g = W_g x + b_g                                 a whole weight in codes

`products`, `coded_products` and `coded_product` are operators of torch, so torch.compile and CUDA graphs take each as
one node. `products_in_torch` says in plain torch what they compute.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_LINES = 16
"""Rows of x, at most: above it the products of torch are as fast."""
MOST_LAYERS = 3
"""Layers that share a launch, at most."""
MOST_BLOCKS = 2**16
"""Blocks of rows of weights in one launch, where programs divide the inputs."""


class Tile(NamedTuple):
    """How a launch cuts its work; `rows`, `columns` and `warps` are powers of two."""

    rows: int  # of the weight, in a program
    columns: int  # of the weight, at a time; of weights in codes: groups of inputs
    warps: int
    stages: int
    pdl: int = 0  # 1: launches overlap (Hopper)
    splits: int = 1  # programs among which a weight's inputs are divided: `rows.py` alone divides them


class Side(NamedTuple):
    """What one launch reads of the layers: codes and what goes with them, or plain weights alone."""

    weights: Sequence[Tensor]
    widths: Sequence[int]
    scales: Sequence[Tensor] = ()
    zeros: Sequence[Tensor] = ()
    bits: int = 0
    group: int = 0
    order: Tensor | None = None  # of inputs: those that pass as they are first


class Ends(NamedTuple):
    """Where results go: `mid` (M, N) each, or `y` (M, O) at `places`, plus `biases`; () for what there is none of."""

    mid: Sequence[Tensor]
    y: Sequence[Tensor]
    places: Sequence[Tensor]
    biases: Sequence[Tensor]
    out: bool


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed; builds of torch for CUDA bring it"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device"
    return None


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether launches may overlap there: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@torch.library.custom_op("spectrim::products", mutates_args=())
def products(
    x: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    places: Sequence[Tensor],
    biases: Sequence[Tensor],
    first_tile: Sequence[int],
    second_tile: Sequence[int],
    order: Tensor | None = None,
) -> list[Tensor]:
    """y_g (M, O_g) of x (M, I), M <= 16, contiguous; at most three layers.

    first (R_g, I) and second (N_g, R_g) contiguous and of the dtype of x; one first (R, I) serves all seconds.
    places: () for factor layers, else the output (O_g,) int32 of each of [pivots, rest]; biases (O_g,) each, or ().
    Tiles as `Tile`. With an `order` (I,) int32 the one first (R, I - R) is for the inputs order[R:], and those before
    pass as they are.
    """
    mid, y = _results(x, [len(w) for w in first], [len(w) for w in second], places)
    sides = Side(first, [w.shape[1] for w in first], order=order), Side(second, [w.shape[1] for w in second])
    _both(x, *sides, mid, y, places, biases, Tile(*first_tile), Tile(*second_tile))
    return y


@products.register_fake
def _(x, first, second, places, biases, first_tile, second_tile, order=None):
    return _results(x, [], [len(w) for w in second], places)[1]


@torch.library.custom_op("spectrim::coded_products", mutates_args=())
def coded_products(
    x: Tensor,
    first: Sequence[Tensor],
    first_scales: Sequence[Tensor],
    first_zeros: Sequence[Tensor],
    second: Sequence[Tensor],
    second_scales: Sequence[Tensor],
    second_zeros: Sequence[Tensor],
    places: Sequence[Tensor],
    biases: Sequence[Tensor],
    bits: Sequence[int],
    groups: Sequence[int],
    first_tile: Sequence[int],
    second_tile: Sequence[int],
) -> list[Tensor]:
    """The same for weights in codes: codes (N, bytes) uint8, scales (N, G), zeros packed, or () where symmetric.

    bits and groups are of the first weights and of the second: how many inputs a kernel's group has (`shared_group`).
    """
    ranks = [len(w) for w in first]
    mid, y = _results(x, ranks, [len(w) for w in second], places)
    inputs = [x.shape[1]] * len(first)
    _both(x, Side(first, inputs, first_scales, first_zeros, bits[0], groups[0]),
          Side(second, ranks, second_scales, second_zeros, bits[1], groups[1]), mid, y, places, biases,
          Tile(*first_tile), Tile(*second_tile))  # fmt: skip
    return y


@coded_products.register_fake
def _(x, first, first_scales, first_zeros, second, second_scales, second_zeros, places, biases, bits, groups, first_tile, second_tile):  # noqa: E501  # fmt: skip
    return _results(x, [], [len(w) for w in second], places)[1]


@torch.library.custom_op("spectrim::coded_product", mutates_args=())
def coded_product(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
    bits: int,
    group: int,
    tile: Sequence[int],
) -> list[Tensor]:
    """y_g (M, N_g) = x W_g^T + b_g of x (M, I), W_g (N_g, I) in codes as in `coded_products`: one launch."""
    y = [x.new_empty(len(x), len(w)) for w in codes]
    side = Side(codes, [x.shape[1]] * len(codes), scales, zeros, bits, group)
    _launch([x] * len(y), side, Ends([], y, [], biases, True), Tile(*tile), ahead=False)
    return y


@coded_product.register_fake
def _(x, codes, scales, zeros, biases, bits, group, tile):
    return [x.new_empty(len(x), len(w)) for w in codes]


def products_in_torch(
    x: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    places: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor | None = None,
) -> list[Tensor]:
    """What `products` computes, and `coded_products` of the weights that its codes stand for."""
    if order is not None:
        eye = torch.eye(len(first[0]), dtype=x.dtype, device=x.device)
        first, x = [torch.cat([eye, first[0]], 1)], x[:, order]
    found = []
    first = list(first) * (len(second) if len(first) == 1 else 1)
    for g, (right, left) in enumerate(zip(first, second, strict=True)):
        mid = x @ right.mT
        y = mid @ left.mT
        if len(places):
            y = torch.cat([mid, y], -1).index_select(-1, places[g].argsort())
        found.append(y + biases[g] if len(biases) else y)
    return found


def shared_group(sizes: Sequence[int]) -> int | None:
    """Inputs of a kernel's group: the largest power of two to 128 that divides the groups of all; None if below 32.

    32 codes of any width fill whole words of 32 bits.
    """
    return next((g for g in (128, 64, 32) if all(s % g == 0 for s in sizes)), None)


def _results(
    x: Tensor, ranks: Sequence[int], others: Sequence[int], places: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = [len(place) for place in places] if len(places) else others
    return [x.new_empty(len(x), rank) for rank in ranks], [x.new_empty(len(x), count) for count in outputs]


def _both(
    x: Tensor, first: Side, second: Side, mid: list[Tensor], y: list[Tensor], places: Sequence[Tensor],
    biases: Sequence[Tensor], first_tile: Tile, second_tile: Tile,
) -> None:  # fmt: skip
    placed = len(places) > 0
    _launch([x] * len(mid), first, Ends(mid, y, places, biases, placed), first_tile, ahead=False)
    after = [place[m.shape[1] :] for place, m in zip(places, mid, strict=True)] if placed else []
    read = mid * (len(y) if len(mid) == 1 else 1)
    _launch(read, second, Ends([], y, after, biases, True), second_tile, ahead=True)


def _three(tensors: Sequence[Any], fill: Any) -> list[Any]:
    return [*tensors, *[fill] * (MOST_LAYERS - len(tensors))]


def _launch(x: Sequence[Tensor], side: Side, ends: Ends, tile: Tile, *, ahead: bool) -> None:
    heights = _three([len(w) for w in side.weights], 0)
    blocks = sum(-(-height // tile.rows) for height in heights)
    if not blocks:
        return  # pivot layers of full rank have no other rows
    lines, placed = len(x[0]), len(ends.places) > 0
    assert lines <= MOST_LINES, f"{lines} rows; the kernels are for at most {MOST_LINES}"
    weights = [as_words(w) for w in side.weights] if side.bits else side.weights
    given: list[Any] = [
        *_three(x, x[0]), *_three(weights, weights[0]), *_three(ends.mid, x[0]), *_three(ends.y, ends.y[0]),
        *_three(ends.places, ends.places[0] if placed else x[0]), *_three(ends.biases, x[0]), *heights,
        *_three(side.widths, side.widths[0]), *_three([t.shape[1] for t in ends.y], ends.y[0].shape[1]), lines,
    ]  # fmt: skip
    flags: dict[str, Any] = {
        "RAW": len(ends.mid) > 0, "OUT": ends.out, "PLACED": placed, "BIAS": len(ends.biases) > 0,
        "BLOCK_N": tile.rows, "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if tile.pdl:
        flags["launch_pdl"] = True
    launch = _launch_plain if not side.bits else _launch_coded if lines == 1 else _launch_coded_rows
    with torch.cuda.device_of(x[0]):  # Triton launches on the current device, wherever the tensors are
        launch(given, flags, side, tile, blocks, ahead=ahead)


def _pdl(tile: Tile, *, ahead: bool) -> int:
    return (2 if ahead else 1) if tile.pdl else 0


def _launch_plain(given: list[Any], flags: dict[str, Any], side: Side, tile: Tile, blocks: int, *, ahead: bool) -> None:
    """Weights in 16 or 32 bits."""
    from spectrim.nn.kernels import plain

    x = given[0]
    kernel: Any = plain.matvec if len(x) == 1 else plain.few_rows
    gather = side.order is not None
    even = not gather and all(width % tile.columns == 0 for width in side.widths)
    given += [side.order if gather else x, x.shape[1]]
    kernel[(blocks,)](*given, GATHER=gather, EVEN=even, PDL=_pdl(tile, ahead=ahead), BLOCK_K=tile.columns, **flags)


def _launch_coded(given: list[Any], flags: dict[str, Any], side: Side, tile: Tile, blocks: int, *, ahead: bool) -> None:
    """One row: a program's groups of inputs beside each other."""
    from spectrim.nn.kernels import coded

    kernel: Any = coded.coded
    kernel[(blocks,)](
        *given, *_coded_extra(side), PDL=_pdl(tile, ahead=ahead), COUNT=8 if side.bits == 3 else 32 // side.bits,
        GROUPS=tile.columns, EVEN=all(width % (side.group * tile.columns) == 0 for width in side.widths),
        **_coded_flags(side), **flags,
    )  # fmt: skip


def _launch_coded_rows(
    given: list[Any], flags: dict[str, Any], side: Side, tile: Tile, blocks: int, *, ahead: bool
) -> None:
    """2 to 16 rows: inputs divided among warps and `tile.splits` programs."""
    from spectrim.nn.kernels import rows

    x, divided = given[0], tile.splits > 1
    assert not divided or blocks <= MOST_BLOCKS, f"{blocks} blocks; counts are for at most {MOST_BLOCKS}"
    part = x.new_empty(blocks * tile.splits * MOST_LINES * tile.rows if divided else 1, dtype=torch.float32)
    del flags["STAGES"]
    kernel: Any = rows.coded_rows
    kernel[(blocks * tile.splits,)](
        *given, *_coded_extra(side), part, counts_of(x.device) if divided else part, tile.splits,
        PDL=_pdl(tile, ahead=ahead), WARPS=tile.warps, DIVIDED=divided, **_coded_flags(side), **flags,
    )  # fmt: skip


def _coded_extra(side: Side) -> list[Any]:
    counts = [scales.shape[1] for scales in side.scales]
    return [*_three(side.scales, side.scales[0]), *_three(side.zeros, side.weights[0]), *_three(counts, counts[0])]


def _coded_flags(side: Side) -> dict[str, Any]:
    """SHARED: several of the kernel's groups have one scale."""
    shared = any(s.shape[1] * side.group < width for s, width in zip(side.scales, side.widths, strict=True))
    return {"SYMMETRIC": not len(side.zeros), "BITS": side.bits, "GROUP": side.group, "SHARED": shared}


def counts_of(device: torch.device) -> Tensor:
    """Counts of programs, all 0: a kernel that counts in them leaves 0.

    Kernels that run one after another share them: those of one stream, and those of all CUDA graphs of a device, which
    must not be replayed on two streams at once.
    """
    if device.type != "cuda":
        return _counts(device, None)
    of_graphs = _counts(device, None)  # made before the first graph: what is made in one is filled when it is replayed
    if torch.cuda.is_current_stream_capturing():
        return of_graphs
    return _counts(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _counts(device: torch.device, _stream: int | None) -> Tensor:
    return torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def as_words(codes: Tensor) -> Tensor:
    """Codes (N, bytes) uint8 as the int32 that the kernels read, not copied; `words_fit` says whether they can be."""
    return codes.view(torch.int32)


def words_fit(codes: Tensor) -> bool:
    """Whether every row starts at a word of 32 bits."""
    return codes.is_contiguous() and codes.shape[1] % 4 == 0 and codes.storage_offset() % 4 == 0
