"""Training scores on frozen spectra, for every method that states loss, budget and prices.

relax     every target layer becomes a ScoredLinear (scores 1, all components present); of large models they are put
          in block by block, from whichever process has them, and shared out among processes where asked (sharded.py)
train     loss against the dense model; every few steps the components are priced and the masks projected
          onto the budget of that moment
harden    the last masks and scores become factors of the ranks they imply
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.loop import Buffers, Group, Training, train
from spectrim.engines.measure import Progress, both_logits, frozen
from spectrim.engines.pack import fill, with_prefix
from spectrim.engines.ranks import Plan, plan_from_facts, plan_ranks, plan_to_facts
from spectrim.engines.recompute import recomputed, recomputes
from spectrim.engines.sharded import Sharded, take_components, take_weights
from spectrim.engines.shelf import components_of, outlines_of
from spectrim.engines.spread import energies_of_all, handed_some, holders_of
from spectrim.linalg.factor import Factors, Spectrum
from spectrim.method import Components, LearnedMethod
from spectrim.models.walk import Walk, weight_of
from spectrim.nn.scored import ScoredLinear

STAGE = "scores"
SCORE_POINTS = 64
"""At most about so many points of the scores' way through training are kept."""
GRADIENT_MEMORY = 0.95
"""Weight of the past in the running mean of score gradients: about the last 20 steps."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What training gave: factors for every layer, the plan they meet, and the trajectory for the report."""

    factors: Mapping[str, Factors]
    plan: Plan
    losses: tuple[float, ...]
    keeps: tuple[float, ...]
    returned: int
    warnings: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts of one engine, JSON-ready."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Which components (K,) of each layer's spectrum were kept, bool: not always the first ones."""
    score_path: tuple[tuple[float, ...], ...] = ()
    """(step, 5 %, 50 %, 95 % quantile of the kept components' scores of all layers), see `quantiles_of`."""


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares every parameter with the model; swapping its layers leaves it alone."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def train_scores(
    method: LearnedMethod,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    keep: float,
    ids: Tensor,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    sharded: bool = False,
) -> Learned:
    """Learn scores for all components over `ids` (windows, length); the teacher is not changed.

    `plan` gives the ranks to start from where the schedule starts at the budget: propagated weights were made for them.
    `sharded`: each process holds a part of what is frozen, and factors come back for the layers whose spectra it has.

    A checkpoint goes on from the same `spectra`, bit for bit: scores belong to one sign of each component.
    """
    student = skeleton(teacher)
    elsewhere = len(spectra) < len(walk.layers)  # other processes have the other layers
    again = sharded or elsewhere or recomputes(teacher, walk, method.batch_size * ids.shape[1])
    scored = relax_bare(student, walk, spectra, narrow=True) if again else relax(student, walk, spectra)
    support = Support(method, walk, scored, keep, plan)
    parts = settle_blocks(scored, student, teacher, walk, spectra, sharded=sharded) if again else Sharded()

    training = Training(
        stage=STAGE,
        label="learn scores",
        says=method.info.name,
        advice=f"Lower the learning rate (--set learning_rate={method.learning_rate / 3:.2g})",
        groups=[Group(parameters={n: la.scores for n, la in support.scored.items()}, peak=method.learning_rate)],
        loss=lambda batch: step_loss(method, student, teacher, batch),
        optimizer=lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95)),
        steps=method.steps,
        batch_size=method.batch_size,
        seed=seed,
        before_step=support.before_step,
        after_backward=lambda _: remember(support.scored, support.gradients),
        recorded=not again,
        state=support.state,
        restore=support.restore,
    )
    with frozen(student), frozen(teacher), parts.running(), recomputed(student, walk, wanted=again):
        losses = train(training, ids, progress=progress, checkpoint=checkpoint)
    parts.give_back(teacher)
    warnings = support.come_down()
    if method.steps:
        warnings += [*collapsed(support.scored), *unmoved(support.scored, method.steps)]
    return Learned(
        factors={name: scored[name].kept(components_of(spectra, name) if again else None) for name in spectra},
        plan=support.plan,
        losses=tuple(losses),
        keeps=tuple(support.keeps),
        returned=support.returned,
        warnings=tuple(warnings),
        kept={name: layer.mask.bool() for name, layer in support.scored.items()},
        score_path=(*map(tuple, support.score_path), *support.last_quantiles()),
    )


class Support:
    """Which components are kept: masks that follow the method's budget, and what prices them."""

    def __init__(
        self,
        method: LearnedMethod,
        walk: Walk,
        scored: Mapping[str, ScoredLinear],
        keep: float,
        plan: Plan | None = None,
    ) -> None:
        self.method, self.walk, self.scored, self.keep = method, walk, scored, keep
        self.gradients = {name: torch.zeros_like(layer.scores) for name, layer in scored.items()}
        self.keeps: list[float] = []
        self.score_path: list[list[float]] = []
        self.returned = 0
        self.budget = method.keep_at(0.0, keep) or keep
        if plan is None or self.budget != keep:
            plan, _ = project(method, scored, walk, self.gradients, self.budget, first=True)
        else:
            for name, layer in scored.items():
                if plan.targets[name].codec != "dense":
                    layer.mask[plan.targets[name].rank :] = 0
        self.plan = plan

    def before_step(self, step: int) -> None:
        """Project onto the budget of the moment, every few steps."""
        if step and step % self.method.project_every == 0:
            wanted = self.method.keep_at(step / self.method.steps, self.keep)
            # When the schedule falls silent above the request, one last projection brings the masks down to it.
            if wanted is None and self.budget != self.keep:
                wanted = self.keep
            if wanted is not None:
                self.project(wanted)
        self.keeps.append(self.plan.keep)
        if step % max(1, self.method.steps // SCORE_POINTS) == 0:
            self.score_path.append([step, *quantiles_of(self.scored)])

    def last_quantiles(self) -> list[tuple[float, ...]]:
        """The point after the last step, if there was one."""
        return [(self.method.steps, *quantiles_of(self.scored))] if self.method.steps else []

    def project(self, budget: float) -> None:
        """Set the masks to a budget by the prices of the moment."""
        self.plan, back = project(self.method, self.scored, self.walk, self.gradients, budget)
        self.budget = budget
        self.returned += back

    def come_down(self) -> list[str]:
        """After the last step: onto the request if the schedule never reached it, which is then said."""
        if self.budget == self.keep:
            return []
        reached, steps = self.plan.keep, self.method.steps
        self.plan, _ = project(self.method, self.scored, self.walk, self.gradients, self.keep)
        if not steps:
            return []
        return [
            f"after {steps} steps the budget stood at keep {reached:.4f}, above the request {self.keep:g}: the masks "
            "were projected onto it and no step was trained there; take more steps (--set steps=...)"
        ]

    def state(self) -> Buffers:
        """Masks, running means, and where the schedule stands."""
        masks = {name: layer.mask for name, layer in self.scored.items()}
        facts = {
            "budget": self.budget,
            "keeps": list(self.keeps),
            "score_path": [list(point) for point in self.score_path],
            "returned": self.returned,
            "plan": plan_to_facts(self.plan),
        }
        return Buffers({**with_prefix(masks, "mask"), **with_prefix(self.gradients, "gradient")}, facts)

    def restore(self, saved: Buffers) -> None:
        """Take up a saved state."""
        fill(self.state().tensors, saved.tensors, STAGE)
        self.budget, self.returned = saved.facts["budget"], saved.facts["returned"]
        self.keeps = list(saved.facts["keeps"])
        self.score_path = [list(point) for point in saved.facts.get("score_path", [])]
        self.plan = plan_from_facts(saved.facts["plan"])


@torch.no_grad()
def quantiles_of(scored: Mapping[str, ScoredLinear]) -> list[float]:
    """The 5 %, 50 % and 95 % quantile of the scores of all components that are kept now (of the nearest rank)."""
    ordered = torch.cat([layer.scores[layer.mask > 0].flatten() for layer in scored.values()]).sort().values
    last = len(ordered) - 1
    return [float(ordered[round(share * last)]) for share in (0.05, 0.5, 0.95)] if last >= 0 else [0.0, 0.0, 0.0]


def relax(
    student: PreTrainedModel, walk: Walk, spectra: Mapping[str, Spectrum], *, narrow: bool = False
) -> dict[str, ScoredLinear]:
    """Put a ScoredLinear in the place of every target layer, its components `narrow` or not."""
    scored = {}
    for layer in walk.layers:
        bias = student.get_submodule(layer.name).bias
        scored[layer.name] = ScoredLinear(
            components_of(spectra, layer.name), bias if isinstance(bias, Tensor) else None, narrow=narrow
        )
        student.set_submodule(layer.name, scored[layer.name])
    return scored


def relax_bare(
    student: PreTrainedModel, walk: Walk, spectra: Mapping[str, Spectrum], *, narrow: bool
) -> dict[str, ScoredLinear]:
    """The same without components, of which each process may have some layers' only: `settle_blocks` puts them in."""
    outlines = {}
    for name, energy in energies_of_all(student, walk, outlines_of(spectra)).items():
        weight = weight_of(student.get_submodule(name))
        left, right = (weight.new_empty(shape) for shape in ((len(weight), 0), (0, weight.shape[1])))
        outlines[name] = Spectrum(left, right, energy)
    return relax(student, walk, outlines, narrow=narrow)


def settle_blocks(
    scored: Mapping[str, ScoredLinear],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    *,
    sharded: bool,
) -> Sharded:
    """Components into the layers, whose weight at the present scores is formed once; block by block, so that of what is
    `sharded`, the teacher's weights too, no process ever holds all.
    """
    parts, holders = Sharded(), holders_of(walk, spectra)
    if sharded:
        take_weights(parts, teacher, walk)
    for block, block_name in enumerate(walk.block_names):
        here = [layer.name for layer in walk.layers if layer.block == block]
        for name in here:
            given = handed_some(teacher, [name], holders, lambda own: components_of(spectra, own))
            scored[name].settle(given[name])
        if sharded:
            take_components(parts, student, block_name, [scored[name] for name in here])
    return parts


def project(
    method: LearnedMethod,
    scored: Mapping[str, ScoredLinear],
    walk: Walk,
    gradients: Mapping[str, Tensor],
    keep: float,
    *,
    first: bool = False,
) -> tuple[Plan, int]:
    """Price all components, allocate ranks to the budget, set the masks; returns the plan and how many came back."""
    prices, states = {}, {}
    for name, layer in scored.items():
        states[name] = Components(
            energy=layer.energy,
            scores=layer.scores.detach(),
            kept=layer.mask.bool(),
            gradient=gradients[name],
        )
        prices[name] = layer.energy if first else method.price(states[name])
    ranked = {name: price.sort(descending=True) for name, price in prices.items()}
    plan = plan_ranks(method, walk, {name: r.values for name, r in ranked.items()}, keep)
    returned = 0
    for name, layer in scored.items():
        target = plan.targets[name]
        kept = torch.zeros_like(layer.mask, dtype=torch.bool)
        kept[ranked[name].indices[: len(kept) if target.codec == "dense" else target.rank]] = True
        back = kept & ~states[name].kept
        if not first and bool(back.any()):
            layer.scores.data[back] = method.score_on_return(states[name])[back]
            returned += int(back.sum())
        layer.mask.copy_(kept.to(layer.mask.dtype))
    return plan, returned


def step_loss(method: LearnedMethod, student: PreTrainedModel, teacher: PreTrainedModel, batch: Tensor) -> Tensor:
    """The method's loss on one batch (B, S), both models in the same precision."""
    student_logits, teacher_logits = both_logits(student, teacher, batch)
    return method.loss(student_logits, batch, teacher_logits)


def remember(scored: Mapping[str, ScoredLinear], gradients: Mapping[str, Tensor]) -> None:
    """Update the running means of all score gradients; pruned scores then do not move."""
    for name, layer in scored.items():
        gradients[name].mul_(GRADIENT_MEMORY)
        if layer.scores.grad is None:  # an expert that no token of this batch reached
            continue
        gradients[name].add_(layer.scores.grad, alpha=1 - GRADIENT_MEMORY)
        layer.scores.grad.mul_(layer.mask)


def collapsed(scored: Mapping[str, ScoredLinear]) -> list[str]:
    """Layers whose kept scores all went to (nearly) nothing: said, since the budget then buys nothing there."""
    names = []
    for name, layer in scored.items():
        kept = layer.scores.detach()[layer.mask.bool()]
        if len(kept) == 0 or float(kept.abs().max()) < 0.05:
            names.append(f"{name}: all {len(kept)} kept scores are below 0.05; the layer has collapsed")
    return names


def unmoved(scored: Mapping[str, ScoredLinear], steps: int) -> list[str]:
    """Layers whose kept scores are all still exactly 1: no gradient ever reached them, nothing was learned there."""
    names = [
        name
        for name, layer in scored.items()
        if bool(layer.mask.any()) and bool((layer.scores.detach()[layer.mask.bool()] == 1).all())
    ]
    return [f"{name}: all kept scores are still exactly 1 after {steps} steps; nothing was learned" for name in names]
