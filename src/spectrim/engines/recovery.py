"""Recovery: what runs after the compressed layers are in place, for any method, in the order asked for.

refit         left factors by least squares on the inputs that the compressed model produces     engines/refit.py
reconstruct   both factors, towards a quarter of the dense model's outputs (MPIFA)               engines/refit.py
block[:STEPS] each block trained to give what the dense block gives, STEPS a block               engines/block.py
kl[:STEPS]    all factors trained against the dense model's distribution                         engines/distil.py
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.block import refine_blocks
from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.distil import distil
from spectrim.engines.measure import Progress
from spectrim.engines.pack import fill
from spectrim.engines.refit import reconstruct, refit
from spectrim.engines.stream import low_rank_layers
from spectrim.errors import UsageError, did_you_mean
from spectrim.method import Method
from spectrim.model_method import ModelMethod
from spectrim.models.walk import Walk
from spectrim.nn.linears import PivotLinear

MOST_STEPS = 1_000_000
RECOVERY_BATCH = 32
"""Windows in a step of distillation."""
DEFAULT_STEPS: Mapping[str, int | None] = {"refit": None, "reconstruct": None, "block": 100, "kl": 300}
"""Recovery steps by name, with how many optimizer steps they take when nothing is said; None: it does not train."""

Timed = Callable[[str], AbstractContextManager[None]]


class Step(NamedTuple):
    """One recovery step; `steps` is None for one that does not train."""

    name: str
    steps: int | None

    def __str__(self) -> str:
        return self.name if self.steps is None else f"{self.name}:{self.steps}"


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """One recovery step that was done, with its losses: one list for `kl`, one a block for `block`."""

    step: Step
    losses: tuple[tuple[float, ...], ...] = ()


def parse_step(text: str) -> Step:
    """`"kl"` or `"kl:300"`; UsageError for an unknown name or a count that does not fit."""
    name, colon, count = text.partition(":")
    if name not in DEFAULT_STEPS:
        raise UsageError(f"unknown recovery step {name!r}{did_you_mean(name, DEFAULT_STEPS)}")
    steps = DEFAULT_STEPS[name]
    if not colon:
        return Step(name, steps)
    if steps is None:
        raise UsageError(
            f"recovery step {text!r}: {name} is solved directly and takes no number of steps; write {name}"
        )
    if not (count.isascii() and count.isdigit()) or not 1 <= int(count) <= MOST_STEPS:
        raise UsageError(
            f"recovery step {text!r}: the number of steps must be a whole number in [1, {MOST_STEPS}], got {count!r}; "
            f"e.g. {name}:{steps}"
        )
    return Step(name, int(count))


def recovery_of(method: Method, asked: Iterable[str]) -> tuple[Step, ...]:
    """The method's own steps, those asked for, and `distil_steps` of a method that has them as a last `kl` step."""
    steps = [parse_step(text) for text in (*method.recovery, *asked)]
    if method.centres and any(step.steps is None for step in steps):
        raise UsageError(
            f"method {method.info.name}: refit and reconstruct solve for factors without the bias that this method has "
            "moved; leave them out (block and kl train biases too)"
        )
    if steps and isinstance(method, ModelMethod) and not method.trains_factors:
        raise UsageError(
            f"method {method.info.name}: recovery steps train low-rank factors, and its layers have none "
            f"({', '.join(method.codecs) or 'they are plain ones'}); leave --recover out"
        )
    distil_steps = getattr(method, "distil_steps", 0)
    return (*steps, *([Step("kl", distil_steps)] if distil_steps else []))


def recover(
    steps: Iterable[Step],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    calibration: Tensor,
    training: Tensor,
    *,
    timed: Timed,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Recovered]:
    """Run the steps on `student` in place: `refit` on the calibration windows, the others on the training windows."""
    done: list[Recovered] = []
    for position, step in enumerate(steps):
        earlier = sum(d.step.name == step.name for d in done)
        common: dict[str, Any] = {
            "steps": step.steps, "seed": seed + earlier, "stage": f"recovery {position} {step.name}",
            "progress": progress, "checkpoint": checkpoint,
        }  # fmt: skip
        losses: list[list[float]] = []
        if step.steps is None:
            solve = refit if step.name == "refit" else reconstruct
            with timed(step.name):
                _solve(solve, student, teacher, walk, calibration, common["stage"], progress, checkpoint)
        elif step.name == "block":
            with timed("block"):
                losses = refine_blocks(student, teacher, walk, training, **common)
        else:
            with timed("distil"):
                losses = [distil(student, teacher, walk, training, batch_size=RECOVERY_BATCH, **common)]
        done.append(Recovered(step=step, losses=tuple(tuple(found) for found in losses)))
    return done


def _solve(
    solve: Callable[..., None],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    stage: str,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> None:
    """Solve for factors, or take what an earlier run has found."""
    saved = None if checkpoint is None else checkpoint.load(stage)
    if saved is None:
        solve(student, teacher, walk, ids, progress=progress)
    layers = low_rank_layers(student, walk)
    state = {f"{name}.{key}": t for name, m in layers.items() for key, t in m.state_dict().items() if t.numel()}
    if saved is None:
        if checkpoint is not None:
            checkpoint.save(stage, Saved(1, state, {}))
        return
    fill(state, saved.tensors, stage)
    for layer in layers.values():
        if isinstance(layer, PivotLinear):
            layer.refresh_order()
