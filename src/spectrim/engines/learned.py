"""Training scores on frozen spectra, for every method that states loss, budget and prices.

relax     every target layer becomes a ScoredLinear (scores 1, all components present)
train     loss against the dense model; every few steps the components are priced and the masks projected
          onto the budget of that moment
harden    the last masks and scores become factors of the ranks they imply
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.layerwise import Plan, plan_ranks
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.errors import NumericalError
from spectrim.linalg.factor import Factors, Spectrum
from spectrim.method import Components, LearnedMethod
from spectrim.models.walk import Walk
from spectrim.nn.scored import ScoredLinear

WARM_UP_STEPS = 10
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
    seed: int = 0,
    progress: Progress | None = None,
) -> Learned:
    """Learn scores for all components over `ids` (windows, length); the teacher is not changed."""
    student = skeleton(teacher)
    scored = relax(student, walk, spectra)
    parameters = [layer.scores for layer in scored.values()]
    optimizer = torch.optim.Adam(parameters, lr=method.learning_rate, betas=(0.9, 0.95))
    gradients = {name: torch.zeros_like(layer.scores) for name, layer in scored.items()}
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    device = parameters[0].device
    losses: list[Tensor] = []
    keeps: list[float] = []
    returned = 0
    budget = method.keep_at(0.0, keep) or keep
    plan, _ = project(method, scored, walk, gradients, budget, first=True)
    with frozen(student), frozen(teacher):
        for layer in scored.values():
            layer.scores.requires_grad_(True)
        for step in range(method.steps):
            if step and step % method.project_every == 0:
                wanted = method.keep_at(step / method.steps, keep)
                # When the schedule falls silent above the request, one last projection brings the masks down to it.
                if wanted is None and budget != keep:
                    wanted = keep
                if wanted is not None:
                    budget = wanted
                    plan, back = project(method, scored, walk, gradients, budget)
                    returned += back
            keeps.append(plan.keep)
            set_learning_rate(optimizer, method.learning_rate, step, method.steps)
            pick = order[(torch.arange(method.batch_size) + step * method.batch_size) % len(order)]
            loss = step_loss(method, student, teacher, ids[pick].to(device))
            require_finite(loss, step, method)
            loss.backward()
            remember(scored, gradients)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if progress is not None:
                progress("learn scores", step + 1, method.steps)
        if budget != keep:  # too few steps for the schedule to come down to the request
            plan, _ = project(method, scored, walk, gradients, keep)
    require_finite_scores(scored, method)
    return Learned(
        factors={name: layer.kept() for name, layer in scored.items()},
        plan=plan,
        losses=tuple(float(x) for x in losses),
        keeps=tuple(keeps),
        returned=returned,
        warnings=tuple(collapsed(scored)),
    )


def relax(student: PreTrainedModel, walk: Walk, spectra: Mapping[str, Spectrum]) -> dict[str, ScoredLinear]:
    """Put a ScoredLinear in the place of every target layer."""
    scored = {}
    for layer in walk.layers:
        bias = student.get_submodule(layer.name).bias
        scored[layer.name] = ScoredLinear(spectra[layer.name], bias if isinstance(bias, Tensor) else None)
        student.set_submodule(layer.name, scored[layer.name])
    return scored


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
    with autocast(batch.device):
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch, use_cache=False).logits
        student_logits = student(input_ids=batch, use_cache=False).logits
    return method.loss(student_logits, teacher_logits)


def remember(scored: Mapping[str, ScoredLinear], gradients: Mapping[str, Tensor]) -> None:
    """Update the running means of all score gradients; pruned scores then do not move."""
    for name, layer in scored.items():
        assert layer.scores.grad is not None
        gradients[name].mul_(GRADIENT_MEMORY).add_(layer.scores.grad, alpha=1 - GRADIENT_MEMORY)
        layer.scores.grad.mul_(layer.mask)


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Linear warm-up, then cosine decay to zero."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def require_finite(loss: Tensor, step: int, method: LearnedMethod) -> None:
    """Stop before a bad gradient reaches the scores."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(
            f"{method.info.name}: the loss is {value} at step {step} of {method.steps}; nothing was changed. "
            f"Lower the learning rate (--set learning_rate={method.learning_rate / 3:.2g})"
        )


def require_finite_scores(scored: Mapping[str, ScoredLinear], method: LearnedMethod) -> None:
    """A gradient can be NaN while the loss is not; its layer is named before anything is built from it."""
    for name, layer in scored.items():
        if not bool(torch.isfinite(layer.scores).all()):
            raise NumericalError(
                f"{method.info.name}: the scores of {name} are not finite after {method.steps} steps; "
                f"lower the learning rate (--set learning_rate={method.learning_rate / 3:.2g})"
            )


def collapsed(scored: Mapping[str, ScoredLinear]) -> list[str]:
    """Layers whose kept scores all went to (nearly) nothing: said, since the budget then buys nothing there."""
    names = []
    for name, layer in scored.items():
        kept = layer.scores.detach()[layer.mask.bool()]
        if len(kept) == 0 or float(kept.abs().max()) < 0.05:
            names.append(f"{name}: all {len(kept)} kept scores are below 0.05; the layer has collapsed")
    return names
