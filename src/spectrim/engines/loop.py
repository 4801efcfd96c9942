"""The training loop of everything that trains: scores, factors, single blocks.

for each step:
    learning rate -> before_step -> batch -> loss -> backward (replay.py) -> are loss and gradients finite?
    -> after_backward -> clip -> optimizer -> checkpoint, if one is due -> progress

Nothing is changed by a step whose loss or gradient is not finite: the state before it is saved and the run stops.
Whoever trains (the owner) hands over parameters, a loss and, if it has buffers, how to save and restore them.
Going on from a checkpoint gives the bits of a run that was not interrupted (where the device itself is deterministic).
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.measure import Progress
from spectrim.engines.pack import below, fill, find, fingerprint, pack, unpack, with_prefix
from spectrim.engines.replay import Replay, Told
from spectrim.engines.spread import sum_gradients, sum_of_facts
from spectrim.errors import InputError, NumericalError
from spectrim.memory import Batch, OutOfMemory
from spectrim.processes import present

WARM_UP_STEPS = 10


class Buffers(NamedTuple):
    """What an owner needs beside parameters and optimizer: living tensors, and JSON-ready facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a peak learning rate; `options` are further arguments of the optimizer for them."""

    parameters: Mapping[str, nn.Parameter]
    peak: float
    options: Mapping[str, Any] = field(default_factory=dict)


OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""From parameter groups, each {"params", "lr", "peak", ...}, to an optimizer.

It must keep "peak" in its groups (torch's do) and all of its state in `state_dict()`, and draw nothing from the global
random generator; else a resumed run is another run.
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One stage of training, described by its owner.

    `loss` takes a batch of windows on the parameters' device, and is a mean over them (plus what depends on none).
    """

    stage: str  # names the checkpoint
    label: str  # names the progress
    says: str  # who speaks in errors
    advice: str  # what to lower when a number is not finite
    groups: Sequence[Group]
    loss: Callable[[Tensor], Tensor]
    optimizer: OptimizerFactory
    steps: int
    batch_size: int
    seed: int = 0
    warm_up: int = WARM_UP_STEPS
    floor: float = 0.0  # the share of the peak at which the cosine would end
    clip: float | None = None  # largest norm of all gradients together
    before_step: Callable[[int], None] | None = None
    after_backward: Callable[[int], None] | None = None
    phase: Callable[[], Hashable] = lambda: None
    """What the loss depends on beside its batch and living tensors (a GPU records the step, see replay.py)."""
    recorded: bool = True  # False where the loss reads its batch on the host
    shrink: Callable[[str], None] | None = None
    """Makes the loss take less memory, where memory runs out with one row; told why. Raises where it cannot."""
    state: Callable[[], Buffers] = lambda: Buffers({}, {})
    restore: Callable[[Buffers], None] = lambda _: None


def train(
    training: Training, windows: Tensor, *, progress: Progress | None = None, checkpoint: Checkpoint | None = None
) -> list[float]:
    """Train on `windows` (N, ...) in batches of rows; returns the loss of every step.

    A stage that the checkpoint holds in full is restored and not trained again. Raises NumericalError, with the weights
    as they were before the step, when a loss or a gradient is not finite; InputError for another run's checkpoint.
    """
    loop = _Loop(training, windows)
    saved = None if checkpoint is None else checkpoint.load(training.stage)
    if saved is not None:
        loop.resume(saved)
    try:
        for parameter in loop.parameters.values():
            parameter.requires_grad_(True)
        while loop.step < training.steps:
            try:
                loop.advance()
            except NotFinite:
                if checkpoint is not None:
                    checkpoint.save(training.stage, loop.save())
                raise
            if checkpoint is not None and (checkpoint.due() or loop.step == training.steps):
                checkpoint.save(training.stage, loop.save())
            if progress is not None:
                progress(training.label, loop.step, training.steps)
    finally:
        loop.optimizer.zero_grad(set_to_none=True)
    return torch.stack(loop.losses).tolist() if loop.losses else []


class NotFinite(NumericalError):
    """A loss or a gradient that is not finite; no weight was changed by its step."""


class _Loop:
    """The state between two steps."""

    def __init__(self, training: Training, windows: Tensor) -> None:
        self.training, self.windows = training, windows
        self.parameters = {name: p for group in training.groups for name, p in group.parameters.items()}
        count = sum(len(group.parameters) for group in training.groups)
        assert 0 < count == len(self.parameters), f"{training.stage}: no parameters, or two of the same name"
        self.optimizer = training.optimizer(
            [{"params": [*g.parameters.values()], "lr": g.peak, "peak": g.peak, **g.options} for g in training.groups]
        )
        self.order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(training.seed))
        self.device = next(iter(self.parameters.values())).device
        self.replay = Replay([*self.parameters.values()], wanted=training.recorded)
        self.step = 0
        self.prepared = False  # before_step has run for the present step
        self.own = present().share_of(training.batch_size)  # rows of each batch that this process works on
        self.part = Batch(self.own.stop - self.own.start)
        self.losses: list[Tensor] = []

    def advance(self) -> None:
        """One step; raises NotFinite before it changes a parameter."""
        own, step = self.training, self.step
        set_learning_rate(self.optimizer, step, own.steps, warm_up=own.warm_up, floor=own.floor)
        if own.before_step is not None and not self.prepared:
            own.before_step(step)
        self.prepared = True
        pick = self.order[(torch.arange(own.batch_size) + step * own.batch_size) % len(self.order)][self.own]
        told = self.replay(self.loss_and_gradients, self.windows[pick].to(self.device), own.phase())
        loss, norm = told if present().alone else self.of_all_ranks(told)
        told = torch.stack([loss.to(self.device, torch.float32), norm.float()])
        if not bool(torch.isfinite(told).all()):  # the one wait for the device in a step
            raise NotFinite(self.what_is_not_finite(loss))
        if own.after_backward is not None:
            own.after_backward(step)
        if own.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), own.clip)
        self.optimizer.step()
        self.losses.append(loss)
        self.step, self.prepared = step + 1, False

    def of_all_ranks(self, told: Told) -> Told:
        """Loss, gradients and their norm over the whole batch, the same bits on every rank."""
        sum_gradients([*self.parameters.values()])
        loss = sum_of_facts([float(told.loss)])[0]
        return Told(torch.tensor(loss, device=self.device, dtype=told.loss.dtype), self.gradient_norm())

    def loss_and_gradients(self, batch: Tensor) -> Told:
        """What a step computes before anything changes: of a batch at once, or in parts as memory runs out.

        Of several processes each has its rows of the batch, which count by their share of it.
        """

        def in_parts_of(size: int) -> Tensor:
            for parameter in self.parameters.values():
                parameter.grad = None
            total = torch.zeros((), device=self.device)
            for part in batch.split(size):
                # A mean over windows: each part counts by its share of them.
                loss = self.training.loss(part) * (len(part) / self.training.batch_size)
                loss.backward()
                total = loss.detach() if len(part) == len(batch) else total + loss.detach()
            return total

        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # A recording that finds no memory is given up by replay.py, not made smaller.
        loss = in_parts_of(self.part.size) if recording else self.in_less_memory(in_parts_of)
        return Told(loss, self.gradient_norm())

    def in_less_memory(self, in_parts_of: Callable[[int], Tensor]) -> Tensor:
        """In parts of fewer rows, and then of rows that take less, until memory suffices."""
        while True:
            try:
                return self.part.run(self.training.label, in_parts_of)
            except OutOfMemory as error:
                if self.training.shrink is None:
                    raise
                said = error.said
            self.training.shrink(said)  # only here: the error's traceback held the tensors of the failed try

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Those that there are: an expert that no token reached has none."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients as one vector, on the first parameter's device; no wait for it."""
        found = [gradient for _, gradient in self.gradients()]
        norms = torch._foreach_norm(found) if found else ()  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(
            torch.stack([torch.zeros((), device=self.device), *(n.to(self.device) for n in norms)])
        )

    def what_is_not_finite(self, loss: Tensor) -> str:
        """The loss, or the first gradient by name; only read when the run stops."""
        at = f"at step {self.step} of {self.training.steps}"
        end = f"nothing was changed by it. {self.training.advice}"
        value = float(loss)
        if not math.isfinite(value):
            return f"{self.training.says}: the loss is {value} {at}; {end}"
        for name, gradient in self.gradients():
            bad = int((~torch.isfinite(gradient)).sum())
            if bad:
                return (
                    f"{self.training.says}: the gradient of {name} is not finite {at} ({bad} of {gradient.numel()} "
                    f"values; the loss is {value:.4g}); {end}"
                )
        return f"{self.training.says}: the gradients are finite but their norm is not {at}; {end}"

    def save(self) -> Saved:
        """The state between two steps, or just before a step that failed."""
        optimizer, outline = pack(self.optimizer.state_dict(), "optimizer")
        own = self.training.state()
        losses = torch.stack(self.losses) if self.losses else torch.zeros(0)
        tensors = {
            **with_prefix({name: p.detach() for name, p in self.parameters.items()}, "parameter"),
            **with_prefix(own.tensors, "own"),
            **optimizer,
            "losses": losses,
        }
        facts = {"run": self.identity, "prepared": self.prepared, "own": own.facts, "optimizer": outline}
        return Saved(self.step, tensors, facts)

    def resume(self, saved: Saved) -> None:
        """Take up a saved state; refused when it is of a run with other steps, batches or windows."""
        stage, mine = self.training.stage, self.identity
        for name, value in saved.facts["run"].items():
            if mine[name] != value:
                raise InputError(
                    f"checkpoint of stage {stage!r}: {name} was {value} and is {mine[name]} now; go on with what it "
                    "was made with, or remove the checkpoint"
                )
        fill(self.parameters, below(saved.tensors, "parameter"), stage)
        state = unpack(saved.tensors, saved.facts["optimizer"], self.device)
        peaks = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak  # after a run that diverged one may go on with a lower rate
        # torch casts what it loads to the parameter's dtype; an optimizer may keep other ones.
        for index, parameter in enumerate(self.parameters.values()):
            if index in state["state"]:
                self.optimizer.state[parameter] = state["state"][index]
        self.training.restore(Buffers(below(saved.tensors, "own"), saved.facts["own"]))
        self.losses = [*find(saved.tensors, "losses").to(self.device, copy=True).unbind()]
        self.step, self.prepared = saved.step, saved.facts["prepared"]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the batches: a state only goes on under the same."""
        own = self.training
        return {
            "steps": own.steps,
            "batch_size": own.batch_size,
            "seed": own.seed,
            "windows": fingerprint(self.windows),
        }


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, *, warm_up: int = WARM_UP_STEPS, floor: float = 0.0
) -> None:
    """Each group's own peak, times linear warm-up, times a cosine that falls from 1 to `floor` at `steps`."""
    warm = min(1.0, (step + 1) / max(warm_up, 1))
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warm * cosine
