"""Recovery: what runs after the compressed layers are in place, for any method, in the order asked for.

refit         left factors by least squares on the inputs that the compressed model produces     engines/refit.py
reconstruct   both factors, towards a quarter of the dense model's outputs (MPIFA)               engines/refit.py
block[:STEPS] each block trained to give what the dense block gives, STEPS a block               engines/block.py
kl[:STEPS]    all factors, or numbers beside codes, trained against the dense model's outputs    engines/distil.py
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.block import refine_blocks
from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.distil import distil
from spectrim.engines.measure import Progress
from spectrim.engines.pack import fill
from spectrim.engines.refit import reconstruct, refit
from spectrim.engines.stream import low_rank_layers
from spectrim.memory import Batch
from spectrim.models.walk import Walk
from spectrim.nn.linears import PivotLinear
from spectrim.options import RECOVERY_BATCH, Step

SOLVED_WINDOWS = 4
"""Windows at a time in the steps that solve for factors."""

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """One recovery step that was done, with its losses: one list for `kl`, one a block for `block`."""

    step: Step
    losses: tuple[tuple[float, ...], ...] = ()


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
        given = (student, teacher, walk, ids)
        Batch(SOLVED_WINDOWS).run(stage, lambda size: solve(*given, batch_size=size, progress=progress))
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
