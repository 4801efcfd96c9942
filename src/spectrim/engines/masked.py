"""Training masks under pressure with adapters beside them, for every method that states loss, rates and pressure.

relax     every target layer becomes a MaskedLinear (all components there, adapters at 0)
press     masks and adapters are trained; every few steps the method sets the pressure on the masks
fix       once the counted size is at the request, or late in the steps (then said): masks are cut exactly to the budget
          in the order of extinction; layers that pay as dense get all their components back
tune      the adapters alone are trained for the rest
fold      components and adapter become one pair of factors; the adapter's rank is counted
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.learned import Learned, skeleton
from spectrim.engines.loop import Buffers, Group, Training, train
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.pack import fill, with_prefix
from spectrim.engines.ranks import Plan, budget_under, plan_from_facts, plan_to_facts, smallest_keep, weight_budget
from spectrim.engines.whole import whole_budget
from spectrim.errors import UsageError
from spectrim.linalg.extinction import cost_table, counts_within, numbers_of, order_of
from spectrim.linalg.factor import Spectrum
from spectrim.method import LayerMethod, MaskedMethod, Method
from spectrim.model_method import ModelMethod
from spectrim.models.walk import Layer, Walk
from spectrim.nn.masked import MaskedLinear
from spectrim.replacement import Target

STAGE = "masks"
LATEST = 0.5
"""Masks are fixed at the latest after this share of the steps that follow `reach`: adapters need the rest."""
FIRST_PRESSURE = 0.25
"""Where none is given, the pressure starts here, in units of the root mean square of the masks' gradients (ours)."""
MOST_PRESSURE = 1e12


def train_masks(
    method: MaskedMethod,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    keep: float,
    ids: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Learned:
    """Train masks and adapters on `ids` (windows, length) to `keep`; the teacher stays. Raises as `press_to`."""
    pressing, losses = press_to(
        method, teacher, walk, spectra, keep, ids, seed=seed, progress=progress, checkpoint=checkpoint
    )
    return Learned(
        factors={name: layer.folded() for name, layer in pressing.masked.items()},
        plan=pressing.finish(),
        losses=losses,
        keeps=tuple(pressing.keeps),
        returned=pressing.facts["returned"],
        warnings=pressing.warnings(),
        details=pressing.facts,
        kept={name: layer.mask.bool() for name, layer in pressing.masked.items()},
    )


def press_to(
    method: MaskedMethod,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    keep: float,
    ids: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple["Pressing", tuple[float, ...]]:
    """The masks of all layers, fixed at `keep`, with trained adapters; and the loss of every step.

    Raises UsageError when the adapters alone take more than `keep`, NumericalError as `train` does.
    """
    budget_beside_adapters(method, walk, keep)
    student = skeleton(teacher)
    pressing = Pressing(method, walk, relax(method, student, walk, spectra, seed), keep)
    layers = pressing.masked
    adapters = {f"{n}.{part}": getattr(la, part) for n, la in layers.items() for part in ("up", "down")}
    training = Training(
        stage=STAGE,
        label="learn masks",
        says=method.info.name,
        advice=f"Lower the learning rate (--set learning_rate={method.learning_rate / 3:.2g})",
        groups=[
            Group(parameters={f"{n}.m": la.m for n, la in layers.items()}, peak=method.mask_rate()),
            Group(parameters=adapters, peak=method.learning_rate),
        ],
        loss=lambda batch: step_loss(method, student, teacher, batch),
        optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.0),
        steps=method.steps,
        batch_size=method.batch_size,
        seed=seed,
        before_step=pressing.before_step,
        after_backward=pressing.press,
        phase=lambda: pressing.plan is None,
        state=pressing.state,
        restore=pressing.restore,
    )
    with frozen(student), frozen(teacher):
        losses = train(training, ids, progress=progress, checkpoint=checkpoint)
    pressing.finish()
    return pressing, tuple(losses)


def tables_of(method: MaskedMethod, walk: Walk) -> list[Tensor]:
    """What each layer stores at 0, 1, ... components, its adapter included."""
    pivot = method.alone == "pivot"
    return [cost_table(la.outputs, la.inputs, method.adapter_rank, pivot=pivot) for la in walk.layers]


def budget_of(method: Method, walk: Walk, keep: float) -> int:
    """Numbers that all weights may take by any method; UsageError when the least that it stores does not fit."""
    if isinstance(method, MaskedMethod) and method.steps and keep < 1:
        return budget_beside_adapters(method, walk, keep)
    if isinstance(method, ModelMethod):
        return whole_budget(walk, keep, method.budget_unit)
    assert isinstance(method, LayerMethod)
    return budget_under(method, walk, keep)


def budget_beside_adapters(method: MaskedMethod, walk: Walk, keep: float) -> int:
    """Numbers that all weights may take; refused when the adapters, which are counted, do not fit."""
    budget = weight_budget(walk, keep, method.alone)
    least = sum(int(table[0]) for table in tables_of(method, walk))
    if least > budget:
        raise UsageError(
            f"keep {keep:g} leaves {budget:,} numbers for {len(walk.layers)} weights; {method.info.name}'s adapters of "
            f"rank {method.adapter_rank} alone take {least:,} (they are counted). Take a smaller rank "
            f"(--set adapter_rank={max(1, method.adapter_rank * budget // (2 * least))}) or a larger keep; beside "
            f"these adapters the smallest reachable is {smallest_keep(walk, least):.4f}"
        )
    return budget


def relax(
    method: MaskedMethod, student: PreTrainedModel, walk: Walk, spectra: Mapping[str, Spectrum], seed: int
) -> dict[str, MaskedLinear]:
    """Put a MaskedLinear in the place of every target layer."""
    masked = {}
    for index, layer in enumerate(walk.layers):
        bias = student.get_submodule(layer.name).bias
        masked[layer.name] = MaskedLinear(
            spectra[layer.name],
            bias if isinstance(bias, Tensor) else None,
            rank=method.adapter_rank,
            alpha=method.adapter_alpha,
            start=method.mask_start,
            seed=1_000_003 * seed + index,
        )
        student.set_submodule(layer.name, masked[layer.name])
    return masked


def step_loss(method: MaskedMethod, student: PreTrainedModel, teacher: PreTrainedModel, batch: Tensor) -> Tensor:
    """The method's loss on one batch (B, S); the dense model runs only where the loss looks at it."""
    with autocast(batch.device):
        teacher_logits = None
        if method.compares_with_dense:
            with torch.no_grad():
                teacher_logits = teacher(input_ids=batch, use_cache=False).logits
        student_logits = student(input_ids=batch, use_cache=False).logits
    return method.loss(student_logits, batch, teacher_logits)


class Pressing:
    """The masks of all layers on their way to the budget, and the pressure on them."""

    def __init__(self, method: MaskedMethod, walk: Walk, masked: Mapping[str, MaskedLinear], keep: float) -> None:
        self.method, self.walk, self.masked, self.keep = method, walk, masked, keep
        self.budget = budget_beside_adapters(method, walk, keep)
        self.tables = tables_of(method, walk)
        self.biases = sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
        self.pressure, self.level = method.pressure or FIRST_PRESSURE, method.mask_start
        self.reached_by = max(1, math.ceil(method.reach * method.steps))
        self.latest = self.reached_by + math.ceil(LATEST * (method.steps - self.reached_by))
        self.keeps: list[float] = []
        self.plan: Plan | None = None
        self.facts: dict[str, Any] = {}
        """How the masks were fixed: at which step, from which keep, and what the exact cut changed."""

    def before_step(self, step: int) -> None:
        """Note what went out, fix the masks if it is time, set the pressure every few steps."""
        if self.plan is None:
            for layer in self.masked.values():
                layer.bury(step)
            numbers = self.numbers()
            if numbers <= self.budget or step >= self.latest:
                self.plan = self.fix(step, numbers)
            elif step and step % self.method.pressure_every == 0:
                self.adjust(step)
        numbers = self.numbers() + self.biases if self.plan is None else self.plan.numbers_after
        self.keeps.append(numbers / self.walk.numbers)

    def press(self, _step: int) -> None:
        """Add the penalty's gradient; kept out of the loss so that the losses told are the model's."""
        if self.plan is not None:
            return
        pressure = self.pressure if self.method.pressure else self.pressure * self.gradient_size()
        for layer in self.masked.values():
            pressed = pressure * self.method.press(layer.m.detach())
            layer.m.grad = pressed if layer.m.grad is None else layer.m.grad.add_(pressed)

    def gradient_size(self) -> Tensor:
        """Root mean square of the loss's gradients at all masks; it grows with the loss if that starts at 0 (KL)."""
        gradients = [layer.m.grad for layer in self.masked.values() if layer.m.grad is not None]
        return torch.cat(gradients).square().mean().sqrt() if gradients else torch.zeros(())

    def numbers(self) -> int:
        """What all weights would store now."""
        alive = torch.stack([(layer.died < 0).sum() for layer in self.masked.values()])
        return numbers_of(alive, self.tables)

    def adjust(self, step: int) -> None:
        """Ask the method for the next pressure, by how the best mask that has to go falls towards zero."""
        layer, position = self.order()
        kept = int(counts_within(layer, self.tables, self.budget).sum())
        modules = [*self.masked.values()]
        level = float(modules[int(layer[kept])].m[int(position[kept])].detach())
        left = self.reached_by - step
        needed = level * self.method.pressure_every / left if left > 0 and level > 0 else math.inf
        self.pressure = min(self.method.next_pressure(self.pressure, self.level - level, needed), MOST_PRESSURE)
        self.level = level

    def order(self) -> tuple[Tensor, Tensor]:
        """See `order_of`."""
        layers = self.masked.values()
        return order_of([layer.m for layer in layers], [layer.died for layer in layers])

    def fix(self, step: int, numbers: int) -> Plan:
        """Cut to the budget in the order of extinction, exactly: some that just went out return, or some more go."""
        order, position = self.order()
        counts = counts_within(order, self.tables, self.budget)
        kept = int(counts.sum())
        targets, returned, cut, whole = {}, 0, 0, 0
        for index, (layer, module) in enumerate(zip(self.walk.layers, self.masked.values(), strict=True)):
            mask = torch.zeros(len(module.m), dtype=torch.bool)
            mask[position[:kept][order[:kept] == index]] = True
            mask, alive = mask.to(module.m.device), module.died < 0
            target = self.target(layer, int(self.tables[index][counts[index]]), int(counts[index]))
            if target.codec == "dense":  # the same numbers whatever is masked: nothing is
                mask, whole = torch.ones_like(mask), whole + 1
            else:
                returned += int((mask & ~alive).sum())
                cut += int((alive & ~mask).sum())
            targets[layer.name] = target
            module.fix(mask)
        self.facts = {
            "fixed_at_step": step,
            "keep_before_cut": (numbers + self.biases) / self.walk.numbers,
            "pressure_at_end": self.pressure,
            "pressure_unit": "1" if self.method.pressure else "root mean square of the masks' gradients",
            "returned": returned,
            "cut": cut,
            "dense_layers": whole,
            "adapter_parameters": sum(la.up.numel() + la.down.numel() for la in self.masked.values()),
        }
        after = numbers_of(counts, self.tables) + self.biases
        return Plan(targets=targets, numbers_before=self.walk.numbers, numbers_after=after)

    def target(self, layer: Layer, numbers: int, components: int) -> Target:
        """Components and adapter as one rank, or dense."""
        if numbers == layer.weight_numbers:
            return Target(rank=min(layer.outputs, layer.inputs), codec="dense")
        return Target(rank=components + self.method.adapter_rank, codec=self.method.alone)

    def finish(self) -> Plan:
        """The plan; made now when no step was left to make it."""
        if self.plan is None:
            for layer in self.masked.values():
                layer.bury(self.method.steps)
            self.plan = self.fix(self.method.steps, self.numbers())
        return self.plan

    def warnings(self) -> tuple[str, ...]:
        """What there is to say of the run as a whole, once it is over."""
        rank, steps = self.method.adapter_rank, self.method.steps
        return (*self.late(), *empty(self.masked, rank), *idle(self.masked, steps))

    def late(self) -> list[str]:
        """A size that the pressure did not reach, said."""
        assert self.plan is not None
        reached, step = self.facts["keep_before_cut"], self.facts["fixed_at_step"]
        if reached <= self.keep:
            return []
        return [
            f"after {step} of {self.method.steps} steps the masks stood at keep {reached:.4f}, above the request "
            f"{self.keep:g}: {self.facts['cut']} components were cut by the order so far, and the adapters trained for "
            f"{self.method.steps - step} steps; take more steps (--set steps=...) or more pressure (--set pressure=...)"
        ]

    def state(self) -> Buffers:
        """Masks, when they went out, and where the pressure stands."""
        tensors = {
            **with_prefix({name: layer.mask for name, layer in self.masked.items()}, "mask"),
            **with_prefix({name: layer.died for name, layer in self.masked.items()}, "died"),
        }
        facts = {
            "pressure": self.pressure,
            "level": self.level,
            "keeps": list(self.keeps),
            "plan": None if self.plan is None else plan_to_facts(self.plan),
            "fixed": dict(self.facts),
        }
        return Buffers(tensors, facts)

    def restore(self, saved: Buffers) -> None:
        """Take up a saved state."""
        fill(self.state().tensors, saved.tensors, STAGE)
        self.pressure, self.level = saved.facts["pressure"], saved.facts["level"]
        self.keeps, self.facts = list(saved.facts["keeps"]), dict(saved.facts["fixed"])
        if saved.facts["plan"] is not None:
            self.plan = plan_from_facts(saved.facts["plan"])
            for layer in self.masked.values():
                layer.fixed = True


def empty(masked: Mapping[str, MaskedLinear], rank: int) -> list[str]:
    """Layers of which nothing is left but the adapter."""
    return [
        f"{name}: all {len(layer.m)} components went out; only the adapter of rank {rank} is left"
        for name, layer in masked.items()
        if not bool(layer.mask.any())
    ]


def idle(masked: Mapping[str, MaskedLinear], steps: int) -> list[str]:
    """Layers whose adapter is still exactly 0: no gradient ever reached it, and its rank is stored for nothing."""
    names = [name for name, layer in masked.items() if not bool(layer.up.any())]
    return [f"{name}: the adapter is still exactly 0 after {steps} steps; nothing was learned" for name in names]
