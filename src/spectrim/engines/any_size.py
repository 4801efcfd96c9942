"""One run for all sizes: a basis that serves them all, one order of all components, scores at a few anchor sizes.

1. measure, decompose; measure again in the model compressed to a middle size, average (as any run does, at one size)
2. closed form: order the steps of all layers by what they save a number                    linalg/ladder.py
3. learned methods instead walk the anchors from large to small. On the way from one anchor to the next the cheapest
   components are pruned, for good, a few at a time; then the scores settle at the anchor and are noted. The order is
   that in which components went, the last to go first.

A component that was pruned keeps its last score, so that scores between two anchors can be interpolated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.layerwise import swap, weight_budget
from spectrim.engines.learned import (
    collapsed,
    relax,
    remember,
    require_finite,
    require_finite_scores,
    set_learning_rate,
    skeleton,
    step_loss,
)
from spectrim.engines.measure import Progress, frozen
from spectrim.engines.nested import Nested, nest, plan_at, slice_at
from spectrim.engines.pipeline import timed
from spectrim.errors import UsageError
from spectrim.linalg.factor import Spectrum
from spectrim.linalg.ladder import cut, growth_order, hull_slopes, ladder_costs, ladder_errors, levels_of
from spectrim.method import Components, LayerMethod, LearnedMethod, Storage
from spectrim.models.walk import Layer, Walk, linear_at
from spectrim.nn.scored import ScoredLinear

ANCHORS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35)
STEPS = 800
"""Training steps of all anchors together."""
MIDDLE = 0.6
"""The size at which statistics are measured for the second time."""
FALL = 0.4
"""Share of an anchor's steps in which the budget comes down from the anchor before."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one run found: components in order, their scores at each anchor, and when each layer grows."""

    spectra: Mapping[str, Spectrum]
    anchors: tuple[float, ...]  # sizes of the rows of the scores, descending from 1
    scores: Mapping[str, Tensor]  # (A, K)
    levels: Mapping[str, Tensor]  # (S,)
    losses: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(kw_only=True)
class AnySize:
    """A model in all sizes between `smallest` and 1; the dense model is not changed."""

    dense: PreTrainedModel
    method: LayerMethod
    walk: Walk
    layers: Mapping[str, Nested]
    anchors: tuple[float, ...]
    smallest: float
    order: Order
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def storage(self) -> Storage:
        return self.method.storage

    def at(self, size: float) -> PreTrainedModel:
        """The model at `size` as it will be loaded, rounded to the stored dtype, held in the dtype of the dense one."""
        plan = plan_at(self.walk, {name: n.levels for name, n in self.layers.items()}, self.storage, size)
        student = skeleton(self.dense)
        for layer in self.walk.layers:
            placed = slice_at(self.layers[layer.name], plan.targets[layer.name], self.anchors, size)
            swap(student, layer.name, placed)
            student.get_submodule(layer.name).to(next(self.dense.parameters()).dtype)
        return student.eval()


def check_anchors(anchors: tuple[float, ...]) -> None:
    """Anchors descend strictly inside (0, 1)."""
    descending = all(a > b for a, b in zip(anchors, anchors[1:], strict=False))
    if not anchors or not descending or not 0 < anchors[-1] <= anchors[0] < 1:
        raise UsageError(f"anchors must descend strictly between 1 and 0, got {', '.join(f'{a:g}' for a in anchors)}")


def check_method(method: LayerMethod, recovery: tuple[str, ...] = ()) -> None:
    """Steps that change factors for one size only cannot serve all sizes."""
    if getattr(method, "distil_steps", 0):
        raise UsageError(
            f"method {method.info.name}: distil_steps={getattr(method, 'distil_steps', 0)} trains the factors of one size; "
            "--any-size needs factors that serve all sizes: use --preset balanced or fast"
        )
    steps = (*method.recovery, *recovery)
    if steps:
        raise UsageError(
            f"method {method.info.name}: the recovery step {steps[0]!r} refits the factors of one size; leave it out "
            "with --any-size"
        )


def build(
    dense: PreTrainedModel,
    method: LayerMethod,
    order: Order,
    walk: Walk,
    dtype: torch.dtype,
    *,
    seconds: dict[str, float] | None = None,
) -> AnySize:
    """Round what was found to the stored dtype, one layer after the other."""
    layers = {}
    for layer in walk.layers:
        bias = linear_at(dense, layer.name).bias
        layers[layer.name] = nest(
            order.spectra[layer.name], order.scores[layer.name], order.levels[layer.name], bias, dtype
        )
    return AnySize(
        dense=dense, method=method, walk=walk, layers=layers, anchors=order.anchors, smallest=order.anchors[-1],
        order=order, seconds={} if seconds is None else seconds,
    )  # fmt: skip


def closed_order(method: LayerMethod, walk: Walk, spectra: Mapping[str, Spectrum], anchors: tuple[float, ...]) -> Order:
    """Components in the order of their spectra, all scores 1; one row of scores would do, the anchors are kept."""
    worth = [
        worth_of_steps(method, la, ladder_costs(la.outputs, la.inputs, method.storage), spectra[la.name].energy)
        for la in walk.layers
    ]
    levels = levels_of(growth_order(worth), len(walk.layers))
    rows = (1.0, *anchors)
    return Order(
        spectra=spectra,
        anchors=rows,
        scores={name: torch.ones(len(rows), len(s.energy)) for name, s in spectra.items()},
        levels={layer.name: level for layer, level in zip(walk.layers, levels, strict=True)},
    )


def worth_of_steps(method: LayerMethod, layer: Layer, costs: Tensor, price: Tensor) -> Tensor:
    """What each step of a ladder with `costs` (S+1,) is worth (S,), not ascending; `price` (K,) strongest first.

    Global budget: error saved a number. Equal shares: the layer that has the smaller share grows first.
    """
    if method.allocation == "uniform":
        return -costs[1:].double() / layer.weight_numbers
    return hull_slopes(costs, ladder_errors(price, len(costs)).cpu())


def learn_order(
    method: LearnedMethod,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    anchors: tuple[float, ...],
    ids: Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Order:
    """Step 3 over `ids` (windows, length); the teacher is not changed."""
    each = steps // len(anchors)
    if each < 1:
        raise UsageError(f"{steps} steps for {len(anchors)} anchors: each needs at least one")
    student = skeleton(teacher)
    scored = relax(student, walk, spectra)
    parameters = [layer.scores for layer in scored.values()]
    optimizer = torch.optim.Adam(parameters, lr=method.learning_rate, betas=(0.9, 0.95))
    gradients = {name: torch.zeros_like(layer.scores) for name, layer in scored.items()}
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    device = parameters[0].device
    descent = Descent(method, walk, scored, gradients)
    rows = {name: [torch.ones_like(layer.scores)] for name, layer in scored.items()}
    losses: list[Tensor] = []
    before = 1.0
    with frozen(student), frozen(teacher):
        for layer in scored.values():
            layer.scores.requires_grad_(True)
        for anchor in anchors:
            falls = max(1, int(FALL * each) // method.project_every)
            for step in range(each):
                fallen, rest = divmod(step, method.project_every)
                if rest == 0 and fallen < falls:
                    descent.to(before + (anchor - before) * (fallen + 1) / falls)
                set_learning_rate(optimizer, method.learning_rate, step, each)
                pick = shuffled[(torch.arange(method.batch_size) + len(losses) * method.batch_size) % len(shuffled)]
                loss = step_loss(method, student, teacher, ids[pick].to(device))
                require_finite(loss, len(losses), method)
                loss.backward()
                remember(scored, gradients)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                if progress is not None:
                    progress("learn scores", len(losses), each * len(anchors))
            descent.to(anchor)  # where too few steps left no time to come down
            before = anchor
            for name, layer in scored.items():
                rows[name].append(layer.scores.detach().clone())
    require_finite_scores(scored, method)
    return descent.order(spectra, (1.0, *anchors), rows, tuple(float(x) for x in losses), tuple(collapsed(scored)))


class Descent:
    """Which components are left, and in which order the others went. Sizes only ever fall."""

    def __init__(
        self,
        method: LearnedMethod,
        walk: Walk,
        scored: Mapping[str, ScoredLinear],
        gradients: Mapping[str, Tensor],
    ) -> None:
        self.method, self.walk, self.scored, self.gradients = method, walk, scored, gradients
        self.costs = [ladder_costs(layer.outputs, layer.inputs, method.storage) for layer in walk.layers]
        self.option = [len(costs) - 1 for costs in self.costs]
        # Components of each layer: those that are left, strongest first, then those that went, the last to go first.
        self.places = [torch.arange(len(scored[layer.name].energy)) for layer in walk.layers]
        self.gone: list[Tensor] = []  # layers of the steps that were taken back, one tensor for each time

    def to(self, size: float) -> None:
        """Prune to `size`: of the steps that are left, only the worthiest that fit the budget stay."""
        order = growth_order(self._worth())
        levels = levels_of(order, len(self.costs))
        left = [costs[: k + 1] for costs, k in zip(self.costs, self.option, strict=True)]
        self.option = cut(left, levels, weight_budget(self.walk, size, self.method.storage))
        self.gone.append(order[sum(self.option) :])
        for layer, places, option, costs in zip(self.walk.layers, self.places, self.option, self.costs, strict=True):
            mask = self.scored[layer.name].mask
            mask.zero_()
            mask[places[: self._rank(option, costs, places)]] = 1

    def _worth(self) -> list[Tensor]:
        """What each remaining step is worth; sorts the components that are left on the way."""
        worth = []
        for i, layer in enumerate(self.walk.layers):
            price = self._price(self.scored[layer.name], self.gradients[layer.name])
            costs, places = self.costs[i][: self.option[i] + 1], self.places[i]
            left = places[: self._rank(self.option[i], self.costs[i], places)]
            left = left[price[left].argsort(descending=True, stable=True)]
            self.places[i] = torch.cat([left, places[len(left) :]])
            worth.append(worth_of_steps(self.method, layer, costs, price[left]))
        return worth

    def _price(self, layer: ScoredLinear, gradient: Tensor) -> Tensor:
        state = Components(
            energy=layer.energy, scores=layer.scores.detach(), kept=layer.mask.bool(), gradient=gradient
        )
        return self.method.price(state).double().cpu()

    @staticmethod
    def _rank(option: int, costs: Tensor, places: Tensor) -> int:
        return len(places) if option == len(costs) - 1 else option + 1

    def order(
        self,
        spectra: Mapping[str, Spectrum],
        anchors: tuple[float, ...],
        rows: Mapping[str, list[Tensor]],
        losses: tuple[float, ...],
        warnings: tuple[str, ...],
    ) -> Order:
        """The order that the descent left behind: what remains, then what went, the last first."""
        whole = torch.cat([growth_order(self._worth()), *reversed(self.gone)])
        levels = levels_of(whole, len(self.costs))
        found: dict[str, Spectrum] = {}
        scores: dict[str, Tensor] = {}
        for layer, places in zip(self.walk.layers, self.places, strict=True):
            spectrum = spectra[layer.name]
            index = places.to(spectrum.energy.device)
            found[layer.name] = Spectrum(spectrum.left[:, index], spectrum.right[index], spectrum.energy[index])
            scores[layer.name] = torch.stack(rows[layer.name])[:, index]
        return Order(
            spectra=found,
            anchors=anchors,
            scores=scores,
            levels={layer.name: level for layer, level in zip(self.walk.layers, levels, strict=True)},
            losses=losses,
            warnings=warnings,
        )


def find_order(
    dense: PreTrainedModel,
    method: LayerMethod,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    anchors: tuple[float, ...],
    training: Tensor,
    *,
    steps: int,
    seed: int,
    clock: dict[str, float],
    progress: Progress | None,
) -> Order:
    """Steps 2 or 3, whichever the method is."""
    if isinstance(method, LearnedMethod) and method.steps > 0:
        with timed(clock, "learn"):
            return learn_order(
                method, dense, walk, spectra, anchors, training, steps=steps, seed=seed, progress=progress
            )
    with timed(clock, "allocate"):
        return closed_order(method, walk, spectra, anchors)
