"""What goes to the host and back through small slots is what was given, however often and in whatever order."""

import pytest
import torch
from torch import Tensor

from spectrim.engines import ferry as ferry_module
from spectrim.engines.ferry import Ferry
from spectrim.engines.shelf import Shelf, SpectraShelf, StatsShelf, scale
from spectrim.linalg.factor import Spectrum
from spectrim.stats import Stat

CPU = torch.device("cpu")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ferry() -> Ferry:
    """Slots of 40 bytes: ten numbers."""
    return Ferry(CPU, slot_bytes=40)


def shelf_over(ferry: Ferry) -> Shelf:
    """A shelf that goes the way of a GPU's."""
    shelf = Shelf(CPU, on_host=True)
    shelf.ferry = ferry
    return shelf


@pytest.mark.parametrize("shape", [(0,), (1,), (10,), (11,), (20,), (21,), (7, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_comes_back_bit_by_bit(ferry: Ferry, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = normal(0, *shape).to(dtype)
    host = torch.full_like(tensor, 7)
    ferry.away(tensor, host).result()
    assert torch.equal(host, tensor)
    assert torch.equal(ferry.take(ferry.ahead(host)), tensor)


def test_many_on_their_way_keep_apart_and_in_order(ferry: Ferry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferry_module, "ON_THE_WAY", 500)
    tensors = [normal(seed, 30 + seed) for seed in range(12)]
    hosts = [torch.empty_like(tensor) for tensor in tensors]
    done = [ferry.away(tensor, host) for tensor, host in zip(tensors, hosts, strict=True)]
    assert len(ferry.under_way) <= 4
    for future in done:
        future.result()
    coming = [ferry.ahead(host) for host in hosts]
    for tensor, found in zip(tensors, reversed([ferry.take(c) for c in reversed(coming)]), strict=True):
        assert torch.equal(found, tensor)


def test_a_copy_that_fails_is_told_where_the_next_one_is_asked_for(ferry: Ferry) -> None:
    done = ferry.away(normal(0, 30), torch.empty(5))
    with pytest.raises(RuntimeError, match="size"):
        done.result()
    with pytest.raises(RuntimeError, match="size"):
        ferry.away(normal(0, 3), torch.empty(3))


def test_a_shelf_over_a_ferry_gives_what_was_put_last(ferry: Ferry) -> None:
    shelf = shelf_over(ferry)
    first, second = normal(0, 9, 9), normal(1, 9, 9)
    shelf.put("a", first)
    place = shelf.settled("a")
    shelf.ahead("a")
    shelf.put("a", second)
    wanted = second.clone()
    second.zero_()  # the caller may write to what it gave
    assert torch.equal(shelf.fetch("a"), wanted)
    assert shelf.settled("a") is place
    shelf.put("a", first[:2].double())
    assert torch.equal(shelf.get("a"), first[:2].double())
    shelf.drop("a")
    assert not shelf.kept
    assert not shelf.leaving
    assert not shelf.coming


def test_scores_fold_into_components_that_are_still_on_their_way(ferry: Ferry) -> None:
    spectra = SpectraShelf(CPU, on_host=True)
    spectra.shelf = shelf_over(ferry)
    left, right, energy = normal(0, 40, 4).double(), normal(1, 4, 30).double(), torch.ones(4, dtype=torch.float64)
    spectra["a"] = Spectrum(left, right, energy)
    spectra.shelf.ahead(("a", "left"))
    scores = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    scale(spectra, "a", scores)
    torch.testing.assert_close(spectra["a"].left, left * scores, rtol=1e-6, atol=1e-6)
    assert torch.equal(spectra.as_kept("a").right, right.float())
    del spectra["a"]
    assert not spectra.shelf.kept


def test_statistics_of_two_rounds_are_averaged_on_a_shelf_over_a_ferry(ferry: Ferry) -> None:
    """Once with what is there brought ahead, once without; layers are read in running order and in another."""
    shelf = StatsShelf(CPU)
    shelf.shelf = shelf_over(ferry)
    rows = {name: [normal(seed, 20, 6), normal(seed + 9, 20, 6)] for seed, name in enumerate("abc")}
    grams = {name: [(x.mT @ x).double() for x in own] for name, own in rows.items()}
    for again in range(2):
        if again:
            shelf.expect(["a", "c"], [Stat.GRAM], again=again)
            assert len(shelf.shelf.coming) == 2
        for name, own in grams.items():
            shelf.add(name, Stat.GRAM, own[again].clone(), share=1.0 - 0.5 * again, again=again)
            shelf.describe(name, 20, {Stat.GRAM: name}, again=again)
    for name in ("a", "b", "c", "b", "a"):
        wanted = (grams[name][0] + grams[name][1]) / 2
        torch.testing.assert_close(shelf[name].get(Stat.GRAM), wanted, rtol=1e-6, atol=1e-6)
