"""Learning one order: scores are trained while the model shrinks past all anchor sizes, from large to small.

On the way from one anchor to the next the cheapest components are pruned, for good, a few at a time; then the scores
settle at the anchor and are noted. The order is that in which components went, the last to go first. A component that
was pruned keeps its last score, so that scores between two anchors can be interpolated.
"""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.learned import collapsed, relax, remember, skeleton, step_loss
from spectrim.engines.loop import Buffers, Group, Training, train
from spectrim.engines.measure import Progress, frozen
from spectrim.engines.order import Order, worth_of_steps
from spectrim.engines.pack import below, fill, find, with_prefix
from spectrim.engines.ranks import weight_budget
from spectrim.errors import UsageError
from spectrim.linalg.factor import Spectrum
from spectrim.linalg.ladder import cut, growth_order, ladder_costs, levels_of
from spectrim.method import Components, LearnedMethod
from spectrim.models.walk import Walk
from spectrim.nn.scored import ScoredLinear
from spectrim.options import ANY_SIZE_STEPS

FALL = 0.4
"""Share of an anchor's steps in which the budget comes down from the anchor before."""


def learn_order(
    method: LearnedMethod,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    anchors: tuple[float, ...],
    ids: Tensor,
    *,
    steps: int = ANY_SIZE_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Order:
    """Learn over `ids` (windows, length), the same number of steps at each anchor; the teacher is not changed.

    Each anchor is a stage of its own in the `checkpoint`; its state says how far the whole descent has come.
    """
    each = steps // len(anchors)
    if each < 1:
        raise UsageError(f"{steps} steps for {len(anchors)} anchors: each needs at least one")
    student = skeleton(teacher)
    scored = relax(student, walk, spectra)
    descent = Descent(method, walk, scored, {name: torch.zeros_like(layer.scores) for name, layer in scored.items()})
    rows = {name: [torch.ones_like(layer.scores)] for name, layer in scored.items()}
    losses: list[float] = []
    with frozen(student), frozen(teacher):
        for position, (before, anchor) in enumerate(pairwise((1.0, *anchors))):
            losses += train(
                Training(
                    stage=f"scores {position}",
                    label=f"learn scores at {anchor:g}",
                    says=method.info.name,
                    advice=f"Lower the learning rate (--set learning_rate={method.learning_rate / 3:.2g})",
                    groups=[Group(parameters={n: la.scores for n, la in scored.items()}, peak=method.learning_rate)],
                    loss=lambda batch: step_loss(method, student, teacher, batch),
                    optimizer=lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95)),
                    steps=each,
                    batch_size=method.batch_size,
                    seed=seed + position,
                    before_step=partial(descent.fall, before=before, anchor=anchor, steps=each),
                    after_backward=lambda _: remember(scored, descent.gradients),
                    state=descent.state,
                    restore=descent.restore,
                ),
                ids,
                progress=progress,
                checkpoint=checkpoint,
            )
            descent.to(anchor)  # where too few steps left no time to come down
            for name, layer in scored.items():
                rows[name].append(layer.scores.detach().clone())
    return descent.order(spectra, (1.0, *anchors), rows, tuple(losses), tuple(collapsed(scored)))


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
        self.costs = [ladder_costs(layer.outputs, layer.inputs, method.alone) for layer in walk.layers]
        self.option = [len(costs) - 1 for costs in self.costs]
        # Components of each layer: those that are left, strongest first, then those that went, the last to go first.
        self.places = [torch.arange(len(scored[layer.name].energy)) for layer in walk.layers]
        self.gone: list[Tensor] = []  # layers of the steps that were taken back, one tensor for each time

    def fall(self, step: int, *, before: float, anchor: float, steps: int) -> None:
        """Come down from one anchor to the next, every few of the first steps at the new one."""
        falls = max(1, int(FALL * steps) // self.method.project_every)
        fallen, rest = divmod(step, self.method.project_every)
        if rest == 0 and fallen < falls:
            self.to(before + (anchor - before) * (fallen + 1) / falls)

    def to(self, size: float) -> None:
        """Prune to `size`: of the steps that are left, only the worthiest that fit the budget stay."""
        order = growth_order(self._worth())
        levels = levels_of(order, len(self.costs))
        left = [costs[: k + 1] for costs, k in zip(self.costs, self.option, strict=True)]
        self.option = cut(left, levels, weight_budget(self.walk, size, self.method.alone))
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
        state = Components(energy=layer.energy, scores=layer.scores.detach(), kept=layer.mask.bool(), gradient=gradient)
        return self.method.price(state).double().cpu()

    def state(self) -> Buffers:
        """All that is not in the scores."""
        names = [layer.name for layer in self.walk.layers]
        tensors = {
            **with_prefix(self.gradients, "gradient"),
            **with_prefix({name: self.scored[name].mask for name in names}, "mask"),
            **with_prefix(dict(zip(names, self.places, strict=True)), "places"),
            **with_prefix({str(i): gone for i, gone in enumerate(self.gone)}, "gone"),
        }
        return Buffers(tensors, {"option": list(self.option), "gone": len(self.gone)})

    def restore(self, saved: Buffers) -> None:
        """Take up what `state` gave."""
        names = [layer.name for layer in self.walk.layers]
        fill(self.gradients, below(saved.tensors, "gradient"), "scores")
        fill({name: self.scored[name].mask for name in names}, below(saved.tensors, "mask"), "scores")
        self.places = [find(saved.tensors, f"places.{name}").cpu() for name in names]
        self.gone = [find(saved.tensors, f"gone.{i}").cpu() for i in range(saved.facts["gone"])]
        self.option = list(saved.facts["option"])

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
