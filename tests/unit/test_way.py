"""Which way a closed form goes, by a GPU's memory: at once, block by block, without the coupling, or not at all."""

from typing import Any

import pytest
import torch

from spectrim import memory
from spectrim.engines.any_size import compress_any_size
from spectrim.engines.measure_blocks import whole_bytes
from spectrim.engines.pipeline import compress_model
from spectrim.engines.way import run_bytes, spectra_bytes, way_of
from spectrim.errors import UsageError
from spectrim.method import LayerMethod, Method
from spectrim.models.walk import find_layers
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

CPU = torch.device("cpu")
IDS = token_ids(6, 10)
WALK = find_layers(tiny("llama"))


def least(method: Method) -> int:
    return whole_bytes(WALK, method.needs) + spectra_bytes(WALK)


def most(method: Method) -> int:
    assert isinstance(method, LayerMethod)
    return run_bytes(WALK, method)


def has(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> None:
    """As if the device were a GPU with so many bytes."""
    monkeypatch.setattr(memory, "total_memory", lambda _device: int(nbytes) + 1)


NEEDS_ALL = [
    ("soco", {}, "coupling=sequence"),
    ("two-sided", {}, "coupling=sequence"),
    ("two-sided", {"coupling": "none", "rounds": 2}, "rounds=2"),
    ("zero-sum", {}, "allocation=order"),
]


@pytest.mark.parametrize(("name", "options", "_said"), NEEDS_ALL, ids=str)
def test_what_blocks_cannot_serve_goes_at_once_while_all_it_holds_takes_four_fifths(
    name: str, options: dict[str, Any], _said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_method(name, options=options)
    room = max(most(method) / memory.MOST_SHARE, least(method) / memory.WHOLE_SHARE * 0.9)
    has(monkeypatch, room)
    assert way_of(CPU, WALK, method, insists=("coupling",)) == (True, method, ())
    has(monkeypatch, 0.99 * min(most(method) / memory.MOST_SHARE, least(method) / memory.WHOLE_SHARE))
    with pytest.raises(UsageError, match=rf"{_said} holds sums of all layers.*80%.*--set "):
        way_of(CPU, WALK, method, insists=("coupling",))


def test_a_method_that_blocks_serve_does_not_wait_for_four_fifths(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("svd-llm")
    has(monkeypatch, least(method) / memory.WHOLE_SHARE)
    assert way_of(CPU, WALK, method).whole
    has(monkeypatch, least(method) / memory.WHOLE_SHARE * 0.99)
    assert way_of(CPU, WALK, method) == (False, method, ())


@pytest.mark.parametrize(("name", "steps"), [("soco", {"steps": 2, "batch_size": 2}), ("two-sided", {})])
def test_without_memory_for_it_the_default_does_without_the_coupling_and_says_so(
    name: str, steps: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_method(name, options=steps)
    has(monkeypatch, 1000)
    found = compress_model(tiny("llama"), method, 0.6, IDS, gradient_windows=4)
    assert found.method.to_config() == method.to_config() | {"coupling": "none"}
    assert sum("coupling=sequence" in text and "with coupling=none" in text for text in found.warnings) == 1
    bare = make_method(name, options={**steps, "coupling": "none"})
    wanted = compress_model(tiny("llama"), bare, 0.6, IDS, gradient_windows=4)
    assert found.plan == wanted.plan
    for layer, placed in wanted.placed.items():
        assert torch.equal(found.placed[layer].dense(), placed.dense()), layer
    with pytest.raises(UsageError, match="coupling=sequence"):
        compress_model(tiny("llama"), method, 0.6, IDS, gradient_windows=4, insists=("coupling",))


def test_all_sizes_do_without_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("two-sided")
    assert isinstance(method, LayerMethod)
    has(monkeypatch, 1000)
    sizes = compress_any_size(tiny("llama"), method, IDS, anchors=(0.8, 0.6), gradient_windows=4)
    assert sizes.method.to_config()["coupling"] == "none"
    assert sum("with coupling=none" in text for text in sizes.warnings) == 1
    with pytest.raises(UsageError, match="coupling=sequence"):
        compress_any_size(tiny("llama"), method, IDS, anchors=(0.8, 0.6), insists=("coupling",))


def test_what_was_asked_for_by_name_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectrim import job
    from spectrim.models.load import resolve
    from spectrim.request import Request

    has(monkeypatch, 1000)
    source = resolve("builtin:tiny")
    own = Request(model="builtin:tiny", keep=0.6, device="cpu")
    job.foresee(own, own.check(), source)
    asked = Request(model="builtin:tiny", keep=0.6, device="cpu", options={"coupling": "sequence"})
    with pytest.raises(UsageError, match="coupling=sequence"):
        job.foresee(asked, asked.check(), source)
    for options, said in (({"rounds": 2, "coupling": "none"}, "rounds=2"), ({}, "allocation=order")):
        other = Request(
            model="builtin:tiny", keep=0.6, device="cpu", options=options, method="two-sided" if options else "zero-sum"
        )
        with pytest.raises(UsageError, match=said):
            job.foresee(other, other.check(), source)
