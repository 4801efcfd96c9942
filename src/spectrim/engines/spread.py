"""What the processes of one run do for the engines: windows are shared out, sums brought together, layers handed round.

    windows      each rank sees a row of them of its own, of those with gradients and of the others    own_spans
    sums         added up, in the order of the ranks, at the rank that owns the layer            bring_together
    layers       owned by the least loaded rank, the dearest first; its owner decomposes it        owners_of
    energies     known to all, so that all choose the same ranks under the budget                  energies_of_all
    factors      encoded by one rank, placed by all                                                     encode_spread
    spectra      handed to all where a later step needs them: training, propagation, states           hand_round

With one process each of these is what it would be without this file. See docs/adr/0008-several-processes.md.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.ranks import Plan
from spectrim.engines.sums import Sums
from spectrim.linalg.factor import Spectrum
from spectrim.models.walk import Layer, Walk, weight_of
from spectrim.processes import Share, present, spread_by_cost
from spectrim.replacement import Replacement
from spectrim.stats import GRADIENT_STATS, INPUT_STATS, Stat, Stats

_BIAS = "=bias"
"""What a bias is called among the tensors of a layer on their way; none in a file is."""
Spans = list[tuple[int, int]]
"""First window and end of each batch."""


def own_windows(ids: Tensor) -> Tensor:
    """This rank's share of the windows (N, length)."""
    return ids[present().share_of(len(ids))]


def own_spans(windows: int, border: int, batch_size: int, done: int = 0, share: Share | None = None) -> Spans:
    """Batches of this rank, or of a `share`, that begin at window `done` or after it (what lies before is summed up).

    None lies across the border of the windows that give gradients, so that the batch size does not decide how many do;
    of either kind each rank has its share.
    """
    share = share or present().share_of
    first, rest = share(border), share(windows - border)
    rows = [(max(first.start, done), first.stop), (max(border + rest.start, done), border + rest.stop)]
    return [(at, min(at + batch_size, stop)) for start, stop in rows for at in range(start, stop, batch_size)]


def even_spans(windows: int, batch_size: int, done: int = 0) -> Spans:
    """Batches of this rank, as many as of any other: where its share gives fewer they are smaller, or empty.

    As `own_spans` for one process, `done` windows of which are behind it.
    """
    group = present()
    if group.alone:
        return own_spans(windows, windows, batch_size, done)
    own, largest = group.share_of(windows), -(-windows // group.world)
    count = -(-largest // batch_size)
    ends = [own.start + i * (own.stop - own.start) // count for i in range(count + 1)]
    return [(a, b) if a < b else (0, 0) for a, b in pairwise(ends)]


def cost_of(layer: Layer, needs: frozenset[Stat]) -> float:
    """What it takes to decompose a layer, in products: the weight's own eigenproblem, and the roots of its metric."""
    cost = float(layer.outputs * layer.inputs * min(layer.outputs, layer.inputs))
    cost += float(layer.inputs) ** 3 if Stat.GRAM in needs else 0.0
    return cost + (float(layer.outputs) ** 3 if Stat.OUTPUT_GRAD in needs else 0.0)


def owners_of(walk: Walk, needs: frozenset[Stat]) -> dict[str, int]:
    """The rank of every layer; the same on all ranks."""
    ranks = spread_by_cost([cost_of(layer, needs) for layer in walk.layers], present().world)
    return {layer.name: rank for layer, rank in zip(walk.layers, ranks, strict=True)}


def bring_together(
    sums: Mapping[str, Sums],
    leader: Mapping[str, str],
    walk: Walk,
    needs: frozenset[Stat],
    device: torch.device,
    owners: Mapping[str, int] | None,
) -> None:
    """Sums over all ranks in the place of this rank's own, in place, for whoever owns a layer; None: for all.

    What is of no layer of this rank is dropped. Sums that layers share go once to each of their owners. A layer that
    no token of a rank came to counts as zeros there.
    """
    group = present()
    if group.alone:
        return
    counts = group.objects({n: (s.tokens, s.gradient_tokens, s.sequences) for n, s in sums.items()})
    for layer in walk.layers:
        own, partial = sums[layer.name], {}
        own.tokens, own.gradient_tokens, own.sequences = (sum(c[layer.name][i] for c in counts) for i in range(3))
        readers = [name for name, first in leader.items() if first == layer.name]
        for stat in _measured(own, needs, is_leader=bool(readers)):
            part = own.total(stat, _shape(layer, stat), device)
            if owners is None:
                partial[stat] = group.sum_everywhere(part)
                continue
            wanted = {owners[n] for n in (readers if stat in INPUT_STATS else [layer.name])}
            for owner in sorted(wanted):
                total = group.sum_at(owner, part)
                if owner == group.rank:
                    partial[stat] = total
        own.totals = partial


def _measured(own: Sums, needs: frozenset[Stat], *, is_leader: bool) -> list[Stat]:
    """Statistics of a layer that some rank has; the same on all ranks, in the same order."""
    inputs = is_leader and own.tokens > 0
    return [s for s in Stat if s in needs and ((s in INPUT_STATS and inputs) or
            (s in GRADIENT_STATS and own.gradient_tokens > 0))]  # fmt: skip


def _shape(layer: Layer, stat: Stat) -> tuple[int, ...]:
    outputs, inputs = layer.outputs, layer.inputs
    shapes = {Stat.GRAM: (inputs, inputs), Stat.OUTPUT_GRAD: (outputs, outputs)}
    return shapes.get(stat, (inputs,) if stat in INPUT_STATS else (outputs, inputs))


def holders_of(walk: Walk, names: Iterable[str]) -> dict[str, int]:
    """Which rank is to hand each layer round, given the `names` that this rank has; of several the least loaded."""
    held = [set(found) for found in present().objects(list(names))]
    load = [0.0] * len(held)
    holders = {}
    for layer in sorted(walk.layers, key=lambda la: (-cost_of(la, frozenset()), la.name)):
        having = [rank for rank, found in enumerate(held) if layer.name in found]
        assert having, f"no rank has {layer.name}"
        holders[layer.name] = min(having, key=lambda rank: (load[rank], rank))
        load[holders[layer.name]] += cost_of(layer, frozenset())
    return holders


def energies_of_all(model: PreTrainedModel, walk: Walk, energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The energies (K,) of every layer, whoever decomposed it; `energies` has those of this rank."""
    if present().alone:
        return dict(energies)
    own = {name: {"energy": energy} for name, energy in energies.items()}
    return {name: found["energy"] for name, found in _hand_over(model, holders_of(walk, own), own).items()}


def means_of_all(model: PreTrainedModel, walk: Walk, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means (I,) of the inputs of every layer; `means` has those of this rank."""
    if present().alone:
        return dict(means)
    own = {name: {"mean": mean} for name, mean in means.items()}
    return {name: found["mean"] for name, found in _hand_over(model, holders_of(walk, own), own).items()}


def hand_round(
    model: PreTrainedModel,
    walk: Walk,
    spectra: MutableMapping[str, Spectrum],
    means: dict[str, Tensor],
    own: Iterable[str],
    plan: Plan | None = None,
) -> None:
    """Spectra and means of all layers to all ranks, in place; with a `plan`, of layers that are cut only what is kept.

    `own` names those of which this rank has what counts. With a plan, layers that stay dense as they are come without
    components: their weights are everywhere.
    """
    if present().alone:
        return
    given: dict[str, dict[str, Tensor]] = {}
    for name in own:
        left, right, energy = spectra[name]
        rank = len(energy)
        if plan is not None:
            rank = 0 if plan.targets[name].codec == "dense" else plan.targets[name].rank
        given[name] = {"left": left[:, :rank], "right": right[:rank], "energy": energy}
        given[name] |= {"mean": means[name]} if name in means else {}
    for name, found in _hand_over(model, holders_of(walk, given), given).items():
        if "mean" in found:
            means[name] = found.pop("mean")
        spectra[name] = Spectrum(**found)


def handed_some(
    model: PreTrainedModel, names: Sequence[str], holders: Mapping[str, int], own: Callable[[str], Spectrum]
) -> dict[str, Spectrum]:
    """Spectra of a few layers from their holders, which have them as `own` says, for all ranks to look at."""
    if present().alone:
        return {name: own(name) for name in names}
    mine = {name: own(name)._asdict() for name in names if holders[name] == present().rank}
    return {n: Spectrum(**found) for n, found in _hand_over(model, {n: holders[n] for n in names}, mine).items()}


def _hand_over(
    model: PreTrainedModel, holders: Mapping[str, int], own: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Tensors of every layer in `holders`, by layer and name, from its holder to all; `own` has what this rank holds.

    One after the other of the ranks, all its layers at once. No module is called by a name with `=` in it.
    """
    group = present()
    found: dict[str, dict[str, Tensor]] = {name: {} for name in holders}
    for holder in sorted(set(holders.values())):
        names = [name for name, rank in holders.items() if rank == holder]
        mine = None
        if holder == group.rank:
            mine = {f"{name}={part}": tensor for name in names for part, tensor in own[name].items()}
        for key, tensor in group.share(mine, holder, _device(model, names[0])).items():
            name, _, part = key.partition("=")
            found[name][part] = tensor
    return found


def encode_spread(
    model: PreTrainedModel,
    walk: Walk,
    given: Iterable[str],
    made_here: Callable[[Layer], bool],
    encode: Callable[[Layer], Replacement],
) -> dict[str, Replacement]:
    """What `encode` makes of every layer, each made by one rank that is `given` it and handed to all.

    A layer for which `made_here` holds costs nothing to make and is made by every rank from its own model.
    """
    if present().alone:
        return {layer.name: encode(layer) for layer in walk.layers}
    layers = {layer.name: layer for layer in walk.layers}
    holders = holders_of(walk, given)
    mine = {
        la.name: encode(la) for la in walk.layers if made_here(la) or holders[la.name] == present().rank
    }  # all of them first: whoever waits for another's layer should not have work of its own left
    asked = {name: rank for name, rank in holders.items() if not made_here(layers[name])}
    facts: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for name, rank in asked.items():
        if rank == present().rank:
            made = mine[name]
            facts[name] = {"codec": made.codec, "rank": made.rank, "predicted_error": made.predicted_error}
            own[name] = {**made.tensors} if made.bias is None else {**made.tensors, _BIAS: made.bias}
    known = {name: fact for found in present().objects(facts) for name, fact in found.items()}
    handed = {
        name: Replacement(bias=tensors.pop(_BIAS, None), tensors=tensors, **known[name])
        for name, tensors in _hand_over(model, asked, own).items()
    }
    return {la.name: handed.get(la.name) or mine[la.name] for la in walk.layers}


def at_first(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks, on the CPU, at the first rank, which alone needs them; elsewhere none.

    One after the other: no other rank ever holds more than one that is not its own.
    """
    group, cpu = present(), torch.device("cpu")
    found: dict[str, Tensor] = {}
    for holder, names in enumerate(group.objects(sorted(own))):
        for name in names:
            given = {name: own[name].cpu()} if holder == group.rank else None
            handed = group.share(given, holder, cpu)
            found |= handed if group.is_first else {}
    return found


def sum_of_facts(values: Sequence[float]) -> list[float]:
    """Sums over ranks of a few numbers, in float64."""
    if present().alone:
        return list(values)
    return present().sum_everywhere(torch.tensor(values, dtype=torch.float64)).tolist()


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Gradients of all ranks added up, in place; one that no rank has stays None.

    Each rank's loss must already count by its share of the batch.
    """
    group = present()
    if group.alone:
        return
    there = group.objects([parameter.grad is not None for parameter in parameters])
    reached = [p for p, *found in zip(parameters, *there, strict=True) if any(found)]
    if not reached:
        return
    with torch.no_grad():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in reached])
        parts = group.sum_everywhere(flat).split([p.numel() for p in reached])
        for parameter, part in zip(reached, parts, strict=True):
            summed = part.reshape(parameter.shape)
            if parameter.grad is None:
                parameter.grad = summed.clone()
            else:
                parameter.grad.copy_(summed)


def is_own(name: str, owners: Mapping[str, int] | None) -> bool:
    """Whether a layer is this rank's; without owners all are everybody's."""
    return owners is None or owners[name] == present().rank


def of_nothing(walk: Walk, tokens: int, *, owned: bool) -> dict[str, Stats]:
    """What methods are given that measure nothing: for all layers, or for those of this rank."""
    owners = owners_of(walk, frozenset()) if owned else None
    return {layer.name: Stats(tokens=tokens) for layer in walk.layers if is_own(layer.name, owners)}


def layers_of(walk: Walk, names: Iterable[str]) -> Walk:
    """The walk over some of its layers."""
    chosen = set(names)
    return dataclasses.replace(walk, layers=tuple(layer for layer in walk.layers if layer.name in chosen))


def _device(model: PreTrainedModel, name: str) -> torch.device:
    return weight_of(model.get_submodule(name)).device
