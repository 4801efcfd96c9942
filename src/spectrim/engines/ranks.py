"""Which rank and codec every layer gets under a budget of stored numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectrim.errors import UsageError
from spectrim.linalg.allocate import Options, allocate, equal_shares, factor_cost, pivot_cost
from spectrim.linalg.running import running_sum
from spectrim.method import LayerMethod
from spectrim.models.walk import Layer, Walk
from spectrim.replacement import Codec, Storage, Target


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each layer becomes, and what that stores."""

    targets: Mapping[str, Target]
    numbers_before: int
    numbers_after: int

    @property
    def keep(self) -> float:
        return self.numbers_after / self.numbers_before


def plan_to_facts(plan: Plan) -> dict[str, Any]:
    """JSON-ready, for checkpoints."""
    return {
        "targets": {name: [target.codec, target.rank, target.basis] for name, target in plan.targets.items()},
        "numbers_before": plan.numbers_before,
        "numbers_after": plan.numbers_after,
    }


def plan_from_facts(facts: Mapping[str, Any]) -> Plan:
    """The plan again."""
    targets = {n: Target(rank=rank, codec=codec, basis=basis) for n, (codec, rank, basis) in facts["targets"].items()}
    return Plan(targets=targets, numbers_before=facts["numbers_before"], numbers_after=facts["numbers_after"])


def new_bias(method: LayerMethod, layer: Layer) -> int:
    """Numbers of the bias that a layer gets when it is cut, beside the bias it has."""
    return layer.outputs if method.centres and not layer.has_bias else 0


def weight_budget(walk: Walk, keep: float, storage: Storage, new_biases: int = 0) -> int:
    """Numbers that all weights may take, so that weights and biases together stay within `keep` of the dense.

    `new_biases` counts those that rank 1 everywhere would add.
    """
    cost = factor_cost if storage == "factor" else pivot_cost
    rank_one = torch.tensor(1)
    least = sum(min(int(cost(la.outputs, la.inputs, rank_one)), la.weight_numbers) for la in walk.layers)
    return require_room(walk, keep, least + new_biases)


def require_room(walk: Walk, keep: float, least: int) -> int:
    """Numbers that all weights may take, biases apart; UsageError where that is below the `least` they can."""
    biases = sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
    budget = int(keep * walk.numbers) - biases
    if budget < least:
        raise UsageError(
            f"keep {keep:g} leaves {max(budget, 0):,} numbers for {len(walk.layers)} weights; rank 1 everywhere takes "
            f"{least:,}. The smallest reachable keep is {smallest_keep(walk, least):.4f}"
        )
    return budget


def smallest_keep(walk: Walk, least: int) -> float:
    """The smallest keep, in steps of 1e-4, at which `least` numbers for all weights fit."""
    biases = sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
    return math.ceil(10_000 * (least + biases) / walk.numbers) / 10_000


WIDE, MULTIPLE = 512, 8
"""Layers with sides from WIDE up get ranks that are multiples of MULTIPLE: rows of 16 bytes in 16 bits, without which
products of many rows take several times as long (docs/speed.md). A step of 8 is then 1.6 % of the rank at most."""


def rank_step(layer: Layer, asked: int) -> int:
    """Of which number a layer's ranks are multiples; `asked` is the method's rank_multiple, 0 for its default."""
    least = min(layer.outputs, layer.inputs)
    if asked:
        return min(asked, least)
    return MULTIPLE if least >= WIDE else 1


def options_of(
    layer: Layer, storage: Codec, energy: Tensor, extra: int = 0, step: int = 1
) -> tuple[Options, list[Target]]:
    """What a layer can be under a storage: each rank that pays, and dense. Error from `energy` (K,) descending.

    `extra` numbers go with every rank. Ranks are multiples of `step`, and 1, so that every budget can be met.
    """
    ranks = torch.arange(1, len(energy) + 1)
    cost = (factor_cost if storage == "factor" else pivot_cost)(layer.outputs, layer.inputs, ranks) + extra
    pays = (cost < layer.weight_numbers) & ((ranks % step == 0) | (ranks == 1))
    tail = running_sum(energy.flip(0)).flip(0)  # tail[r] = error of rank r
    error = torch.cat([tail[1:], tail.new_zeros(1)])
    targets = [Target(rank=rank, codec=storage) for rank in ranks[pays].tolist()]
    targets.append(Target(rank=min(layer.outputs, layer.inputs), codec="dense"))
    return (
        Options(
            torch.cat([error[pays.to(error.device)].cpu(), torch.zeros(1, dtype=error.dtype)]),
            torch.cat([cost[pays], torch.tensor([layer.weight_numbers])]),
        ),
        targets,
    )


class Priced(NamedTuple):
    """A layer and its menu: what each target costs, and the error its components predict."""

    layer: Layer
    options: Options
    targets: list[Target]


def menu_of(
    method: LayerMethod, walk: Walk, energies: Mapping[str, Tensor], *, step: int | None = None
) -> list[Priced]:
    """Every layer's menu. `energies[name]` (K,) is what losing each component costs.

    Ranks are multiples of `step`; None: of what the method asks for.
    """
    steps = [rank_step(layer, method.rank_multiple) if step is None else step for layer in walk.layers]
    return [
        Priced(la, *options_of(la, method.alone, energies[la.name], new_bias(method, la), step))
        for la, step in zip(walk.layers, steps, strict=True)
    ]


def budget_under(method: LayerMethod, walk: Walk, keep: float) -> int:
    """Numbers for all weights, and for the biases that cutting adds."""
    return weight_budget(walk, keep, method.alone, sum(new_bias(method, layer) for layer in walk.layers))


def plan_of(menu: Sequence[Priced], choice: Sequence[int], walk: Walk) -> Plan:
    """The plan in which every layer takes the option of its menu at an index."""
    picked = {own.layer.name: own.targets[k] for own, k in zip(menu, choice, strict=True)}
    spent = sum(int(own.options.cost[k]) for own, k in zip(menu, choice, strict=True))
    biases = sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
    return Plan(targets=picked, numbers_before=walk.numbers, numbers_after=spent + biases)


def plan_ranks(method: LayerMethod, walk: Walk, energies: Mapping[str, Tensor], keep: float) -> Plan:
    """A target for every layer, meeting the budget: least sum of errors, or the same share everywhere.

    Allocations that look at more than errors start from the same share (engines/search.py).
    """
    budget, menu = budget_under(method, walk, keep), menu_of(method, walk, energies)
    if method.allocation == "global":
        choice = allocate([own.options for own in menu], budget)
    else:
        choice = _uniform_choice(walk, menu, keep, budget)
    return plan_of(menu, choice, walk)


def uniform_plan(walk: Walk, storage: Storage, energies: Mapping[str, Tensor], keep: float) -> Plan:
    """Equal shares in a low-rank storage, for whoever has spectra and is no method for single layers."""
    menu = [Priced(la, *options_of(la, storage, energies[la.name])) for la in walk.layers]
    return plan_of(menu, _uniform_choice(walk, menu, keep, weight_budget(walk, keep, storage)), walk)


def _uniform_choice(walk: Walk, menu: Sequence[Priced], keep: float, budget: int) -> list[int]:
    """The same kept share in every layer (what most papers do), then integer left-overs handed out in turn."""
    costs = [own.options.cost for own in menu]
    if keep >= 1.0:
        return [len(c) - 1 for c in costs]
    return equal_shares(costs, [layer.weight_numbers for layer in walk.layers], budget)
