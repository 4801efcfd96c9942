"""Outputs of pivot layers in their places, many rows at once: kernels against the layer's own forward, and the choice.

Without a CUDA device the kernels run in Triton's interpreter (`make kernels`); the choice is tested without Triton.
"""

import pytest
import torch
from torch import Tensor

from spectrim.linalg.pivot import pack_mask
from spectrim.linalg.quantise import round_to_nearest
from spectrim.nn.kernels import choice, many
from spectrim.nn.kernels.choice import shapes_of
from spectrim.nn.kernels.launch import Tile, missing
from spectrim.nn.kernels.many import ManyRows, choose_many, form_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.quantised import QuantisedPivotLinear
from spectrim.nn.stores_uniform import UniformStore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TILES = {"merge": Tile(16, 32, 4, 1), "scatter": Tile(32, 16, 4, 2)}
INPUTS, OUTPUTS, ROWS = 24, 53, 70


def mask(rank: int) -> Tensor:
    chosen = torch.zeros(OUTPUTS, dtype=torch.bool)
    chosen[torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(rank))[:rank]] = True
    return pack_mask(chosen)


def pivot(rank: int = 17, *, bias: bool = True) -> PivotLinear:
    torch.manual_seed(rank)
    layer = PivotLinear(INPUTS, OUTPUTS, rank, bias=bias)
    layer.mask.copy_(mask(rank))
    layer.refresh_order()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer.to(DEVICE)


def quantised() -> QuantisedPivotLinear:
    def store(outputs: int, inputs: int) -> UniformStore:
        rounded = round_to_nearest(torch.randn(outputs, inputs), 4, 0, symmetric=True)
        return UniformStore.holding(rounded, bits=4, group_size=0, dtype=torch.float32)

    torch.manual_seed(3)
    layer = QuantisedPivotLinear.holding(
        store(17, INPUTS), store(OUTPUTS - 17, 17), mask(17), torch.randn(OUTPUTS), dtype=torch.float32
    )
    return layer.to(DEVICE)


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(2, count // 2, INPUTS, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("form", ["merge", "scatter"])
@pytest.mark.parametrize("make", [pivot, lambda: pivot(bias=False), lambda: pivot(INPUTS), quantised])
@torch.no_grad()
def test_kernels_give_what_the_layer_gives(form, make):
    layer, x = make(), rows()
    wide = (x.double() @ layer.dense_weight().double().mT).float()
    expected = wide if layer.bias is None else wide + layer.bias
    layer.many = form_of(layer, form, TILES[form], least=ROWS)
    assert layer.many.takes(x)
    y = layer(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@needs_triton
@torch.no_grad()
def test_a_layer_whose_every_output_is_a_pivot():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = PivotLinear(64, 8, 8, bias=False)
    layer.mask.copy_(pack_mask(torch.ones(8, dtype=torch.bool)))
    layer.refresh_order()
    layer = layer.to(DEVICE)
    x = torch.randn(5, 64, device=DEVICE)
    expected = layer(x)
    for form in ("merge", "scatter"):
        layer.many = form_of(layer, form, TILES[form], least=1)
        torch.testing.assert_close(layer(x), expected)


# ---------- the choice, with plain torch in the place of the kernels


@pytest.fixture
def in_torch(monkeypatch):
    def merged(pivots, others, order, bias, tile):
        return sum(bias, torch.cat([pivots, others], -1)[:, order.long()])

    def scattered(pivots, second, places, bias, tile):
        y = pivots.new_empty(len(pivots), len(places))
        y[:, places.long()] = torch.cat([pivots, pivots @ second.mT], -1)
        return sum(bias, y)

    monkeypatch.setattr(many, "merged", merged)
    monkeypatch.setattr(many, "scattered", scattered)


def clock(monkeypatch, seconds: dict[str, float]) -> None:
    """Each form takes so long; `seconds` by form, "torch" for the layer itself, "dense" for its whole weight."""

    def timed(run, **_):
        run()
        at = run.__defaults__
        return seconds["torch" if at is None else at[0][0][0].form]

    def of_dense(run, **_):
        run()
        return seconds.get("dense", 2.0)

    monkeypatch.setattr(many, "seconds_in_graph", timed)
    monkeypatch.setattr(choice, "seconds_in_graph", of_dense)


@pytest.mark.parametrize(("merge", "chosen"), [(0.5, "merge"), (0.97, "merge"), (0.99, None), (2.0, None)])
def test_the_quickest_form_is_attached_where_it_beats_torch(merge, chosen, monkeypatch, in_torch):
    clock(monkeypatch, {"torch": 1.0, "merge": merge})
    layers = [pivot(), pivot()]
    (found,) = choose_many([*layers, LowRankLinear(INPUTS, OUTPUTS, 4, bias=False)], ROWS)
    assert found.shapes == shapes_of([layers[0]])
    assert (found.groups, found.lines, found.kernel) == (2, ROWS, chosen is not None)
    for layer in layers:
        if chosen is None:
            assert layer.many is None
        else:
            assert (layer.many.form, layer.many.least) == (chosen, ROWS // 2)
            assert f"outputs by {chosen}" in found.note


def test_in_16_bits_the_second_product_may_write_to_its_places(monkeypatch, in_torch):
    clock(monkeypatch, {"torch": 1.0, "merge": 0.8, "scatter": 0.6})
    layer = pivot().to(torch.bfloat16)
    (found,) = choose_many([layer], ROWS)
    assert layer.many.form == "scatter"
    assert found.kernel_us == pytest.approx(0.6e6)
    with torch.no_grad():
        x = rows().to(torch.bfloat16)
        made = layer(x)
        layer.many = None
        torch.testing.assert_close(made, layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("merge", "dense", "slower"), [(0.5, 0.6, False), (0.5, 0.4, True), (2.0, 0.9, True)])
def test_a_choice_says_what_dense_weights_would_take(merge, dense, slower, monkeypatch, in_torch):
    clock(monkeypatch, {"torch": 1.0, "merge": merge, "dense": dense})
    (found,) = choose_many([pivot()], ROWS)
    assert found.dense_us == pytest.approx(dense * 1e6)
    assert found.slower_than_dense is slower
    assert not found._replace(dense_us=None).slower_than_dense  # not known


def test_dense_weights_have_the_shapes_of_the_layers_and_no_more_memory_than_told(monkeypatch):
    seen = []

    def timed(run, **_):
        seen.append([tuple(y.shape) for y in run()])
        return 3e-6

    monkeypatch.setattr(choice, "seconds_in_graph", timed)
    groups = [[pivot(), LowRankLinear(INPUTS, 7, 4, bias=False)]] * 3
    x = rows().flatten(0, 1)
    assert choice.dense_us(groups, x) == pytest.approx(1.0)
    assert seen == [[(ROWS, OUTPUTS), (ROWS, 7)] * 3]
    monkeypatch.setattr(choice, "COLD", 4 * INPUTS * (OUTPUTS + 7) + 1)
    assert choice.dense_us(groups, x) == pytest.approx(1.5)
    assert len(seen[1]) == 4

    def full(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "new_zeros", full)
    assert choice.dense_us(groups, x) is None


def test_a_form_that_gives_wrong_numbers_is_not_taken(monkeypatch):
    clock(monkeypatch, {"torch": 1.0, "merge": 0.5})
    monkeypatch.setattr(many, "merged", lambda p, o, order, *_: p.new_full((len(p), len(order)), torch.nan))
    layer = pivot()
    (found,) = choose_many([layer], ROWS)
    assert not found.kernel
    assert layer.many is None
    assert "wrong numbers with merge" in found.note


def test_few_rows_gradients_other_dtypes_and_new_masks_take_the_torch_products():
    layer = pivot()
    layer.many = ManyRows("merge", TILES["merge"], 32, layer.order.int(), torch.float32)
    with torch.no_grad():
        assert layer.many.takes(rows())
        assert not layer.many.takes(rows(30))
        assert not layer.many.takes(rows().double())
    assert not layer.many.takes(rows())
    layer(rows()).sum().backward()
    assert float(layer.pivot.weight.grad.abs().sum()) > 0
    layer.refresh_order()
    assert layer.many is None


class Doubled(torch.nn.Module):
    """As an adapter does: the layer is inside, and its weight is seen from outside."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@needs_triton
@pytest.mark.parametrize("part", ["pivot", "rest"])
@pytest.mark.parametrize("form", ["merge", "scatter"])
def test_what_is_wrapped_around_a_part_later_counts(form, part):
    layer = pivot()
    layer.many = form_of(layer, form, TILES[form], ROWS)
    setattr(layer, part, Doubled(getattr(layer, part)))
    with torch.no_grad():
        found = layer(rows())
        layer.many = None
        torch.testing.assert_close(found, layer(rows()), rtol=1e-5, atol=1e-5)
