"""How long it takes to put layers in few bits: by methods that treat the model as a whole, and of factors; clocked.

A method says what it does to a layer (`ModelMethod.rehearsal`); here it is given a random weight and random statistics
of every shape that the model has, as large as the time of a plan allows, and clocked doing it. Weights and inputs
have spectra that fall like those of trained models do, since what a method looks at further depends on them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectrim.engines.layerwise import build_linear
from spectrim.engines.quantise_factors import quantise_layer
from spectrim.errors import UsageError
from spectrim.linalg.factor import Factors
from spectrim.machine import seconds_of
from spectrim.memory import is_out_of_memory, release
from spectrim.method import LayerMethod, Method
from spectrim.model_method import EACH_PASS, ModelMethod, Piece
from spectrim.models.walk import Layer, Walk
from spectrim.replacement import Storage, encode
from spectrim.request import Request
from spectrim.stats import Stat, Stats

CUBES = {"cpu": 2**27, "cuda": 2**33}
"""Outputs times inputs times the larger of a weight that is clocked, at most; smaller ones stand for larger ones."""
SIDE = 128
"""Sides of weights that stand for larger ones are multiples of it, as the groups of most methods demand."""
SHAPES = 6
"""So many different shapes are clocked, the most common ones."""
FALL = 0.5
"""Singular values, and sizes of inputs and gradients, fall as their position to this power."""


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Of all layers together."""

    once: dict[str, float]  # by stage
    each_pass: float  # beside the products, whenever the model runs


class FactorCodes(NamedTuple):
    """What factors become."""

    bits: int
    group_size: int
    keep: float


def own_work(method: Method, request: Request, walk: Walk, device: torch.device) -> LayerSeconds | str | None:
    """What putting layers in few bits takes, clocked; None where the run does not, or its method has not said how."""
    if isinstance(method, ModelMethod):
        return clock_layers(method, walk, request.keep, device)
    if request.factor_bits is None:
        return None
    assert isinstance(method, LayerMethod)
    asked = FactorCodes(request.factor_bits, request.factor_group_size, request.keep)
    return clock_factors(method.alone, asked, walk, device)


def clock_layers(method: ModelMethod, walk: Walk, keep: float, device: torch.device) -> LayerSeconds | str | None:
    """What the method's own work on all layers takes; in words, why that cannot be clocked; None where it is not told.

    A UsageError of the method, which a layer of another size than the model's may meet, is told as such.
    """

    def rehearse(layer: Layer, weight: Tensor, stats: Stats) -> Sequence[Piece]:
        return method.rehearsal(layer, weight, stats, keep)

    return _clocked(rehearse, method.needs, walk, device)


def clock_factors(storage: Storage, asked: FactorCodes, walk: Walk, device: torch.device) -> LayerSeconds | str | None:
    """The same of factors in few bits behind another method (engines/quantise_factors.py)."""

    def rehearse(layer: Layer, weight: Tensor, stats: Stats) -> Sequence[Piece]:
        module, gram = low_rank(layer, weight, storage, asked.keep), stats.get(Stat.GRAM)
        made = quantise_layer(module, gram, asked.bits, asked.group_size)
        one = torch.zeros(1, layer.inputs, device=device)
        return [
            Piece("quantise", lambda: quantise_layer(module, gram, asked.bits, asked.group_size)),
            Piece(EACH_PASS, lambda: made(one), numbers=layer.weight_numbers),
        ]

    return _clocked(rehearse, frozenset({Stat.GRAM}), walk, device)


def low_rank(layer: Layer, weight: Tensor, storage: Storage, keep: float) -> nn.Module:
    """A layer of the rank that `keep` leaves, in float32; its factors are parts of the made-up weight (O, I)."""
    outputs, inputs = weight.shape
    sides, numbers = outputs + inputs, keep * layer.weight_numbers
    rank = numbers / sides if storage == "factor" else (sides - math.sqrt(sides**2 - 4 * numbers)) / 2
    rank = max(1, min(int(rank), outputs - 1, inputs))
    factors = Factors(weight[:, :rank], weight[:rank])
    return build_linear(encode(factors, storage, like=weight.float(), bias=None)).to(weight.device)


Rehearse = Callable[[Layer, Tensor, Stats], Sequence[Piece]]


@torch.no_grad()
def _clocked(rehearse: Rehearse, needs: frozenset[Stat], walk: Walk, device: torch.device) -> LayerSeconds | str | None:
    counted = Counter((layer.outputs, layer.inputs) for layer in walk.layers).most_common(SHAPES)
    first = {(layer.outputs, layer.inputs): layer for layer in reversed(walk.layers)}
    once, each_pass, numbers = Counter[str](), 0.0, 0
    try:
        for shape, count in counted:
            found = _of_one(rehearse, needs, first[shape], device)
            if not found:
                return None
            each_pass += count * found.pop(EACH_PASS, 0.0)
            once.update({stage: count * seconds for stage, seconds in found.items()})
            numbers += count * first[shape].weight_numbers
    except UsageError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "there is no memory for a layer"
    finally:
        release()
    rest = sum(layer.weight_numbers for layer in walk.layers) / numbers  # shapes that were not clocked take as long
    return LayerSeconds(once={stage: rest * seconds for stage, seconds in once.items()}, each_pass=rest * each_pass)


def _of_one(rehearse: Rehearse, needs: frozenset[Stat], layer: Layer, device: torch.device) -> dict[str, float]:
    """Seconds of one layer by stage."""
    small = smaller(layer, CUBES["cuda" if device.type == "cuda" else "cpu"])
    weight, stats = made_up(small, needs, device)
    found: dict[str, float] = {}
    for piece in rehearse(small, weight, stats):
        larger = layer.weight_numbers / piece.numbers if piece.numbers else cube(layer) / cube(small)
        seconds = piece.share * larger * seconds_of(piece.work, device, tries=1)
        found[piece.stage] = found.get(piece.stage, 0.0) + seconds
    return found


def cube(layer: Layer) -> float:
    """What the dearest operations on a weight are in proportion to."""
    return float(layer.weight_numbers) * max(layer.outputs, layer.inputs)


def smaller(layer: Layer, most: int) -> Layer:
    """The layer, or one of the same proportions whose cube is at most about `most`."""
    if cube(layer) <= most:
        return layer
    by = (most / cube(layer)) ** (1 / 3)
    sides = [max(SIDE, int(by * side) // SIDE * SIDE) for side in (layer.outputs, layer.inputs)]
    return Layer(
        name=layer.name, block=layer.block, outputs=min(sides[0], layer.outputs), inputs=min(sides[1], layer.inputs),
        has_bias=layer.has_bias,
    )  # fmt: skip


def made_up(layer: Layer, needs: frozenset[Stat], device: torch.device) -> tuple[Tensor, Stats]:
    """A weight (O, I) and what calibration would measure of it, float64, the same for every call."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    def fall(count: int) -> Tensor:
        return torch.arange(1, count + 1, dtype=torch.float64, device=device) ** -FALL

    def moment(side: int) -> Tensor:
        rows = normal(2 * side, side) * fall(side)
        return rows.mT @ rows / (2 * side)

    outputs, inputs = layer.outputs, layer.inputs
    rank = min(outputs, inputs)
    weight = normal(outputs, rank) * fall(rank) @ normal(rank, inputs) / rank**0.5
    measured = {
        Stat.GRAM: lambda: moment(inputs),
        Stat.MEAN: lambda: normal(inputs) * fall(inputs),
        Stat.MEAN_ABS: lambda: fall(inputs),
        Stat.OUTPUT_GRAD: lambda: moment(outputs),
        Stat.FISHER: lambda: normal(outputs, inputs).square(),
        Stat.SLOPE: lambda: normal(outputs, inputs),
    }
    return weight, Stats(tokens=2 * inputs, **{stat.value: measured[stat]() for stat in needs})
