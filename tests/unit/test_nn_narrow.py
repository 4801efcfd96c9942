"""The codec that stores the rows and columns that are not 0."""

from typing import Any

import pytest
import torch

from spectrim.nn.narrow import NarrowLinear

ROWS = torch.tensor([True, False, True, True, False])
COLUMNS = torch.tensor([False, True, True, False, True, True, True, False, True])
ALL_ROWS, ALL_COLUMNS = torch.ones(5, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
SIDES = [(ROWS, COLUMNS), (ROWS, ALL_COLUMNS), (ALL_ROWS, COLUMNS), (ALL_ROWS, ALL_COLUMNS)]
every_side = pytest.mark.parametrize("sides", SIDES, ids=["both", "rows", "columns", "none"])
every_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def layer(sides, bias: bool) -> tuple[NarrowLinear, torch.Tensor, torch.Tensor | None]:
    rows, columns = sides
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 9, generator=generator) * rows[:, None] * columns
    offset = torch.randn(5, generator=generator) * rows if bias else None
    kept = dense[rows][:, columns]
    return NarrowLinear.of(kept, None if offset is None else offset[rows], rows, columns), dense, offset


@every_side
@every_bias
def test_it_is_the_dense_layer_with_its_zeros(sides, bias):
    narrow, dense, offset = layer(sides, bias)
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrow.dense_weight(), dense)
    assert torch.allclose(narrow(x), torch.nn.functional.linear(x, dense, offset), atol=1e-6)
    assert (narrow.bias is None) == (offset is None)
    if offset is not None:
        assert torch.equal(narrow.bias, offset)


@every_side
@every_bias
def test_numbers_are_those_of_what_stays_and_a_mask_for_each_side_that_is_cut(sides, bias):
    rows, columns = (int(side.sum()) for side in sides)
    masks = (1 if rows < 5 else 0) + (2 if columns < 9 else 0)
    assert layer(sides, bias)[0].numbers == rows * columns + rows * bias + masks


@every_side
@every_bias
def test_entry_and_state_make_the_same_layer(sides, bias):
    narrow = layer(sides, bias)[0]
    entry = narrow.entry()
    empty = NarrowLinear.from_entry(9, 5, entry)
    assert {k: tuple(t.shape) for k, t in empty.state_dict().items() if t.numel()} == empty.shapes() == narrow.shapes()
    empty.load_state_dict(narrow.state_dict())
    empty.after_load()
    assert torch.equal(empty.dense_weight(), narrow.dense_weight())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 6}, "6 kept rows; a whole number from 1 to 5"),
        ({"columns": 0}, "0 kept columns; a whole number from 1 to 9"),
        ({"rows": True}, "True kept rows"),
        ({"columns": "4"}, "'4' kept columns"),
        ({"rows": 10**15}, "kept rows"),
        ({"rank": 2}, "rank 2; its 3 kept rows and 6 columns"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(change: dict[str, Any], message):
    entry = {**layer((ROWS, COLUMNS), True)[0].entry(), **change}
    with pytest.raises(ValueError, match=message):
        NarrowLinear.from_entry(9, 5, entry)
    missing = {key: value for key, value in entry.items() if key not in ("rows", "columns")}
    with pytest.raises(ValueError, match="None kept rows"):
        NarrowLinear.from_entry(9, 5, missing)


@pytest.mark.parametrize("mask", ["rows", "columns"])
def test_a_mask_that_marks_another_number_is_refused(mask):
    narrow = layer((ROWS, COLUMNS), False)[0]
    state = narrow.state_dict()
    state[mask] = state[mask] ^ 2
    with pytest.raises(ValueError, match=f"marks . {mask}, the layer has"):
        NarrowLinear.from_entry(9, 5, narrow.entry()).load_state_dict(state)


def test_masks_that_were_offloaded_are_refused():
    with torch.device("meta"):
        narrow = NarrowLinear(9, 5, (3, 9), bias=False)
    with pytest.raises(ValueError, match="offloaded"):
        narrow.after_load()


def test_gradients_reach_what_is_kept():
    narrow = layer((ROWS, COLUMNS), True)[0]
    narrow(torch.ones(2, 9)).sum().backward()
    assert bool((narrow.kept.weight.grad == 2).all())
