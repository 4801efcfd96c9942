"""The store of kept groups: what it refuses, and what it holds in memory. Products are in test_nn_packed.py."""

from typing import Any

import pytest
import torch

from spectrim.linalg.bits import groups_account
from spectrim.linalg.quantise import round_to_nearest
from spectrim.nn.stores import store_from_entry
from spectrim.nn.stores_groups import GroupStore
from spectrim.nn.stores_uniform import UniformStore

OUTPUTS, INPUTS = 12, 16
KEPT: dict[str, Any] = {"kind": "uniform", "bits": 3, "group_size": 0, "symmetric": False}
GOOD: dict[str, Any] = {"kind": "groups", "group_size": 4, "groups": 24, "kept": KEPT}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group_size": 5}, "group_size 5; it must divide the 16 inputs"),
        ({"group_size": 0}, "group_size 0; it must divide"),
        ({"group_size": 4.0}, "group_size 4.0; it must divide"),
        ({"group_size": 10**12}, "it must divide"),
        ({"groups": 0}, "groups 0; 12 x 16 in groups of 4 has 1 to 48 to keep"),
        ({"groups": 49}, "1 to 48"),
        ({"groups": True}, "groups True"),
        ({"groups": None}, "groups None"),
        ({"kept": None}, "its kind must be one of"),
        ({"kept": {**KEPT, "group_size": 8}}, "must divide the 4 inputs"),
    ],
)
def test_an_entry_that_fits_no_layer_is_refused(change, said):
    assert store_from_entry(OUTPUTS, INPUTS, GOOD, device="meta").entry() == GOOD
    with pytest.raises(ValueError, match=said):
        store_from_entry(OUTPUTS, INPUTS, {**GOOD, **change}, device="meta")


def store() -> tuple[GroupStore, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(OUTPUTS, INPUTS // 4, generator=generator) < 0.5
    values = torch.randn(int(mask.sum()), 4, generator=generator)
    rounded = round_to_nearest(values, 3, 0, symmetric=False)
    kept = UniformStore.holding(rounded, bits=3, group_size=0, dtype=torch.bfloat16)
    return GroupStore.holding(kept, mask), mask


def test_a_bitmap_that_marks_other_groups_than_are_kept_is_refused():
    made, mask = store()
    made.after_load()
    made.bitmap[2] ^= 1
    kept = int(mask.sum())
    marked = kept - 1 if bool(mask.flatten()[16]) else kept + 1
    with pytest.raises(ValueError, match=f"the bitmap marks {marked} groups, {kept} are kept: damaged file"):
        made.after_load()


def test_nothing_is_held_but_what_is_counted():
    made, mask = store()
    held = sum(tensor.nbytes for tensor in [*made.parameters(), *made.buffers()])
    account = groups_account(OUTPUTS, INPUTS, 3, 4, kept=int(mask.sum()), symmetric=False)
    assert held == account.total
    assert torch.equal(made.matrix().unflatten(1, (-1, 4))[~mask], torch.zeros(int((~mask).sum()), 4))
