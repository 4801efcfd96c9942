"""Kernels for few rows against float64, within what rounding allows; layers that use them; the choice between forms.

Without a CUDA device they run in Triton's interpreter (TRITON_INTERPRET=1, set in conftest.py), which has no bfloat16.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from spectrim.linalg.factor import Factors
from spectrim.linalg.pivot import pack_mask
from spectrim.linalg.quantise import BITS, dequantise, pack, round_to_nearest
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels import choice, launch
from spectrim.nn.kernels.choice import Choice, choose, shapes_of
from spectrim.nn.kernels.few import attach, group_of, unsuited
from spectrim.nn.kernels.launch import (
    Tile,
    coded_product,
    coded_products,
    missing,
    products,
    products_in_torch,
    shared_group,
    words_fit,
)
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QuantisedFactorLinear, QuantisedPivotLinear
from spectrim.nn.shared import InputPivots, SharedLinear, SharedPivotLinear
from spectrim.nn.stores import PlainStore
from spectrim.nn.stores_uniform import UniformStore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ONE, SOME, CODED = Tile(32, 32, 4, 2), Tile(32, 64, 4, 2), Tile(32, 2, 4, 2)
INPUTS, OUTPUTS, RANKS = 72, (40, 24, 33), (16, 8, 11)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).to(DEVICE)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def allowed(x: Tensor, first: Tensor, second: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding may do to y, all in float64: to the middle, to the result, and in float32 sums of any order."""
    middle = (x @ first.mT).abs()
    sums = x.abs() @ first.abs().mT
    terms = (first.shape[1] + second.shape[1] + 8) * 2.0**-24
    lost = unit(dtype) * middle + terms * sums
    through = lost @ second.abs().mT + terms * (middle @ second.abs().mT)
    most = torch.zeros_like(y)
    most[:, : through.shape[1]] = through
    # Whatever stands where (pivots are the middle itself), no output is off by more than the worst of its line.
    worst = torch.maximum(most.amax(-1, keepdim=True), lost.amax(-1, keepdim=True))
    return worst + 2 * unit(dtype) * (y.abs() + 4)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lines", [1, 3])
@pytest.mark.parametrize(("placed", "biased"), [(False, True), (True, False), (True, True)])
def test_products_are_those_of_float64_within_rounding(dtype, lines, placed, biased):
    x = normal(0, lines, INPUTS, dtype=dtype)
    first = [normal(i, rank, INPUTS, dtype=dtype) / 8 for i, rank in enumerate(RANKS)]
    second = [normal(9 + i, out - (rank if placed else 0), rank, dtype=dtype) / 4
              for i, (out, rank) in enumerate(zip(OUTPUTS, RANKS, strict=True))]  # fmt: skip
    shuffled = torch.Generator().manual_seed(5)
    places = [torch.randperm(out, generator=shuffled).int().to(DEVICE) for out in OUTPUTS] if placed else []
    biases = [normal(20 + i, out, dtype=dtype) for i, out in enumerate(OUTPUTS)] if biased else []
    tile = ONE if lines == 1 else SOME
    found = products(x, first, second, places, biases, tile, tile)
    wide = [[t.double() for t in tensors] for tensors in (first, second, biases)]
    expected = products_in_torch(x.double(), wide[0], wide[1], places, wide[2])
    for got, y, right, left in zip(found, expected, wide[0], wide[1], strict=True):
        assert got.dtype == dtype
        assert bool(((got.double() - y).abs() <= allowed(x.double(), right, left, y, dtype)).all())


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lines", [1, 3])
@pytest.mark.parametrize("pivoted", [False, True])
def test_one_first_product_serves_all_layers_that_share_it(dtype, lines, pivoted):
    rank, biased = 40, lines == 1  # more than a tile has rows, so that the last one is not full
    x = normal(0, lines, INPUTS, dtype=dtype)
    first = normal(1, rank, INPUTS - (rank if pivoted else 0), dtype=dtype) / 8
    second = [normal(9 + i, out, rank, dtype=dtype) / 4 for i, out in enumerate(OUTPUTS)]
    biases = [normal(20 + i, out, dtype=dtype) for i, out in enumerate(OUTPUTS)] if biased else []
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(5)).int().to(DEVICE) if pivoted else None
    tile = ONE if lines == 1 else SOME
    found = products(x, [first], second, [], biases, tile, tile, order)
    wide = [first.double()]
    if order is not None:  # written out: column order[i] of the whole factor
        whole = torch.zeros(rank, INPUTS, dtype=torch.float64, device=DEVICE)
        for i, column in enumerate(order.tolist()):
            whole[:, column] = (
                torch.eye(rank, dtype=torch.float64, device=DEVICE)[i] if i < rank else first[:, i - rank].double()
            )
        wide = [whole]
    expected = [x.double() @ wide[0].mT @ left.double().mT for left in second]
    expected = [y + bias.double() for y, bias in zip(expected, biases, strict=True)] if biased else expected
    twin = products_in_torch(
        x.double(), [first.double()], [w.double() for w in second], [], [b.double() for b in biases], order
    )
    assert len(found) == len(second)
    for got, y, own, left in zip(found, expected, twin, second, strict=True):
        assert torch.allclose(own, y, atol=1e-12)
        assert bool(((got.double() - y).abs() <= allowed(x.double(), wide[0], left.double(), y, dtype)).all())


@needs_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("symmetric", "group", "lines", "placed"), [(False, 32, 1, True), (True, 0, 2, False)])
def test_products_of_codes_are_those_of_the_weights_they_stand_for(bits, symmetric, group, lines, placed):
    inputs, outputs, ranks = 64, (72, 40), (32, 32)
    x = normal(0, lines, inputs)
    sides: list[list[Tensor]] = []
    weights: list[list[Tensor]] = []
    for side, widths in enumerate(((inputs, inputs), ranks)):
        heights = ranks if side == 0 else [o - (r if placed else 0) for o, r in zip(outputs, ranks, strict=True)]
        rounded = [
            round_to_nearest(normal(9 * side + i, n, k), bits, group, symmetric=symmetric)
            for i, (n, k) in enumerate(zip(heights, widths, strict=True))
        ]
        zeros = [pack(r.zeros.flatten(), bits) for r in rounded if r.zeros is not None]
        sides += [[pack(r.codes, bits) for r in rounded], [r.scales for r in rounded], zeros]
        weights.append([dequantise(r, bits, torch.float64) for r in rounded])
    places = [torch.arange(out, device=DEVICE).flip(0).int() for out in outputs] if placed else []
    size = shared_group([group or 64, group or 32])
    assert size == 32
    found = coded_products(x, *sides, places, [], [bits, bits], [size, size], CODED, CODED)
    expected = products_in_torch(x.double(), *weights, places, [])
    for got, y, right, left in zip(found, expected, *weights, strict=True):
        # The kernel sums codes and inputs apart: terms are larger than products by the zeros.
        bound = 4 * 2**bits * allowed(x.double(), right, left, y, torch.float32)
        assert bool(((got.double() - y).abs() <= bound).all())


@needs_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lines", [1, 3])
@pytest.mark.parametrize(("symmetric", "group", "tile"), [
    (False, 32, Tile(16, 2, 4, 1)),  # five groups, two at a time: some are not there
    (True, 0, Tile(16, 1, 4, 2)),  # five groups of the kernel share a scale
])  # fmt: skip
def test_a_product_of_one_weight_in_codes(bits, lines, symmetric, group, tile):
    inputs, outputs = 160, (40, 24)
    x = normal(0, lines, inputs)
    rounded = [round_to_nearest(normal(i + 1, n, inputs), bits, group, symmetric=symmetric)
               for i, n in enumerate(outputs)]  # fmt: skip
    biases = [normal(5 + i, n) for i, n in enumerate(outputs)]
    zeros = [pack(r.zeros.flatten(), bits) for r in rounded if r.zeros is not None]
    found = coded_product(
        x, [pack(r.codes, bits) for r in rounded], [r.scales for r in rounded], zeros, biases, bits, 32, tile
    )
    for got, r, bias in zip(found, rounded, biases, strict=True):
        weight = dequantise(r, bits, torch.float64)
        y = x.double() @ weight.mT + bias.double()
        terms = 2**bits * r.scales.double().amax() * x.double().abs().sum(-1, keepdim=True)
        assert bool(((got.double() - y).abs() <= 64 * 2.0**-24 * (terms + y.abs() + 4)).all())


def test_groups_of_a_kernel_are_powers_of_two_that_divide_all():
    assert shared_group([128, 128]) == 128
    assert shared_group([128, 96]) == 32
    assert shared_group([11008]) == 128  # a whole row in one group of the file: at most 128 at a time
    assert shared_group([48]) is None


# ---------- layers


def pivot(seed: int, outputs: int, rank: int, *, bias: bool = False) -> PivotLinear:
    layer = PivotLinear(INPUTS, outputs, rank, bias=bias, device=DEVICE)
    mask = torch.zeros(outputs, dtype=torch.bool)
    mask[torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))[:rank]] = True
    layer.mask.copy_(pack_mask(mask))
    layer.refresh_order()
    return layer


def sharing(kind: str) -> list[StoredLinear]:
    """Three that share a factor; R inputs pass as they are in pivot storage."""
    cls = SharedPivotLinear if kind == "shared-pivot" else SharedLinear
    given = {"bias": True, "device": DEVICE}
    layers: list[SharedLinear] = [cls(INPUTS, OUTPUTS[0], 20, **given)]
    layers += [cls(INPUTS, out, 20, basis="first", **given) for out in OUTPUTS[1:]]
    for layer in layers[1:]:
        layer.borrow(layers[0])
    if isinstance(basis := layers[0].V, InputPivots):
        mask = torch.zeros(INPUTS, dtype=torch.bool)
        mask[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(3))[:20]] = True
        basis.mask.copy_(pack_mask(mask))
        basis.refresh_order()
    return [*layers]


def siblings(kind: str) -> list[StoredLinear]:
    if kind.startswith("shared"):
        return sharing(kind)
    if kind == "pivot":
        return [pivot(i, out, rank, bias=True) for i, (out, rank) in enumerate(zip(OUTPUTS, RANKS, strict=True))]
    return [LowRankLinear(INPUTS, out, rank, bias=False, device=DEVICE)
            for out, rank in zip(OUTPUTS, RANKS, strict=True)]  # fmt: skip


@needs_triton
@pytest.mark.parametrize("kind", ["factor", "pivot", "shared", "shared-pivot"])
def test_layers_of_a_group_are_computed_once_and_give_what_they_gave(kind, monkeypatch):
    layers = siblings(kind)
    x = normal(1, 1, 1, INPUTS)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
    calls = []
    real = launch.products
    monkeypatch.setattr("spectrim.nn.kernels.few.products", lambda *given: (calls.append(1), real(*given))[1])
    attach(group_of(layers, {1: (ONE, ONE)}))
    with torch.no_grad():
        for _ in range(2):
            for layer, y in zip(layers, before, strict=True):
                torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2
        other = normal(2, 1, 1, INPUTS)
        first = layers[0](x)
        torch.testing.assert_close(layers[1](other), copy.deepcopy(layers[1])(other))  # not what x left behind
        torch.testing.assert_close(first, before[0], rtol=1e-5, atol=1e-5)


@needs_triton
def test_other_numbers_of_rows_and_gradients_take_the_torch_products():
    layers = siblings("factor")
    attach(group_of(layers, {1: (ONE, ONE)}))
    few = layers[0].few
    with torch.no_grad():
        assert few.takes(normal(0, 1, 1, INPUTS))
        assert not few.takes(normal(0, 2, INPUTS))
    x = normal(0, 1, INPUTS).requires_grad_()
    layers[0](x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


class Doubled(nn.Module):
    """As an adapter does: the layer is inside, and its weight is seen from outside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias  # type: ignore[return-value]  any attribute, to the checker

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize(("kind", "part"), [("factor", "U"), ("pivot", "rest"), ("shared", "V"), ("shared-pivot", "U")])
def test_what_is_wrapped_around_a_factor_later_counts(kind, part):
    layers, x = siblings(kind), normal(1, 1, 1, INPUTS)
    attach(group_of(layers, {1: (ONE, ONE)}))
    with torch.no_grad():
        assert layers[-1].few.takes(x)
        handle = getattr(layers[0], part).register_forward_hook(lambda *given: None)
        assert not layers[-1].few.takes(x)
        handle.remove()
        before = copy.deepcopy(layers)
        for layer in before:
            layer.few = None
        for owner in (layers[0], before[0]):
            setattr(owner, part, Doubled(getattr(owner, part)))
        for layer, plain in zip(layers, before, strict=True):
            torch.testing.assert_close(layer(x), plain(x))


@needs_triton
def test_a_group_is_no_part_of_what_is_saved_and_copies_with_its_model():
    layers = siblings("pivot")
    model = nn.ModuleList(layers)
    keys = list(model.state_dict())
    attach(group_of(layers, {1: (ONE, ONE)}))
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    assert all(member in list(copied) for member in copied[0].few.layers)


def uniform(seed: int, outputs: int, inputs: int, group: int = 32) -> UniformStore:
    return UniformStore.holding(
        round_to_nearest(normal(seed, outputs, inputs), 4, group, symmetric=False),
        bits=4, group_size=group, dtype=torch.float32,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("kind", ["factor", "pivot"])
def test_quantised_layers_give_what_they_gave(kind):
    if kind == "factor":
        layer: StoredLinear = QuantisedFactorLinear.holding(
            uniform(1, 32, 64), uniform(2, 40, 32), None, dtype=torch.float32
        )
    else:
        mask = pack_mask(torch.arange(72) % 9 < 4).to(DEVICE)  # 32 of 72
        layer = QuantisedPivotLinear.holding(
            uniform(1, 32, 64), uniform(2, 40, 32), mask, normal(3, 72), dtype=torch.float32
        )
    x = normal(4, 1, 64)
    with torch.no_grad():
        before = layer(x)
        attach(group_of([layer], {1: (CODED, CODED)}))
        assert layer.few.takes(x)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("lines", [1, 4])
def test_packed_layers_give_what_they_gave_and_add_their_correction(lines):
    factors = Factors(normal(5, 40, 3), normal(6, 3, 64))
    layers = [PackedLinear.holding(uniform(i, 40, 64), given, normal(7, 40), dtype=torch.float32)
              for i, given in ((1, None), (2, factors))]  # fmt: skip
    x = normal(4, 1, lines, 64)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
        attach(group_of(layers, {lines: (CODED, CODED)}))
        for layer, y in zip(layers, before, strict=True):
            assert layer.few.takes(x)
            torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_codes_are_read_as_words_where_rows_start_at_one():
    codes = torch.zeros(5, 16, dtype=torch.uint8)
    assert words_fit(codes)
    assert not words_fit(codes[:, :12])
    assert not words_fit(torch.zeros(81, dtype=torch.uint8)[1:].view(5, 16))
    assert not words_fit(torch.zeros(5, 6, dtype=torch.uint8))
    layer = PackedLinear.holding(uniform(1, 40, 64), None, None, dtype=torch.float32)
    assert unsuited([layer]) is None
    layer.base.codes = torch.zeros(40 * 32 + 1, dtype=torch.uint8, device=DEVICE)[1:].view(40, 32)
    assert "words of 32 bits" in str(unsuited([layer]))
    half = PackedLinear.holding(PlainStore.holding(normal(1, 40, 64)), None, None, dtype=torch.float32)
    assert "no kernel for these stores: plain" in str(unsuited([half]))


def test_layers_without_a_kernel_are_told_apart():
    factor, other = siblings("factor"), siblings("pivot")
    assert unsuited(factor) is None
    assert "no kernel for factor, pivot" in str(unsuited([factor[0], other[0]]))
    odd = QuantisedFactorLinear.holding(uniform(1, 8, 48, 16), uniform(2, 40, 8, 0), None, dtype=torch.float32)
    assert "32 does not divide" in str(unsuited([odd]))
    plain = QuantisedFactorLinear.holding(
        PlainStore.holding(normal(1, 32, 64)), uniform(2, 40, 32), None, dtype=torch.float32
    )
    assert "no kernel for these stores" in str(unsuited([plain]))


# ---------- the choice


@needs_triton
@pytest.mark.parametrize("kernel_wins", [True, False])
def test_the_kernels_are_attached_where_the_clock_says_so(kernel_wins, monkeypatch):
    fast = Tile(64, 64, 4, 1)
    monkeypatch.setattr(choice, "MATVEC_TILES", (ONE, fast))
    seen: list[str] = []

    def clock(run, **_):
        made = run()
        by_kernels = isinstance(made[0], list)
        seen.append("kernels" if by_kernels else "torch")
        return (0.5 if kernel_wins else 1.0) * 1e-5 if by_kernels else 1e-5

    monkeypatch.setattr(choice, "seconds_in_graph", clock)
    layers = siblings("factor")
    (found,) = choose([layers], [1], pdl=False)
    assert isinstance(found, Choice)
    assert found.shapes == shapes_of(layers)
    assert seen[0] == "torch"
    assert "kernels" in seen
    assert found.kernel is kernel_wins
    assert found.dense_us == pytest.approx(10.0)
    assert not found.slower_than_dense
    assert all((layer.few is not None) is kernel_wins for layer in layers)


@needs_triton
def test_a_tile_that_gives_wrong_numbers_is_not_taken(monkeypatch):
    monkeypatch.setattr(choice, "MATVEC_TILES", (ONE,))
    monkeypatch.setattr(choice, "seconds_in_graph", lambda run, **_: 1e-5 if run() else 0.0)
    layers = siblings("factor")
    monkeypatch.setattr("spectrim.nn.kernels.few.products", lambda x, first, second, *_: [
        x.new_full((len(x), len(w)), torch.nan) for w in second
    ])  # fmt: skip
    (found,) = choose([layers], [1], pdl=False)
    assert not found.kernel
    assert "wrong numbers" in found.note
    assert layers[0].few is None


def test_the_search_takes_the_best_pair_of_tiles():
    slow, wide, tall = Tile(1, 1, 1, 1), Tile(2, 2, 2, 1), Tile(4, 4, 4, 1)
    cost = {slow: 3.0, wide: 1.0, tall: 2.0}

    def clock(tiles):
        first, second = (tile._replace(pdl=0) for tile in tiles)
        overlapping = -0.1 if tiles[0].pdl else 0.0
        return cost[first] + (5 - cost[second]) + overlapping

    alone, _ = choice._search(lambda tiles: cost[tiles[0]], (slow, wide, tall), pdl=False, one=True)
    assert alone == (wide, wide)  # one product: no pairs of different tiles
    best, least = choice._search(clock, (slow, wide, tall), pdl=True)
    assert best == (wide._replace(pdl=1), slow._replace(pdl=1))
    assert least == pytest.approx(2.9)
