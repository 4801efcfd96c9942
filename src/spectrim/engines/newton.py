"""Scores without training: Newton steps on the scores of all kept components at once.

    g_i = d E[KL(dense || compressed)] / d score_i       measured once, one pass there and back over calibration windows
    step_i = -g_i / (e_i + damping * mean e)             e_i, the energy, is the curvature that the metric predicts
    scores = 1 + t step,  t the best of LENGTHS on windows held out from the gradient; no step where none helps

The curvature is that of each layer alone; across layers it adds up, hence lengths well below 1. Kept components make up
for those that went, as learned scores do, for the price of one gradient: at keep 0.5 it is a good part of what 400
steps of training give (docs/soco.md).
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.learned import relax, relax_bare, settle_blocks, skeleton, step_loss
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.pack import fill, fingerprint
from spectrim.engines.parts import Run, energies_of, load_own
from spectrim.engines.ranks import Plan
from spectrim.engines.recompute import recomputed, recomputes
from spectrim.engines.sharded import Sharded
from spectrim.engines.shelf import scale
from spectrim.engines.spread import even_spans, sum_gradients, sum_of_facts
from spectrim.errors import NumericalError
from spectrim.linalg.factor import Spectrum
from spectrim.method import LearnedMethod
from spectrim.models.walk import Walk, device_of
from spectrim.nn.scored import ScoredLinear

STAGE = "newton"
LENGTHS = (0.1, 0.2, 0.4, 0.8)
DAMPING = 0.1
LARGEST_MOVE = 1.0
"""No score is asked to move further than this before the length is applied: the quadratic model does not reach."""
HELD_OUT = 8
"""One window in so many chooses the length of the step and gives no gradient."""


def newton_scores(
    method: LearnedMethod,
    dense: PreTrainedModel,
    walk: Walk,
    spectra: MutableMapping[str, Spectrum],
    plan: Plan,
    ids: Tensor,
    *,
    steps: int,
    batch_size: int,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    sharded: bool = False,
) -> list[float]:
    """Fold the scores of `steps` Newton steps into the kept components of `spectra`, in place; returns the lengths.

    `ids` (windows, length). The ranks of `plan` stay. A length of 0 says that no step helped on the held-out windows.
    `sharded`: each process holds a part of what is frozen (sharded.py), and has some layers' spectra only.
    With a `checkpoint`, scores and gradient are kept between two batches, and gone on with in batches of any size.
    """
    count = max(1, len(ids) // HELD_OUT)
    held_out, given = ids[-count:], ids[:-count] if len(ids) > count else ids
    student = skeleton(dense)
    elsewhere = len(spectra) < len(walk.layers)  # other processes have the other layers
    again = sharded or elsewhere or recomputes(dense, walk, batch_size * ids.shape[1])
    scored = relax_bare(student, walk, spectra, narrow=sharded) if again else relax(student, walk, spectra)
    for name, layer in scored.items():
        if plan.targets[name].codec != "dense":
            layer.mask[plan.targets[name].rank :] = 0
    # Components that are not in parts lie where the spectra do, if that is on the device.
    parts = settle_blocks(scored, student, dense, walk, spectra, sharded=sharded) if again else Sharded()
    run = {} if checkpoint is None else {"after": energies_of(spectra), "windows": fingerprint(ids), "steps": steps}
    keeper = _Keeper(checkpoint, run, scored)
    taken, begun = keeper.load()
    with frozen(student), frozen(dense), parts.running(), recomputed(student, walk, wanted=again):
        for step in range(len(taken), steps):
            if taken and taken[-1] == 0:
                break
            if progress is not None:
                progress("newton", step, steps)
            gradients = score_gradients(method, dense, student, scored, given, batch_size, begun, keeper.save_in(taken))
            begun = 0
            moves = directions(scored, gradients)
            length = best_length(method, dense, student, scored, moves, held_out, batch_size)
            move(scored, moves, length)
            taken.append(length)
    parts.give_back(dense)
    for name in spectra:
        layer = scored[name]
        scale(spectra, name, (layer.scores.detach() * layer.mask + (1 - layer.mask)).double())
    if progress is not None:
        progress("newton", steps, steps)
    return taken


@dataclass
class _Keeper:
    """Lengths, scores and an unfinished gradient in a checkpoint."""

    checkpoint: Checkpoint | None
    run: Run
    scored: Mapping[str, ScoredLinear]

    def load(self) -> tuple[list[float], int]:
        """Take up scores and gradient; the lengths of the finished steps, and how many windows are in the gradient."""
        saved = load_own(self.checkpoint, STAGE, self.run)
        if saved is None:
            return [], 0
        for name, layer in self.scored.items():
            fill({name: layer.scores.data}, saved.tensors, STAGE)
            gradient = saved.tensors.get(f"{name}.gradient")
            layer.scores.grad = None if gradient is None else gradient.to(layer.scores.device)
        return saved.facts["lengths"], saved.step

    def save_in(self, taken: list[float]) -> Callable[[int], None]:
        """Saves, when it is time, after a batch of the step that follows those `taken`."""

        def save(windows: int) -> None:
            if self.checkpoint is None or not self.checkpoint.due():
                return
            tensors = {name: layer.scores.detach() for name, layer in self.scored.items()}
            for name, layer in self.scored.items():
                if layer.scores.grad is not None:
                    tensors[f"{name}.gradient"] = layer.scores.grad
            self.checkpoint.save(STAGE, Saved(windows, tensors, {"run": self.run, "lengths": list(taken)}))

        return save


class Scores(Protocol):
    """What a step looks at of one layer; all (K,)."""

    @property
    def energy(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...


def directions(scored: Mapping[str, Scores], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The damped Newton step (K,) of every layer, 0 for what is pruned."""
    steps = {}
    for name, layer in scored.items():
        curvature = layer.energy * layer.scores.detach().double().square()
        floor = DAMPING * curvature.mean()
        if float(floor) == 0:  # a layer of zeros
            steps[name] = torch.zeros_like(layer.mask)
            continue
        step = (-gradients[name].double() / (curvature + floor)).clamp(-LARGEST_MOVE, LARGEST_MOVE)
        steps[name] = (step * layer.mask).to(layer.scores.dtype)
    return steps


def score_gradients(
    method: LearnedMethod,
    dense: PreTrainedModel,
    student: PreTrainedModel,
    scored: Mapping[str, ScoredLinear],
    ids: Tensor,
    batch_size: int,
    begun: int = 0,
    save: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """The gradient (K,) of the method's mean loss over all windows by every score.

    Of the first `begun` windows it is there already; `save` is told after each batch how many there are.
    """
    for layer in scored.values():
        layer.scores.requires_grad_(True)
        if not begun:
            layer.scores.grad = None
    for start, stop in even_spans(len(ids), batch_size, begun):
        # A rank that has no window of its own left passes one that counts nothing: blocks wait for all ranks.
        batch = ids[start : max(stop, start + 1)]
        (step_loss(method, student, dense, batch.to(device_of(dense))) * (stop - start) / len(ids)).backward()
        save(stop)
    sum_gradients([layer.scores for layer in scored.values()])
    found = {}
    for name, layer in scored.items():
        gradient = layer.scores.grad
        found[name] = torch.zeros_like(layer.scores) if gradient is None else gradient  # an expert never routed to
        layer.scores.requires_grad_(False).grad = None
        check_gradient(name, found[name])
    return found


def check_gradient(name: str, gradient: Tensor) -> None:
    """NumericalError unless the gradient of a layer's scores is finite."""
    if not bool(torch.isfinite(gradient).all()):
        raise NumericalError(
            f"{name}: the gradient of its scores is not finite; leave the step out (--set newton=0), or check the "
            "calibration text"
        )


def best_of(loss_at: Callable[[float], float]) -> float:
    """The length with the least loss among 0 and LENGTHS; looks no further once it rises."""
    best, least = 0.0, loss_at(0.0)
    for length in LENGTHS:
        found = loss_at(length)
        if not found < least:
            break
        best, least = length, found
    return best


@torch.no_grad()
def best_length(
    method: LearnedMethod,
    dense: PreTrainedModel,
    student: PreTrainedModel,
    scored: Mapping[str, ScoredLinear],
    moves: Mapping[str, Tensor],
    ids: Tensor,
    batch_size: int,
) -> float:
    """The length with the least loss on `ids`."""
    device = device_of(dense)

    def loss_at(length: float) -> float:
        move(scored, moves, length)
        total = 0.0
        for start, stop in even_spans(len(ids), batch_size):
            batch = ids[start : max(stop, start + 1)].to(device)  # as in score_gradients
            with autocast(device):
                total += float(step_loss(method, student, dense, batch)) * (stop - start) / len(ids)
        move(scored, moves, -length)
        return sum_of_facts([total])[0]

    return best_of(loss_at)


@torch.no_grad()
def move(scored: Mapping[str, Scores], moves: Mapping[str, Tensor], length: float) -> None:
    """scores += length * moves."""
    for name, layer in scored.items():
        layer.scores.data.add_(moves[name], alpha=length)
