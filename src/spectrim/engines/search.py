"""Ranks chosen by what the whole model does with them, for any method: two searches over levels.

A level is a share of a layer's numbers; the same level costs layers of one shape the same, so levels can be exchanged.
Every layer starts at the level of the request. The fitness of a choice is KL(dense || compressed) on calibration
windows; a cut is multiplied out from its components when it is looked at, nothing is stored.

sensitivity   each layer alone at a few levels, all others dense; then the least sum under the budget (linalg/allocate).
              The sweep of LoRD (arXiv 2309.14021), which then goes on by hand. It supposes that losses add up.
evopress      EvoPress (Sieberling et al., arXiv 2410.14649): from the parent, `offspring` children that differ by one
              to three exchanges (one layer a level up, another of its shape a level down). Selection in stages, each on
              a fresh mini-batch, more windows for fewer children; the parent competes in the last stage, on the same
              windows. Supposes nothing; the budget holds at every step.

What the levels leave of the budget is spent evenly at the end. Windows are drawn with the run's seed. They are judged
all at once; where memory runs out, in parts, and the dense logits are then worked out again for every look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.layerwise import place_cut
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.ranks import Plan, Priced, budget_under, menu_of, plan_of
from spectrim.linalg.allocate import Options, allocate, fill_uniform
from spectrim.linalg.divergence import mean_kl
from spectrim.linalg.factor import Spectrum
from spectrim.memory import Batch
from spectrim.method import LayerMethod
from spectrim.models.walk import Walk, device_of

SENSITIVITY_LEVELS, SENSITIVITY_WINDOWS = 5, 4
STAGES = ((4, 2), (1, 8))
"""Of a generation of EvoPress: (how many survive, windows that judge them)."""
MOST_WINDOWS = 8
"""That judge at a time, in any of them."""
MOST_EXCHANGES = 3
LEVEL_STEP = 0.05
"""Between levels, about, in shares of a layer."""

Choice = tuple[int, ...]
"""The level of every layer."""


@dataclass
class Searched:
    """A model whose layers can be set to any level, and the levels."""

    method: LayerMethod
    dense: PreTrainedModel
    student: PreTrainedModel
    priced: Sequence[Priced]
    spectra: Mapping[str, Spectrum]
    means: Mapping[str, Tensor]
    options: list[list[int]]  # [layer][level] an index into the layer's menu
    start: int  # the level of the request
    now: list[int]  # what each layer of the student is at; the last level at first
    batch: Batch = field(default_factory=lambda: Batch(MOST_WINDOWS))

    def set(self, choice: Sequence[int]) -> None:
        """Put every layer that differs at its level."""
        for index, (wanted, own) in enumerate(zip(choice, self.now, strict=True)):
            if wanted == own:
                continue
            name = self.priced[index].layer.name
            target = self.priced[index].targets[self.options[index][wanted]]
            place_cut(self.student, self.dense, name, self.spectra[name], target, self.means.get(name))
            self.now[index] = wanted

    def cost(self, choice: Sequence[int]) -> int:
        """Numbers that a choice stores."""
        chosen = zip(self.priced, self.options, choice, strict=True)
        return sum(int(own.options.cost[levels[level]]) for own, levels, level in chosen)

    def fitness(self, choice: Sequence[int], judged: "Judged") -> float:
        """KL(dense || compressed), nats a token, on the windows that judge."""
        self.set(choice)
        return self.batch.run(self.method.allocation, partial(self._loss, judged), most=len(judged.ids))

    @torch.no_grad()
    def _loss(self, judged: "Judged", size: int) -> float:
        parts = judged.ids.split(size)
        losses = [float(mean_kl(logits(self.student, part), judged.teacher(self.dense, part))) for part in parts]
        if len(parts) == 1:
            return losses[0]
        return sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(judged.ids)


@dataclass
class Judged:
    """Windows (windows, length) that judge choices, and the dense logits of them while one batch holds them all."""

    ids: Tensor
    logits: Tensor | None = None

    def teacher(self, dense: PreTrainedModel, part: Tensor) -> Tensor:
        """The dense logits of some of the windows."""
        if len(part) < len(self.ids):
            self.logits = None
            return logits(dense, part)
        if self.logits is None:
            self.logits = logits(dense, part)
        return self.logits


def searched_plan(
    method: LayerMethod,
    dense: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    means: Mapping[str, Tensor],
    keep: float,
    ids: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Targets that keep `keep` of the numbers by the method's `allocation`, judged on `ids` (windows, length)."""
    generator = torch.Generator().manual_seed(seed)
    budget = budget_under(method, walk, keep)
    with frozen(dense):
        searched = searchable(method, dense, walk, spectra, means, keep)
        priced = searched.priced
        if method.allocation == "sensitivity":
            return plan_of(priced, by_sensitivity(searched, ids, budget, generator, progress), walk)
        choice = evolve(searched, ids, budget, generator, method.generations, method.offspring, progress)
    picked = [searched.options[layer][level] for layer, level in enumerate(choice)]
    costs = [own.options.cost for own in priced]
    plan = plan_of(priced, fill_uniform(costs, picked, budget), walk)
    assert plan.numbers_after <= keep * walk.numbers, f"{plan.numbers_after} numbers of {keep * walk.numbers:.0f}"
    return plan


def searchable(
    method: LayerMethod,
    dense: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    means: Mapping[str, Tensor],
    keep: float,
) -> Searched:
    """A copy of `dense` whose layers can be set to any level; all are dense at first."""
    priced = menu_of(method, walk, {name: spectrum.energy for name, spectrum in spectra.items()})
    options, start = levels_of(priced, budget_under(method, walk, keep))
    return Searched(
        method, dense, skeleton(dense), priced, spectra, means, options, start, [len(own) - 1 for own in options]
    )


def levels_of(priced: Sequence[Priced], budget: int) -> tuple[list[list[int]], int]:
    """[layer][level] indices into each layer's menu, and the level whose shares together meet the budget.

    Evenly spaced shares from that level's step up to 1 (dense). A share too small for any rank means the first option.
    """
    share = budget / sum(own.layer.weight_numbers for own in priced)
    above = max(1, round((1 - share) / LEVEL_STEP))
    step = (1 - share) / above
    below = max(0, round(share / step) - 1)
    shares = [share + k * step for k in range(-below, above)]
    options = []
    for own in priced:
        fits = [max(0, int((own.options.cost <= s * own.layer.weight_numbers).sum()) - 1) for s in shares]
        options.append([*fits, len(own.options.cost) - 1])
    return options, below


def by_sensitivity(
    searched: Searched, ids: Tensor, budget: int, generator: torch.Generator, progress: Progress | None
) -> list[int]:
    """An index into each layer's menu: the least sum of what the model loses with one layer cut."""
    judged = Judged(draw(ids, SENSITIVITY_WINDOWS, generator))
    top = len(searched.options[0]) - 1
    levels = sorted({round(k * top / SENSITIVITY_LEVELS) for k in range(SENSITIVITY_LEVELS)})
    menu, picks = [], []
    for index, own in enumerate(searched.priced):
        loss = {}
        for level in levels:
            choice = [level if other == index else top for other in range(len(searched.now))]
            loss[searched.options[index][level]] = searched.fitness(choice, judged)
        loss[searched.options[index][top]] = 0.0
        picks.append(list(loss))
        menu.append(Options(torch.tensor(list(loss.values()), dtype=torch.float64), own.options.cost[list(loss)]))
        if progress is not None:
            progress("sensitivity", index + 1, len(searched.now))
    chosen = [pick[k] for pick, k in zip(picks, allocate(menu, budget), strict=True)]
    return fill_uniform([own.options.cost for own in searched.priced], chosen, budget)


def evolve(
    searched: Searched,
    ids: Tensor,
    budget: int,
    generator: torch.Generator,
    generations: int,
    offspring: int,
    progress: Progress | None,
) -> Choice:
    """The parent after all generations; no choice costs more than the budget.

    Near rank 1, where a small layer's share buys no rank, equal levels cost more than their shares: the start is then
    the highest level that fits.
    """
    groups = shapes(searched)
    start = searched.start
    while start > 0 and searched.cost([start] * len(searched.now)) > budget:
        start -= 1
    parent: Choice = tuple([start] * len(searched.now))
    for generation in range(generations):
        children = {exchanged(parent, groups, searched.options, generator) for _ in range(offspring)} - {parent}
        affordable = sorted(child for child in children if searched.cost(child) <= budget)
        parent = select(searched, parent, affordable, ids, generator)
        if progress is not None:
            progress("evopress", generation + 1, generations)
    return parent


def select(
    searched: Searched, parent: Choice, candidates: list[Choice], ids: Tensor, generator: torch.Generator
) -> Choice:
    """The one survivor of a generation; a parent is never judged by windows of another generation."""
    for survivors, windows in STAGES:
        if survivors == STAGES[-1][0]:
            candidates = [parent, *candidates]
        judged = Judged(draw(ids, windows, generator))
        fitness = {choice: searched.fitness(choice, judged) for choice in candidates}
        candidates = sorted(candidates, key=fitness.__getitem__)[:survivors]
    return candidates[0]


def exchanged(parent: Choice, groups: list[list[int]], options: list[list[int]], generator: torch.Generator) -> Choice:
    """A child: one to MOST_EXCHANGES exchanges of a level within a group, few being likelier than many."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    child, top = list(parent), len(options[0]) - 1
    members = [(group, layer) for group in groups for layer in group if len(group) > 1]
    if not members:
        return parent
    for _ in range(1 + min(pick(MOST_EXCHANGES), pick(MOST_EXCHANGES))):
        group, up = members[pick(len(members))]
        down = group[pick(len(group))]
        if up != down and child[up] < top and child[down] > 0:
            child[up] += 1
            child[down] -= 1
    return tuple(child)


def shapes(searched: Searched) -> list[list[int]]:
    """Positions of the layers of each shape: a level costs them the same."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for index, own in enumerate(searched.priced):
        groups.setdefault((own.layer.outputs, own.layer.inputs, own.layer.has_bias), []).append(index)
    return list(groups.values())


def draw(ids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different windows (all, if there are fewer)."""
    return ids[torch.randperm(len(ids), generator=generator)[:count]]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (windows, length, V)."""
    with autocast(device_of(model)):
        return model(input_ids=ids.to(device_of(model)), use_cache=False).logits
