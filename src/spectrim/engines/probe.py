"""What the model makes of predicted losses: probes of a choice of forms on a few windows, nothing coded for them.

A layer in codes is its weight plus noise of the kind that codes leave,

    W + f Q diag(1 / U_jj) U,     Q_ij = s_i n_ij,  n normal, of a fixed seed,     f^2 = predicted loss / loss over D

(column feedback carries the error of a column to those after it, so that its loss is the predicted one in expectation);
a low-rank one is its cut plus such noise. Forward passes of such models say what predictions do not:

probed      kinds of layers (all query projections, ...) one at a time in their forms, all others dense: KL(dense ||
            probed) over the predicted sum corrects that kind's losses, and forms are chosen again
evopress    EvoPress (Sieberling et al., arXiv 2410.14649) from the predicted choice: children that differ by a few
            steps up some menus, paid for by steps down others; selection as in engines/search.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.engines.forms import Form, Menu
from spectrim.engines.measure import Progress, frozen
from spectrim.engines.search import MOST_EXCHANGES, STAGES, draw
from spectrim.linalg.allocate import Options
from spectrim.linalg.divergence import mean_kl
from spectrim.linalg.predicted import Measured, code_noise, in_parts
from spectrim.models.walk import Walk, device_of, weight_of

WINDOWS = 8
"""That a probe looks at."""
MOST_CORRECTION = 4.0
"""Either way: what a few windows say beyond it is noise, or nothing a factor can mend."""

Choice = list[int]


class Noise:
    """What a layer is in any of its forms."""

    def __init__(self, measured: Measured, seed: int) -> None:
        weight, upper = measured.weight, measured.upper
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        rows = weight.square().mean(1).sqrt()[:, None]
        self.direction = (rows * drawn.to(weight) / upper.diagonal() @ upper).float()
        self.loss = code_noise(measured)
        self.measured = measured

    def stand_in(self, form: Form, loss: float) -> Tensor:
        """A weight (O, I) float32 that loses what this form is predicted to."""
        weight = self.measured.weight
        if form.kind in ("factor", "pivot"):
            parts = in_parts(self.measured)
            loss -= parts.cut(form.rank)
            left, right = parts.factors(form.rank)
            weight = left @ right
        size = (max(loss, 0.0) / self.loss) ** 0.5 if self.loss > 0 else 0.0
        return weight.float() + size * self.direction


@dataclass
class Probed:
    """A model whose layers can be set to stand-ins, and what judges it."""

    dense: PreTrainedModel
    student: PreTrainedModel
    names: Sequence[str]
    noises: Mapping[str, Noise]
    menus: Sequence[Menu]
    now: dict[str, int] = field(default_factory=dict)  # layers that are not dense, and their form

    def kl(self, choice: Mapping[str, int], ids: Tensor) -> float:
        """KL(dense || probed) on `ids` (windows, length), nats a token, in float32; layers not named are dense."""
        for index, name in enumerate(self.names):
            wanted = choice.get(name)
            if wanted != self.now.get(name):
                self._set(index, wanted)
        total = 0.0
        for window in ids:
            wanted_logits, own = (exact_logits(model, window[None]) for model in (self.dense, self.student))
            total += float(mean_kl(own, wanted_logits))
        return total / len(ids)

    def _set(self, index: int, wanted: int | None) -> None:
        name, menu = self.names[index], self.menus[index]
        module = self.student.get_submodule(name)
        dense = self.dense.get_submodule(name)
        if wanted is None:
            made = weight_of(dense).detach()
            self.now.pop(name, None)
        else:
            made = self.noises[name].stand_in(menu.forms[wanted], float(menu.options.error[wanted]))
            self.now[name] = wanted
        assert isinstance(module.weight, torch.nn.Parameter)
        assert isinstance(dense.weight, Tensor)
        stored = made.mT if isinstance(dense, Conv1D) else made  # not by shape: GPT-2 has square ones
        module.weight = torch.nn.Parameter(stored.to(dense.weight.dtype), requires_grad=False)


def kinds_of(walk: Walk) -> dict[str, list[int]]:
    """Positions of layers by their place in a block; experts of a layer are of one kind."""
    kinds: dict[str, list[int]] = {}
    for index, layer in enumerate(walk.layers):
        inside = layer.name.removeprefix(f"{walk.block_names[layer.block]}.")
        kinds.setdefault(".".join(part for part in inside.split(".") if not part.isdigit()), []).append(index)
    return kinds


def corrections(probed: Probed, walk: Walk, choice: Choice, ids: Tensor) -> dict[str, float]:
    """What the predicted losses of each kind of layer are to be multiplied by, by `ids` (windows, length)."""
    found = {}
    with frozen(probed.dense):
        for kind, places in kinds_of(walk).items():
            predicted = sum(float(probed.menus[i].options.error[choice[i]]) for i in places)
            if predicted <= 0:
                continue
            measured = probed.kl({probed.names[i]: choice[i] for i in places}, ids)
            found[kind] = min(max(measured / predicted, 1 / MOST_CORRECTION), MOST_CORRECTION)
        probed.kl({}, ids[:1])
    return found


def corrected(menus: Sequence[Menu], walk: Walk, by_kind: Mapping[str, float]) -> list[Options]:
    """The menus' options with corrected losses."""
    made = [menu.options for menu in menus]
    for kind, places in kinds_of(walk).items():
        for i in places:
            made[i] = Options(made[i].error * by_kind.get(kind, 1.0), made[i].cost)
    return made


def evolve_forms(
    probed: Probed,
    start: Choice,
    budget: int,
    ids: Tensor,
    *,
    generations: int,
    offspring: int,
    seed: int,
    progress: Progress | None = None,
) -> Choice:
    """The parent after all generations; no choice costs more than `budget`."""
    generator = torch.Generator().manual_seed(seed)
    steps = [steps_of(menu.options) for menu in probed.menus]
    parent = [own.index(k) if k in own else 0 for own, k in zip(steps, start, strict=True)]

    def judge(levels: Sequence[int], windows: Tensor) -> float:
        return probed.kl({n: steps[i][level] for i, (n, level) in enumerate(zip(probed.names, levels, strict=True))},
                         windows)  # fmt: skip

    with frozen(probed.dense):
        for generation in range(generations):
            made = {tuple(_child(parent, steps, probed.menus, budget, generator)) for _ in range(offspring)}
            children = sorted(made - {tuple(parent)})
            for survivors, count in STAGES:
                if survivors == STAGES[-1][0]:
                    children = [tuple(parent), *children]
                windows = draw(ids, count, generator)
                fitness = {child: judge(child, windows) for child in children}
                children = sorted(children, key=fitness.__getitem__)[:survivors]
            parent = list(children[0])
            if progress is not None:
                progress("evopress", generation + 1, generations)
    return [own[level] for own, level in zip(steps, parent, strict=True)]


def steps_of(options: Options) -> list[int]:
    """The options that no other beats in both error and cost, cheapest first."""
    order = sorted(range(len(options.cost)), key=lambda k: (int(options.cost[k]), float(options.error[k])))
    kept: list[int] = []
    for k in order:
        if not kept or float(options.error[k]) < float(options.error[kept[-1]]):
            kept.append(k)
    return kept


def _child(
    parent: Sequence[int], steps: Sequence[list[int]], menus: Sequence[Menu], budget: int, generator: torch.Generator
) -> list[int]:
    """One to MOST_EXCHANGES layers take a step up, then others steps down until the budget is met."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    child, raised = list(parent), set[int]()
    for _ in range(1 + min(pick(MOST_EXCHANGES), pick(MOST_EXCHANGES))):
        layer = pick(len(child))
        if child[layer] + 1 < len(steps[layer]):
            child[layer] += 1
            raised.add(layer)
    cost = sum(int(menu.options.cost[own[level]]) for menu, own, level in zip(menus, steps, child, strict=True))
    while cost > budget:
        lower = [i for i, level in enumerate(child) if level and i not in raised]
        if not lower:
            return list(parent)
        layer = lower[pick(len(lower))]
        options, own = menus[layer].options, steps[layer]
        child[layer] -= 1
        cost += int(options.cost[own[child[layer]]]) - int(options.cost[own[child[layer] + 1]])
    return child


@torch.no_grad()
def exact_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (windows, length, V) in the precision of the weights: small divergences are lost in bf16."""
    return model(input_ids=ids.to(device_of(model)), use_cache=False).logits
