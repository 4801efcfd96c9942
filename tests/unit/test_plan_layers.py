"""Methods that treat the model as a whole are clocked at their own work on layers of the model's shapes."""

import dataclasses

import pytest
import torch

from spectrim.engines import plan_layers
from spectrim.engines.forms import BYTE, PLAIN, codes_of, mixed_codes
from spectrim.engines.plan_layers import (
    FactorCodes,
    LayerSeconds,
    clock_factors,
    clock_layers,
    cube,
    low_rank,
    made_up,
    smaller,
)
from spectrim.model_method import EACH_PASS, ModelMethod
from spectrim.models.walk import find_layers
from spectrim.registry import make_method
from spectrim.replacement import Storage
from spectrim.stats import Stat
from tiny_models import tiny

CPU = torch.device("cpu")
WALK = find_layers(tiny("llama"))


@pytest.mark.parametrize(
    ("name", "options", "stages"),
    [
        ("trellis", {"window": 8}, {"predict", "compress"}),
        ("gptq", {"group_size": 8}, {"compress"}),
        ("rtn", {"group_size": 8}, {"compress"}),
        ("squeezellm", {}, {"compress"}),
    ],
)
def test_own_work_is_clocked(name: str, options: dict[str, object], stages: set[str]) -> None:
    method = make_method(name, options=options)
    assert isinstance(method, ModelMethod)
    found = clock_layers(method, WALK, 0.5, CPU)
    assert isinstance(found, LayerSeconds)
    assert set(found.once) == stages
    assert min(found.once.values()) > 0
    assert found.each_pass > 0


def test_twice_the_layers_take_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_layers, "seconds_of", lambda work, device, tries: 1.0)
    method = make_method("gptq", options={"group_size": 8})
    assert isinstance(method, ModelMethod)
    twice = dataclasses.replace(WALK, layers=WALK.layers * 2)
    one, two = (clock_layers(method, walk, 0.5, CPU) for walk in (WALK, twice))
    assert isinstance(one, LayerSeconds)
    assert isinstance(two, LayerSeconds)
    assert one.once == {"compress": float(len(WALK.layers))}  # a piece of each layer, a second each
    assert two.once == {"compress": 2.0 * len(WALK.layers)}
    assert two.each_pass == pytest.approx(2 * one.each_pass)


def test_few_columns_stand_for_a_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of a weight take as many times longer as it has more numbers than were clocked."""
    monkeypatch.setattr(plan_layers, "seconds_of", lambda work, device, tries: 1.0)
    method = make_method("trellis", options={"window": 8})
    assert isinstance(method, ModelMethod)
    layer = dataclasses.replace(WALK.layers[0], outputs=64, inputs=256, has_bias=False)
    weight, stats = made_up(layer, method.needs, CPU)
    pieces = [p for p in method.rehearsal(layer, weight, stats, 2 / 16) if p.numbers and p.stage != EACH_PASS]
    assert [(piece.numbers, piece.share) for piece in pieces] == [(64 * 16, 1.0)]  # 2 bits a weight, of one code
    only = dataclasses.replace(WALK, layers=(layer,))
    found = clock_layers(method, only, 2 / 16, CPU)
    assert isinstance(found, LayerSeconds)
    assert found.once == {"predict": 1.0, "compress": 1.0 + 256 / 16}


def test_methods_that_have_not_said_what_they_do() -> None:
    method = make_method("slicegpt")
    assert isinstance(method, ModelMethod)
    assert clock_layers(method, WALK, 0.5, CPU) is None


def test_a_mistake_is_told() -> None:
    method = make_method("gptq", options={"group_size": 7})
    assert isinstance(method, ModelMethod)
    assert "group_size" in str(clock_layers(method, WALK, 0.5, CPU))


def test_a_large_layer_is_stood_for_by_a_smaller_one() -> None:
    large = dataclasses.replace(WALK.layers[0], outputs=11008, inputs=4096)
    small = smaller(large, 2**27)
    assert cube(small) <= 2**27 < cube(large)
    assert (small.outputs % 128, small.inputs % 128) == (0, 0)
    assert 2 < small.outputs / small.inputs < 4
    assert smaller(WALK.layers[0], 2**27) == WALK.layers[0]


def test_made_up_statistics_are_moments() -> None:
    layer = WALK.layers[0]
    weight, stats = made_up(layer, frozenset(Stat), CPU)
    assert weight.shape == (layer.outputs, layer.inputs)
    assert set(stats.measured()) == {stat.value for stat in Stat}
    for side in (stats.get(Stat.GRAM), stats.get(Stat.OUTPUT_GRAD)):
        values = torch.linalg.eigvalsh(side)
        assert values[0] > 0
        assert values[-1] > 3 * values.mean()  # they fall, as those of trained models do


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.2, 6.0, 7.0, 12.0, 16.0])
def test_two_codes_make_up_the_bits(bits: float) -> None:
    mixed = mixed_codes(8, bits)
    assert sum(share for _, share in mixed) == pytest.approx(1)
    assert sum(code.bits * share for code, share in mixed) == pytest.approx(max(1.0, bits))
    assert {code.bits for code, _ in mixed} <= {code.bits for code in (*codes_of(8), BYTE, PLAIN)}


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_factors_in_codes_are_clocked(storage: Storage) -> None:
    found = clock_factors(storage, FactorCodes(4, 8, 0.5), WALK, CPU)
    assert isinstance(found, LayerSeconds)
    assert set(found.once) == {"quantise"}
    assert min(found.once["quantise"], found.each_pass) > 0
    layer = max(WALK.layers, key=lambda layer: layer.weight_numbers)
    weight, _ = made_up(layer, frozenset(), CPU)
    stored = sum(p.numel() for p in low_rank(layer, weight, storage, 0.5).parameters())
    rank = layer.outputs + layer.inputs  # numbers of one component
    assert 0.5 * layer.weight_numbers - rank < stored <= 0.5 * layer.weight_numbers
