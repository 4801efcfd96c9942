"""The kernel for 2 to 16 rows of weights in codes against float64, within what rounding allows; that it is chosen.

Without a CUDA device it runs in Triton's interpreter (`make kernels`), which has no bfloat16, no overlapping launches
and one program at a time: the tests marked `gpu` are of those.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spectrim.linalg.pivot import pack_mask
from spectrim.linalg.quantise import BITS, dequantise, pack, round_to_nearest
from spectrim.nn.kernels import choice, launch
from spectrim.nn.kernels.choice import CODED_LINES_TILES, choose
from spectrim.nn.kernels.few import FewRows, attach, group_of
from spectrim.nn.kernels.launch import MOST_LINES, Tile, coded_product, coded_products, counts_of, has_pdl, missing
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QuantisedFactorLinear, QuantisedPivotLinear
from spectrim.nn.stores_uniform import UniformStore

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if CUDA else torch.float16
TILE, SPLIT, TALL = Tile(32, 1, 4, 1), Tile(32, 1, 4, 1, splits=2), Tile(64, 1, 2, 1, splits=2)
needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).to(DEVICE)


class Coded(NamedTuple):
    """Weights of one width of codes, as the kernel reads them and in float64."""

    codes: list[Tensor]
    scales: list[Tensor]
    zeros: list[Tensor]
    exact: list[Tensor]

    def lost(self, index: int, x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """(M, 1): what float32 may lose in sums of scale (c + code) x over all inputs, c <= 1024 in 16 bits."""
        largest = 2**bits + (0 if dtype == torch.float32 else 1024)
        return 16 * 2.0**-24 * largest * self.scales[index].double().amax() * x.abs().sum(-1, keepdim=True)


def coded(
    seed: int, shapes: list[tuple[int, int]], bits: int, group: int, dtype: torch.dtype, *, symmetric: bool
) -> Coded:
    found = Coded([], [], [], [])
    for i, shape in enumerate(shapes):
        rounded = round_to_nearest(normal(seed + i, *shape), bits, group, symmetric=symmetric)
        rounded = rounded._replace(scales=rounded.scales.to(dtype))
        found.codes.append(pack(rounded.codes, bits))
        found.scales.append(rounded.scales)
        if rounded.zeros is not None:
            found.zeros.append(pack(rounded.zeros.flatten(), bits))
        found.exact.append(dequantise(rounded, bits, torch.float64))
    return found


def rounding(dtype: torch.dtype, *values: Tensor) -> Tensor:
    """What rounding each of the values to the dtype once may do."""
    return sum((value.abs() for value in values), torch.zeros_like(values[0])) * torch.finfo(dtype).eps / 2


@needs_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "symmetric", "group", "lines", "tile", "dtype"), [
    (640, False, 128, 3, TILE, HALF),  # five groups, four at a time
    (640, True, 0, 16, SPLIT, HALF),  # one scale for all of them
    (640, False, 64, 2, TALL, HALF),  # two programs take five groups each, two at a time
    (64, True, 32, 5, Tile(32, 1, 4, 1, splits=4), HALF),  # more programs than groups
    (320, False, 64, 4, TILE, torch.float32),
    *([(320, False, 64, 4, TILE, torch.float16)] if CUDA else []),
])  # fmt: skip
def test_one_product_is_that_of_float64_within_rounding(bits, inputs, symmetric, group, lines, tile, dtype):
    outputs = (40, 8, 33)  # no multiples of the rows of a program
    x = normal(0, lines, inputs, dtype=dtype)
    weights = coded(1, [(n, inputs) for n in outputs], bits, group, dtype, symmetric=symmetric)
    biases = [normal(20 + i, n, dtype=dtype) for i, n in enumerate(outputs)]
    found = coded_product(x, *weights[:3], biases, bits, group or 128, tile)
    for i, (got, bias) in enumerate(zip(found, biases, strict=True)):
        product = x.double() @ weights.exact[i].mT
        y = product + bias.double()
        allowed = weights.lost(i, x.double(), bits, dtype) + rounding(dtype, product, y)
        assert got.dtype == dtype
        assert bool(((got.double() - y).abs() <= 1.01 * allowed).all())
    if tile.splits > 1:
        assert not counts_of(x.device).any()  # left as they were found


@needs_triton
@pytest.mark.parametrize(("bits", "placed", "biased", "tile"), [
    (4, True, True, SPLIT), (3, False, True, TILE), (2, True, False, TALL), (8, True, True, TILE),
])  # fmt: skip
def test_two_products_put_pivots_and_others_in_their_places(bits, placed, biased, tile):
    inputs, outputs, ranks, dtype = 256, (150, 97), (64, 32), HALF
    x = normal(0, 4, inputs, dtype=dtype)
    first = coded(1, [(rank, inputs) for rank in ranks], bits, 128, dtype, symmetric=False)
    heights = [out - (rank if placed else 0) for out, rank in zip(outputs, ranks, strict=True)]
    second = coded(9, list(zip(heights, ranks, strict=True)), bits, 32, dtype, symmetric=False)
    shuffled = torch.Generator().manual_seed(5)
    places = [torch.randperm(out, generator=shuffled).int().to(DEVICE) for out in outputs] if placed else []
    biases = [normal(20 + i, out, dtype=dtype) for i, out in enumerate(outputs)] if biased else []
    found = coded_products(x, *first[:3], *second[:3], places, biases, [bits, bits], [128, 32], tile, SPLIT)
    for i, got in enumerate(found):
        mid = x.double() @ first.exact[i].mT
        off = first.lost(i, x.double(), bits, dtype) + rounding(dtype, mid)
        y = mid @ second.exact[i].mT
        allowed = off @ second.exact[i].abs().mT + second.lost(i, mid, bits, dtype) + rounding(dtype, y)
        if placed:
            back = places[i].argsort()
            y, allowed = torch.cat([mid, y], -1)[:, back], torch.cat([off, allowed], -1)[:, back]
        if biased:
            y = y + biases[i].double()
            allowed = allowed + rounding(dtype, y)
        assert bool(((got.double() - y).abs() <= 1.01 * allowed).all())


@needs_triton
def test_what_it_cannot_take_is_refused():
    weights = coded(1, [(40, 128)], 4, 128, HALF, symmetric=False)
    given = [*weights[:3], [], 4, 128]
    with pytest.raises(AssertionError, match="17 rows"):
        coded_product(normal(0, MOST_LINES + 1, 128, dtype=HALF), *given, TILE)


@needs_triton
def test_more_blocks_than_there_are_counts_are_refused(monkeypatch):
    weights = coded(1, [(40, 128)], 4, 128, HALF, symmetric=False)
    x = normal(0, 2, 128, dtype=HALF)
    monkeypatch.setattr(launch, "MOST_BLOCKS", 1)
    assert len(coded_product(x, *weights[:3], [], 4, 128, TILE)) == 1  # nothing is counted
    with pytest.raises(AssertionError, match="2 blocks"):
        coded_product(x, *weights[:3], [], 4, 128, SPLIT)


# ---------- layers


def store(seed: int, outputs: int, inputs: int, bits: int, group: int) -> UniformStore:
    rounded = round_to_nearest(normal(seed, outputs, inputs), bits, group, symmetric=False)
    return UniformStore.holding(rounded, bits=bits, group_size=group, dtype=HALF)


def layer_of(kind: str, bits: int):
    if kind == "packed":
        return PackedLinear.holding(store(1, 72, 128, bits, 64), None, normal(3, 72), dtype=HALF)
    if kind == "factor":
        return QuantisedFactorLinear.holding(store(1, 64, 128, bits, 128), store(2, 72, 64, bits, 64), None, dtype=HALF)
    chosen = pack_mask(torch.arange(72) % 9 < 4).to(DEVICE)  # 32 of 72
    return QuantisedPivotLinear.holding(
        store(1, 32, 128, bits, 64), store(2, 40, 32, bits, 32), chosen, normal(3, 72), dtype=HALF
    )


@needs_triton
@pytest.mark.parametrize(("kind", "bits"), [("packed", 3), ("factor", 4), ("pivot", 2)])
def test_it_is_chosen_for_two_rows_and_more_where_the_clock_says_so(kind, bits, monkeypatch):
    layer = layer_of(kind, bits)
    x = normal(4, 2, 5, 128, dtype=HALF)
    with torch.no_grad():
        before = layer(x)

    def clock(run, **_):
        return 1e-6 if isinstance(run()[0], list) else 1e-5

    monkeypatch.setattr(choice, "seconds_in_graph", clock)
    monkeypatch.setattr(choice, "CODED_LINES_TILES", CODED_LINES_TILES[:2])  # the interpreter takes its time
    (found,) = choose([[layer]], [10], pdl=False)
    assert found.note == ""
    assert found.tiles is not None
    assert set(found.tiles) <= set(CODED_LINES_TILES)
    with torch.no_grad():
        assert layer.few.takes(x)
        assert not layer.few.takes(x[0])
        made = layer(x)
    assert made.shape == before.shape
    assert float((made.double() - before.double()).norm() / before.double().norm()) < 4 * torch.finfo(HALF).eps


# ---------- on a GPU


@pytest.mark.gpu
@needs_cuda
def test_every_stream_counts_for_itself_and_graphs_together():
    device = torch.device("cuda", 0)
    here = counts_of(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        there = counts_of(device)
    found = []
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found.append(counts_of(device))
            found[-1].sum()
    assert here is counts_of(device)
    assert there is not here
    assert found[0] is found[1]
    assert found[0] is not here


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_layers_on_another_than_the_current_device():
    with torch.cuda.device(1):
        (group, _) = groups_on_gpu(4)
        layer, x = group.layers[0], normal(5, 4, 4096, dtype=HALF).to("cuda")
    tile = CODED_LINES_TILES[-1]
    with torch.no_grad():
        expected = layer.to("cuda:1")(x.to("cuda:1")).double()
        made = group.all_of(x.to("cuda:1"), (tile, tile))[0].double()
    assert float((made - expected).norm() / expected.norm()) < 0.02


def groups_on_gpu(bits: int) -> list[FewRows]:
    """A pivot layer and a whole weight, of sizes for which many programs run at once."""
    mask = torch.zeros(4096, dtype=torch.bool)
    mask[torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:1024]] = True
    pivots = QuantisedPivotLinear.holding(
        store(1, 1024, 4096, bits, 128), store(2, 3072, 1024, bits, 128), pack_mask(mask).to(DEVICE), None, dtype=HALF
    )
    whole = PackedLinear.holding(store(3, 4096, 11008, bits, 128), None, None, dtype=HALF)
    return [group_of([pivots], {}), group_of([whole], {})]


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", CODED_LINES_TILES)
@torch.no_grad()
def test_every_tile_gives_the_same_bits_each_time(bits, tile):
    tiles = [(tile, tile), *([(tile._replace(pdl=1),) * 2] if has_pdl(DEVICE) else [])]
    for group in groups_on_gpu(bits):
        layer = group.layers[0]
        x = normal(5, MOST_LINES, layer.in_features, dtype=HALF)
        expected = layer(x).double()
        made = [group.all_of(x, pair)[0] for pair in tiles for _ in range(20)]
        assert all(torch.equal(made[0], again) for again in made)
        assert float((made[0].double() - expected).norm() / expected.norm()) < 0.02
        assert not counts_of(x.device).any()


@pytest.mark.gpu
@needs_cuda
@needs_triton
@torch.no_grad()
def test_a_graph_of_overlapping_launches_gives_the_same_bits():
    tile = Tile(32, 1, 4, 1, pdl=int(has_pdl(DEVICE)), splits=4)
    groups = groups_on_gpu(4)
    for group in groups:
        group.tiles[8] = (tile, tile)
        attach(group)
    xs = [normal(6 + i, 8, group.layers[0].in_features, dtype=HALF) for i, group in enumerate(groups)]

    def run() -> list[Tensor]:
        return [group.layers[0](x) for group, x in zip(groups, xs, strict=True) for _ in range(4)]

    alone = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(alone, made, strict=True))
