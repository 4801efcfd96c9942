"""Layers that read one input may keep its factor once: which do so, at which rank, under the one budget.

    storage=shared          two factors, of q, k, v (gate, up) the right one once: R (I + sum O) numbers
    storage=shared-pivot    the same with R of the inputs passed as they are: R (I - R + sum O); other layers in pivot
    storage=best            each group as `shared-pivot`, or each of its layers in pivot storage with a rank of its own

A group enters the allocation as one item with a cost of its own for each component (linalg/allocate.py). Under `best`
and a global budget that item offers both forms at all sizes, so that one price decides; under equal shares the form
that loses less at the group's share is taken. Losses are of the method's metric, each layer's own (linalg/shared.py).
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.layerwise import solver_errors_of
from spectrim.engines.measure import Progress
from spectrim.engines.ranks import Plan, options_of, rank_step, require_room
from spectrim.errors import NumericalError
from spectrim.linalg.allocate import Options, allocate, equal_shares, merged
from spectrim.linalg.factor import Spectrum
from spectrim.linalg.shared import CommonSpectrum, common_spectrum, group_cost, pivoted_group_cost
from spectrim.method import LayerMethod
from spectrim.models.walk import Layer, Walk, shared_inputs, weight_of
from spectrim.replacement import SHARED, Codec, Target
from spectrim.stage import at
from spectrim.stats import Stats

Group = tuple[Layer, ...]
"""Layers with one input; the first owns what they share."""


def find_groups(model: PreTrainedModel, walk: Walk) -> tuple[Group, ...]:
    """All groups of two layers and more."""
    layers = {layer.name: layer for layer in walk.layers}
    found = shared_inputs(model, walk.layers)
    return tuple(tuple(layers[name] for name in names) for names in found if len(names) > 1)


def decompose_group(
    method: LayerMethod, group: Group, weights: Sequence[Tensor], stats: Sequence[Stats]
) -> CommonSpectrum:
    """The common components of weights (O_l, I), float64, in the method's metric; NumericalError unless finite."""
    shape = f"the {len(group)} weights that share its input, {sum(la.outputs for la in group)} x {group[0].inputs}"
    with solver_errors_of(group[0].name, f"{shape} ({method.info.name})"):
        metrics = [method.covariances(own) for own in stats]
        found = common_spectrum(weights, [output for output, _ in metrics], [inputs for _, inputs in metrics])
    if not all(bool(torch.isfinite(t).all()) for t in (found.right, found.error, *found.lefts)):
        raise NumericalError(
            f"{group[0].name}: the decomposition of {shape} is not finite ({method.info.name}); the statistics or the "
            "solver failed. Use more calibration text"
        )
    return found


def decompose_groups(
    method: LayerMethod,
    model: PreTrainedModel,
    groups: Sequence[Group],
    stats: Mapping[str, Stats],
    *,
    progress: Progress | None = None,
) -> dict[str, CommonSpectrum]:
    """Of every group, by its owner."""
    found = {}
    for done, group in enumerate(groups, 1):
        weights = [weight_of(model.get_submodule(la.name)).detach().double() for la in group]
        found[group[0].name] = decompose_group(method, group, weights, [stats[la.name] for la in group])
        if progress is not None:
            progress(at("decompose together", group[0].name), done, len(groups))
    return found


def settle_groups(
    spectra: MutableMapping[str, Spectrum],
    groups: Sequence[Group],
    common: Mapping[str, CommonSpectrum],
    plan: Plan,
) -> None:
    """Into `spectra` those of layers that share; and of those that have none of their own."""
    for group in groups:
        for layer, spectrum in zip(group, common[group[0].name].spectra(), strict=True):
            if layer.name not in spectra or plan.targets[layer.name].codec in SHARED:
                spectra[layer.name] = spectrum


class Item(NamedTuple):
    """What the allocation decides about at once: one layer, or a group; each target says what all its layers become."""

    layers: Group
    options: Options
    targets: list[tuple[Target, ...]]

    @property
    def size(self) -> int:
        return sum(layer.weight_numbers for layer in self.layers)


def plan_groups(
    method: LayerMethod,
    walk: Walk,
    groups: Sequence[Group],
    energies: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    keep: float,
) -> Plan:
    """A target for every layer, meeting the budget.

    `energies` (K,) of layers by themselves; `errors` (K+1,) of groups, by owner, of keeping the first 0, 1, ..., K
    common components. UsageError where the budget is below rank 1 everywhere.
    """
    items = _items(method, walk, groups, energies, errors, keep)
    budget = require_room(walk, keep, sum(int(item.options.cost.min()) for item in items))
    if method.allocation == "global":
        choice = allocate([item.options for item in items], budget)
    elif keep >= 1:
        choice = [len(item.targets) - 1 for item in items]
    else:
        choice = equal_shares([item.options.cost for item in items], [item.size for item in items], budget)
    picked = {
        layer.name: target
        for item, k in zip(items, choice, strict=True)
        for layer, target in zip(item.layers, item.targets[k], strict=True)
    }
    spent = sum(int(item.options.cost[k]) for item, k in zip(items, choice, strict=True))
    biases = sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
    return Plan(targets=picked, numbers_before=walk.numbers, numbers_after=spent + biases)


def _items(
    method: LayerMethod,
    walk: Walk,
    groups: Sequence[Group],
    energies: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    keep: float,
) -> list[Item]:
    """In the order of the layers; dense is the last option of each where shares are equal."""
    of_owner = {group[0].name: group for group in groups}
    borrowers = {layer.name for group in groups for layer in group[1:]}
    found: list[Item] = []
    for layer in walk.layers:
        if layer.name in borrowers:
            continue
        group = of_owner.get(layer.name, (layer,))
        if len(group) == 1:
            found.append(_alone(method, layer, energies))
            continue
        together = _together(method, group, errors[layer.name])
        apart = [_alone(method, la, energies) for la in group] if method.storage == "best" else []
        if not apart:
            found.append(together)
        elif method.allocation == "global":
            found.append(_either(apart, together))
        else:
            found += [together] if _least(together, keep) < sum(_least(own, keep) for own in apart) else apart
    return found


def _alone(method: LayerMethod, layer: Layer, energies: Mapping[str, Tensor]) -> Item:
    """A layer by itself."""
    step = rank_step(layer, method.rank_multiple)
    options, targets = options_of(layer, method.alone, energies[layer.name], step=step)
    return Item((layer,), options, [(target,) for target in targets])


def _together(method: LayerMethod, group: Group, error: Tensor) -> Item:
    """A group with one right factor at each rank that pays, and dense."""
    outputs, inputs = [la.outputs for la in group], group[0].inputs
    codec: Codec = "shared" if method.storage == "shared" else "shared-pivot"
    step = rank_step(Layer(name="", block=0, outputs=sum(outputs), inputs=inputs, has_bias=False), method.rank_multiple)
    ranks = torch.arange(1, len(error))
    cost = (group_cost if codec == "shared" else pivoted_group_cost)(outputs, inputs, ranks)
    size = sum(la.weight_numbers for la in group)
    pays = (cost < size) & ((ranks % step == 0) | (ranks == 1))
    targets = [_targets(group, codec, rank) for rank in ranks[pays].tolist()]
    targets.append(tuple(Target(rank=min(la.outputs, la.inputs), codec="dense") for la in group))
    kept = error[1:].cpu()[pays]
    return Item(
        group, Options(torch.cat([kept, kept.new_zeros(1)]), torch.cat([cost[pays], torch.tensor([size])])), targets
    )


def _targets(group: Group, codec: Codec, rank: int) -> tuple[Target, ...]:
    return tuple(Target(rank=rank, codec=codec, basis=group[0].name if i else None) for i in range(len(group)))


def _either(apart: Sequence[Item], together: Item) -> Item:
    """Both forms at all sizes, as one item; dense, which both offer, once."""
    options, choices = merged([own.options for own in apart])
    targets = [tuple(own.targets[k][0] for own, k in zip(apart, choice, strict=True)) for choice in choices]
    both = Options(*(torch.cat([a.to(b.dtype), b[:-1]]) for a, b in zip(options, together.options, strict=True)))
    return Item(together.layers, both, targets + together.targets[:-1])


def _least(item: Item, share: float) -> float:
    """What an item loses at most at a share of its numbers; infinite where no option is that small."""
    fits = item.options.cost <= share * item.size
    return float(item.options.error[fits].min()) if bool(fits.any()) else float("inf")
