"""The steps of newton.py for models of which one block at a time is in memory, there and back.

    dense     all windows pass its blocks once; their last states give the logits that the loss is measured against
    forward   the windows that give gradients pass the student; states are kept before every ceil(sqrt(blocks))-th block
    back      blocks between two kept states are passed once more, then, last first, once more with gradients
    lengths   held-out windows pass the student once, at all lengths beside each other

A block of the student is made when it runs: scored layers (nn/scored.py) from the kept components of its spectra, the
rest from the dense block. Loss, gradients and lengths are those of newton.py, to rounding.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spectrim.engines.learned import skeleton
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.newton import HELD_OUT, LENGTHS, Scores, best_of, check_gradient, directions, move
from spectrim.engines.ranks import Plan
from spectrim.engines.recompute import recomputes
from spectrim.engines.relay import Hold, Relay
from spectrim.engines.shelf import SpectraShelf, scale
from spectrim.engines.stream import Call
from spectrim.method import LearnedMethod
from spectrim.models.walk import Layer, Walk, device_of
from spectrim.nn.scored import ScoredLinear


@dataclass
class Score:
    """Of one layer, all (K,): what losing each component costs, the present scores, which components are kept."""

    energy: Tensor
    scores: Tensor
    mask: Tensor


@dataclass
class Windows:
    """Some windows on their way through both models."""

    ids: list[Tensor]  # (B, S) each
    calls: list[list[Call]]
    hidden: MutableSequence[Tensor]  # before the first block
    wanted: MutableSequence[Tensor]  # behind the last block of the dense model


@torch.no_grad()
def newton_blocks(
    method: LearnedMethod,
    dense: Relay,
    walk: Walk,
    spectra: SpectraShelf,
    plan: Plan,
    ids: Tensor,
    *,
    steps: int,
    batch_size: int,
    hold: Hold = list,
    progress: Progress | None = None,
) -> list[float]:
    """As `newton_scores`: scores folded into `spectra`, in place; returns the lengths. `ids` (windows, length)."""
    count = max(1, len(ids) // HELD_OUT)
    held_out, given = ids[-count:], ids[:-count] if len(ids) > count else ids
    narrow = recomputes(dense.model, walk, batch_size * ids.shape[1])
    student = _Student(dense, walk, spectra, plan, narrow=narrow)
    taken: list[float] = []
    with frozen(dense.model):
        steep, flat = (_entered(dense, part, batch_size, hold) for part in (given, held_out))
        for step in range(steps):
            if taken and taken[-1] == 0:
                break
            if progress is not None:
                progress("newton", step, steps)
            gradients = _gradients(method, student, steep, hold)
            moves = directions(student.scores, gradients)
            length = best_of(partial(_tried, student.scores, moves, _losses(method, student, moves, flat, hold)))
            move(student.scores, moves, length)
            taken.append(length)
    for name, own in student.scores.items():
        scale(spectra, name, (own.scores * own.mask + (1 - own.mask)).double())
    if progress is not None:
        progress("newton", steps, steps)
    return taken


class _Student:
    """The compressed model, of which the block that runs is there."""

    def __init__(self, dense: Relay, walk: Walk, spectra: SpectraShelf, plan: Plan, *, narrow: bool) -> None:
        self.model = skeleton(dense.model)
        self.relay = Relay(self.model, walk, dense.gives_tuple)
        self.dense, self.spectra, self.narrow = dense, spectra, narrow
        self.layers: list[list[Layer]] = [[la for la in walk.layers if la.block == b] for b in range(len(dense.blocks))]
        self.scores: dict[str, Score] = {}
        device = device_of(dense.model)
        for layer in walk.layers:
            target, energy = plan.targets[layer.name], spectra.energies[layer.name]
            count = spectra.count(layer.name)
            mask = torch.ones(count, device=device)
            if target.codec != "dense":
                mask[target.rank :] = 0
            self.scores[layer.name] = Score(energy[:count].double(), torch.ones(count, device=device), mask)

    @contextmanager
    def block(self, index: int) -> Iterator[dict[str, ScoredLinear]]:
        """Its scored layers by name, in their places; the scores are those of the moment and collect gradients."""
        before: dict[str, nn.Module] = {}
        scored: dict[str, ScoredLinear] = {}
        try:
            for layer in self.layers[index]:
                name, own = layer.name, self.scores[layer.name]
                kept = self.spectra.as_kept(name)
                made = ScoredLinear(kept, self._bias(index, layer))
                made.mask.copy_(own.mask)
                if self.narrow:
                    made.settle(kept)
                made.scores.data.copy_(own.scores)
                before[name] = self.model.get_submodule(name)
                self.model.set_submodule(name, made.eval())
                scored[name] = made
            yield scored
        finally:
            for name, module in before.items():
                self.model.set_submodule(name, module)

    def _bias(self, index: int, layer: Layer) -> Tensor | None:
        """Of the dense layer, which is read for it."""
        if not layer.has_bias:
            return None
        block = self.dense.blocks[index]
        settled = block.__dict__.get("_spectrim_home")
        if settled is not None:
            settled[0].fill(block, index)
        bias = self.dense.model.get_submodule(layer.name).bias
        assert isinstance(bias, Tensor)
        return bias


def _entered(dense: Relay, ids: Tensor, batch_size: int, hold: Hold) -> Windows:
    """The windows before the first block, and what the dense model makes of them."""
    device = device_of(dense.model)
    made = Windows([], [], hold(()), hold(()))
    with autocast(device):
        for batch in ids.split(batch_size):
            tokens = batch.to(device)
            first, calls = dense.enter(tokens)
            made.ids.append(tokens)
            made.calls.append(calls)
            made.hidden.append(first)
            made.wanted.append(first)
        for block in range(len(dense.blocks)):
            for i, calls in enumerate(made.calls):
                made.wanted[i] = dense.run(block, made.wanted[i], calls[block])
    return made


def _loss(method: LearnedMethod, student: _Student, windows: Windows, batch: int, hidden: Tensor) -> Tensor:
    """Of a batch, from the student's states behind the last block."""
    ids = windows.ids[batch]
    with autocast(ids.device):
        with torch.no_grad():
            wanted = student.dense.leave(ids, windows.wanted[batch])
        logits = student.relay.leave(ids, hidden)
    total = sum(len(own) for own in windows.ids)
    return method.loss(logits, ids, wanted) * len(ids) / total


def _gradients(method: LearnedMethod, student: _Student, windows: Windows, hold: Hold) -> dict[str, Tensor]:
    """The gradient (K,) of the mean loss over the windows by every score."""
    blocks = len(student.layers)
    stride = math.ceil(math.sqrt(blocks))
    kept: dict[int, MutableSequence[Tensor]] = {}
    states = hold(windows.hidden)
    for block in range(blocks):
        if block % stride == 0:
            kept[block] = hold(states)
        _pass(student, block, windows.calls, states)
    gradients = states  # whose numbers are not needed any more
    for i in range(len(states)):
        last = states[i].detach().requires_grad_(True)
        with torch.enable_grad():
            (gradients[i],) = torch.autograd.grad(_loss(method, student, windows, i, last), last)
    found: dict[str, Tensor] = {}
    for start in sorted(kept, reverse=True):
        inputs = [kept.pop(start)]
        for block in range(start, min(start + stride, blocks) - 1):
            inputs.append(hold(inputs[-1]))
            _pass(student, block, windows.calls, inputs[-1])
        while inputs:
            found |= _one_back(student, start + len(inputs) - 1, windows.calls, inputs.pop(), gradients)
    return found


def _pass(student: _Student, block: int, calls: Sequence[Sequence[Call]], states: MutableSequence[Tensor]) -> None:
    """What one block makes of the states, in their place."""
    with student.block(block), autocast(device_of(student.model)):
        for i, own in enumerate(calls):
            states[i] = student.relay.run(block, states[i], own[block])


def _one_back(
    student: _Student,
    block: int,
    calls: Sequence[Sequence[Call]],
    inputs: MutableSequence[Tensor],
    gradients: MutableSequence[Tensor],
) -> dict[str, Tensor]:
    """Gradients by the scores of one block; `gradients` at its output become those at its input, in place."""
    with student.block(block) as scored:
        for i, own in enumerate(calls):
            before = inputs[i].detach().requires_grad_(True)
            with torch.enable_grad(), autocast(before.device):
                after = student.relay.run(block, before, own[block])
            after.backward(gradients[i])
            assert before.grad is not None
            gradients[i] = before.grad
        found = {}
        for name, layer in scored.items():
            gradient = layer.scores.grad
            found[name] = torch.zeros_like(layer.scores) if gradient is None else gradient.clone()
            check_gradient(name, found[name])
    return found


def _tried(
    scores: Mapping[str, Scores], moves: Mapping[str, Tensor], losses: Mapping[float, float], length: float
) -> float:
    """The loss at a length. The scores go there and back, which rounds: newton.py goes on from that."""
    move(scores, moves, length)
    move(scores, moves, -length)
    return losses[length]


def _losses(
    method: LearnedMethod, student: _Student, moves: Mapping[str, Tensor], windows: Windows, hold: Hold
) -> dict[float, float]:
    """The loss at length 0 and at each of LENGTHS."""
    lengths = (0.0, *LENGTHS)
    states = [hold(windows.hidden) for _ in lengths]
    tried = {name: dataclasses.replace(own, scores=own.scores.clone()) for name, own in student.scores.items()}
    at: list[dict[str, Tensor]] = []
    for length in lengths:
        move(tried, moves, length)
        at.append({name: own.scores.clone() for name, own in tried.items()})
        move(tried, moves, -length)
    for block in range(len(student.layers)):
        with student.block(block) as scored, autocast(device_of(student.model)):
            for scores, own in zip(at, states, strict=True):
                for name, layer in scored.items():
                    layer.scores.data.copy_(scores[name])
                for i, calls in enumerate(windows.calls):
                    own[i] = student.relay.run(block, own[i], calls[block])
    with autocast(device_of(student.model)):
        return {
            length: sum(float(_loss(method, student, windows, i, own[i])) for i in range(len(windows.ids)))
            for length, own in zip(lengths, states, strict=True)
        }
