"""Which layers decode by the kernels: those for which a clock on this device says so.

Layers of the same shapes are timed together, one after the other in one CUDA graph, so that weights come from memory
and not from the cache as they do in use. The torch products are a candidate like the tiles. Dense weights of the same
shapes are timed beside them: a layer may be at its best and still slower than what it replaced.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.few import CODED, WHOLE, FewRows, Tiles, attach, group_of, unsuited
from spectrim.nn.kernels.launch import MOST_LAYERS, MOST_LINES, Tile

MATVEC_TILES = (Tile(2, 1024, 4, 1), Tile(4, 512, 4, 3), Tile(4, 1024, 4, 2), Tile(8, 512, 4, 3), Tile(1, 2048, 4, 2), Tile(8, 1024, 8, 2))  # noqa: E501  # fmt: skip
LINES_TILES = (Tile(16, 256, 4, 3), Tile(16, 512, 4, 3), Tile(32, 256, 4, 3), Tile(16, 512, 8, 2))
CODED_TILES = tuple(
    Tile(*sizes, 1)
    for sizes in ((8, 8, 4), (16, 8, 4), (16, 4, 2), (8, 4, 2), (4, 8, 2), (8, 16, 4), (32, 4, 4), (2, 8, 1))
)
CODED_LINES_TILES = tuple(Tile(32, 1, 4, 1, splits=splits) for splits in (1, 2, 4, 8))
"""Two kernels to compile for each of a layer's products: `splits` above 1 share one."""
TIMED_GROUPS = 12
"""Groups of the same shapes in one timing, at most: more tell nothing new."""
MARGIN = 0.98
"""The kernels must take less than this share of the time of torch."""
COLD = 2**28
"""Bytes of dense weights in one timing, to which at most a group is added: several times the cache of an H200."""


class Choice(NamedTuple):
    """What was measured for groups of one shape and one number of rows."""

    shapes: tuple[Any, ...]
    lines: int
    groups: int
    torch_us: float
    kernel_us: float | None  # None: there is none, or none ran
    tiles: Tiles | None  # None: torch is kept
    note: str = ""
    dense_us: float | None = None  # None: there was no memory for dense weights

    @property
    def kernel(self) -> bool:
        return self.tiles is not None

    @property
    def slower_than_dense(self) -> bool:
        """Whether what is used takes longer than the weights it replaced."""
        used = self.torch_us if self.tiles is None or self.kernel_us is None else self.kernel_us
        return self.dense_us is not None and used > self.dense_us


def shapes_of(layers: Sequence[StoredLinear]) -> tuple[Any, ...]:
    """What decides about speed: codec and shapes of all tensors."""
    return tuple(
        (layer.codec, layer.out_features, layer.in_features, layer.rank, *sorted(layer.shapes().items()))
        for layer in layers
    )


def seconds_in_graph(run: Callable[[], Any], *, replays: int = 5, rounds: int = 3) -> float:
    """Median seconds of `run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    took = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3 / replays)
    return sorted(took)[rounds // 2]


def dense_us(groups: Sequence[Sequence[StoredLinear]], x: Tensor) -> float | None:
    """Microseconds of x (M, I) times dense weights (O, I) of one group's shapes; None where they find no memory.

    As many groups as are given, or as hold `COLD` bytes.
    """
    size = sum(layer.out_features * layer.in_features for layer in groups[0]) * x.element_size()
    copies = min(len(groups), -(-COLD // size))
    try:
        weights = [x.new_zeros(la.out_features, la.in_features) for some in groups[:copies] for la in some]
    except torch.cuda.OutOfMemoryError:
        return None
    return seconds_in_graph(lambda: [nn.functional.linear(x, weight) for weight in weights]) / copies * 1e6


def choose(groups: Iterable[Sequence[StoredLinear]], lines: Sequence[int], *, pdl: bool) -> list[Choice]:
    """Time each kind of group for each number of rows and attach the kernels where they win."""
    kinds: dict[tuple[Any, ...], list[FewRows]] = {}
    for layers in groups:
        for part in (layers[i : i + MOST_LAYERS] for i in range(0, len(layers), MOST_LAYERS)):
            if unsuited(part) is None:
                kinds.setdefault(shapes_of(part), []).append(group_of(part, {}))
    choices = []
    for shapes, members in kinds.items():
        for count in lines:
            assert count <= MOST_LINES
            found = _measured(shapes, members, count, pdl=pdl)
            choices.append(found)
            if found.tiles is not None:
                for group in members:
                    group.tiles[count] = found.tiles
        for group in members:
            if group.tiles:
                attach(group)
    return choices


def _measured(shapes: tuple[Any, ...], members: list[FewRows], count: int, *, pdl: bool) -> Choice:
    timed = members[:TIMED_GROUPS]
    layer = timed[0].layers[0]
    like = next(layer.parameters())
    x = torch.randn(count, layer.in_features, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        torch_s = seconds_in_graph(lambda: [member(x) for group in timed for member in group.layers]) / len(timed)
        expected = [member(x).float() for member in timed[0].layers]

        def clock(tiles: Tiles) -> float:
            try:
                made = timed[0].all_of(x, tiles)
                if any(differs(a, b) for a, b in zip(made, expected, strict=True)):
                    notes.append(f"wrong numbers with {tiles}")
                    return float("inf")
                return seconds_in_graph(lambda: [group.all_of(x, tiles) for group in timed]) / len(timed)
            except Exception as error:  # a tile that this device or this Triton cannot take
                notes.append(f"{tiles}: {type(error).__name__}: {str(error)[:200]}")
                return float("inf")

        notes: list[str] = []
        best, least = _search(clock, _tiles_for(layer, count), pdl=pdl, one=isinstance(layer, WHOLE))
        dense = dense_us([group.layers for group in timed], x)
    won = least < MARGIN * torch_s
    return Choice(
        shapes, count, len(members), torch_s * 1e6, least * 1e6 if least < float("inf") else None,
        best if won else None, "; ".join(dict.fromkeys(notes)), dense,
    )  # fmt: skip


def _tiles_for(layer: StoredLinear, count: int) -> Sequence[Tile]:
    if isinstance(layer, CODED + WHOLE):
        return CODED_TILES if count == 1 else CODED_LINES_TILES
    return MATVEC_TILES if count == 1 else LINES_TILES


def _search(
    clock: Callable[[Tiles], float], tiles: Sequence[Tile], *, pdl: bool, one: bool = False
) -> tuple[Tiles, float]:
    """The same tile for both products, then each for itself (unless there is `one`), then overlapping launches."""
    found = {(tile, tile): clock((tile, tile)) for tile in tiles}
    for side in () if one else (0, 1):
        best = min(found, key=lambda pair: found[pair])
        for tile in tiles:
            pair = (tile, best[1]) if side == 0 else (best[0], tile)
            if pair not in found:
                found[pair] = clock(pair)
    if pdl:
        best = min(found, key=lambda pair: found[pair])
        overlapping = (best[0]._replace(pdl=1), best[1]._replace(pdl=1))
        found[overlapping] = clock(overlapping)
    best = min(found, key=lambda pair: found[pair])
    return best, found[best]


def differs(a: Tensor, b: Tensor) -> bool:
    """More than rounding explains: bfloat16 has 8 bits, and the results of torch are rounded too."""
    missed = (a.float() - b).norm() / b.norm().clamp(min=1e-30)
    return not bool(missed < 0.02)  # NaN differs
