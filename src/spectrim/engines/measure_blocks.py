"""The statistics of measure.py for models too large to measure all layers at once: block by block, there and back.

    forward    all windows pass a block before the next one is looked at: sums over inputs, of this block alone.
               Every ceil(sqrt(blocks))-th block, the states of the windows that give gradients are kept; on a GPU
               those of the last blocks too, as many as it has room for.
    backward   the last states give the loss and its gradient; the blocks between two kept states are passed once more,
               and then, last block first, once more with gradients: sums over output gradients, of this block alone.

Held at a time: the statistics of one block, hidden states of all windows, 2 sqrt(blocks) states of those that give
gradients, or what there is room for. For those windows two forward passes, three of blocks whose states were not kept,
and one backward pass, instead of one each. Finished statistics go to a shelf (shelf.py); the labels are the ones that
measure.py would draw.
"""

import math
from collections.abc import Iterable, Mapping, MutableSequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.labels import loss_of_sampled_labels, loss_of_text, skip_labels_of_others
from spectrim.engines.measure import (
    Progress,
    add_gradient,
    add_input,
    autocast,
    check_sums,
    frozen,
    hooks_on,
)
from spectrim.engines.relay import Hold, Relay
from spectrim.engines.shelf import StatsShelf
from spectrim.engines.spread import bring_together, is_own, layers_of, own_spans, owners_of
from spectrim.engines.stream import Call
from spectrim.engines.sums import Sums
from spectrim.errors import InputError
from spectrim.memory import room_left
from spectrim.models.walk import Layer, Walk, device_of, shared_inputs
from spectrim.processes import present
from spectrim.stats import GRADIENT_STATS, INPUT_STATS, Stat

ONE_WAY = 4
"""How many times as many windows are in a batch that gives no gradients, where memory is not to be spared."""

SPARE = 4
"""Times as much as the states before one block that is left of the room for results when states are kept that need not
be."""


class Batch(NamedTuple):
    """Some windows on their way through the blocks."""

    ids: Tensor  # (B, S)
    calls: list[Call]
    gives_gradient: bool


def whole_bytes(walk: Walk, needs: frozenset[Stat]) -> int:
    """What measure.py holds at once of sums, float64."""
    sides = {Stat.GRAM: lambda la: la.inputs**2, Stat.OUTPUT_GRAD: lambda la: la.outputs**2}
    full = sum(layer.weight_numbers for layer in walk.layers) * len(needs & {Stat.FISHER, Stat.SLOPE})
    return 8 * (full + sum(size(layer) for stat, size in sides.items() if stat in needs for layer in walk.layers))


@torch.no_grad()
def measure_blocks(
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    needs: frozenset[Stat],
    shelf: StatsShelf,
    *,
    batch_size: int,
    gradient_windows: int,
    seed: int = 0,
    share: float = 1.0,
    again: int = 0,
    progress: Progress | None = None,
    hold: Hold = list,
    one_way: int = ONE_WAY,
    relay: Relay | None = None,
    groups: list[list[str]] | None = None,
) -> None:
    """Statistics of every target layer over `ids` (windows, length) into the shelf, as `share` of the mean there.

    `again` numbers the measurement; what it had finished before memory ran out is not counted twice. `hold` keeps
    hidden states; batches that give no gradients have `one_way` times as many windows; a `relay` that was checked and
    the `groups` of layers that share an input spare four passes of eight tokens. Raises InputError where no token came
    to a layer: blocks whose layers are chosen token by token need measure.py.
    """
    device = device_of(model)
    with frozen(model), autocast(device):
        if relay is None:
            relay = Relay(model, walk)
            relay.check()
        groups = shared_inputs(model, walk.layers) if groups is None else groups
        run = _Run(relay, walk, needs, shelf, share, again, progress, groups, hold)
        border = min(gradient_windows, len(ids)) if needs & GRADIENT_STATS else 0
        batches, hidden = [], hold(())
        # Those that only go forward save nothing for a way back: more of them at a time.
        only_forward = [span for span in own_spans(len(ids), border, one_way * batch_size) if span[0] >= border]
        for start, stop in [*own_spans(border, border, batch_size), *only_forward]:
            tokens = ids[start:stop].to(device)
            first, calls = relay.enter(tokens)
            hidden.append(first)
            batches.append(Batch(tokens, calls, start < border))
        kept = run.forward(batches, hidden)
        if border:
            generator = torch.Generator(device=device).manual_seed(seed)
            if Stat.SLOPE not in needs:  # labels are drawn window by window, see _gradient_of_loss
                skip_labels_of_others(model, ids[:border], 1, generator)
            given = [i for i, batch in enumerate(batches) if batch.gives_gradient]
            last = hold(hidden[i] for i in given)
            del hidden, first
            run.backward([batches[i] for i in given], last, kept, generator)


def kept_before(blocks: int, stride: int, room: int) -> set[int]:
    """The blocks before which states are kept: every `stride`-th, and the last ones until there are `room` of all.

    The last ones, since the way back begins with them: they are gone before the states between two kept ones are made
    again. With the first ones kept, both would lie side by side.
    """
    kept = set(range(0, blocks, stride))
    others = [block for block in reversed(range(blocks)) if block not in kept]
    return kept | set(others[: max(0, room - len(kept))])


def _room_for(states: list[Tensor]) -> int:
    """How often a GPU has room for such states; several processes, each with a memory of its own, keep what they must.

    These themselves are there, and stay as the first of those that are kept.
    """
    if not states or not present().alone:
        return 0
    left = room_left(states[0].device)
    return 0 if left is None else left // sum(state.nbytes for state in states) - SPARE


class _Run:
    """One measurement."""

    def __init__(
        self,
        relay: Relay,
        walk: Walk,
        needs: frozenset[Stat],
        shelf: StatsShelf,
        share: float,
        again: int,
        progress: Progress | None,
        groups: list[list[str]],
        hold: Hold,
    ) -> None:
        self.hold = hold
        self.relay, self.needs, self.shelf, self.share, self.again = relay, needs, shelf, share, again
        self.leader = {name: group[0] for group in groups for name in group}
        self.walk, self.owners = walk, owners_of(walk, needs)
        self.layers: list[list[Layer]] = [[] for _ in walk.block_names]
        for layer in walk.layers:
            self.layers[layer.block].append(layer)
        self.stride = math.ceil(math.sqrt(len(self.layers)))
        self.progress, self.done = progress, 0
        self.stages = len(self.layers) * (2 if needs & GRADIENT_STATS else 1)

    def forward(self, batches: list[Batch], hidden: MutableSequence[Tensor]) -> dict[int, MutableSequence[Tensor]]:
        """`hidden` is moved behind the last block, in place; kept states come back, by the block behind them."""
        kept: dict[int, MutableSequence[Tensor]] = {}
        wanted = self.needs & INPUT_STATS
        given = [i for i, batch in enumerate(batches) if batch.gives_gradient]
        # What is held elsewhere (spill.py) has a room of its own.
        room = _room_for([hidden[i] for i in given]) if self.hold is list else 0
        keeps = kept_before(len(self.layers), self.stride, room)
        for block, layers in enumerate(self.layers):
            if block in keeps:
                kept[block] = self.hold(hidden[i] for i in given)
            sums = {layer.name: Sums() for layer in layers if self.leader[layer.name] == layer.name}
            self.shelf.expect(sums, wanted, again=self.again)

            def on_input(name: str, x: Tensor, sums: dict[str, Sums] = sums) -> None:
                if name in sums:
                    add_input(sums[name], x, wanted)

            with hooks_on(self._modules(layers), on_input, None):
                for i, batch in enumerate(batches):
                    hidden[i] = self.relay.run(block, hidden[i], batch.calls[block])
            self._put(sums, wanted)
            for layer in layers:
                tokens = sums[self.leader[layer.name]].tokens
                if not tokens:
                    raise InputError(f"{layer.name}: no calibration token reached this layer (an expert?)")
                if not is_own(layer.name, self.owners):
                    continue
                owners = {s: self.leader[layer.name] if s in INPUT_STATS else layer.name for s in self.needs}
                self.shelf.describe(layer.name, tokens, owners, again=self.again)
            self._say()
        return kept

    def backward(
        self,
        batches: list[Batch],
        last: MutableSequence[Tensor],
        kept: dict[int, MutableSequence[Tensor]],
        generator: torch.Generator,
    ) -> None:
        """Output gradients of all blocks, last first, from the states behind the last one."""
        gradients = self.hold(self._gradient_of_loss(b, h, generator) for b, h in zip(batches, last, strict=True))
        last.clear()
        stop = len(self.layers)
        for start in sorted(kept, reverse=True):
            inputs = [kept.pop(start)]
            for block in range(start, stop - 1):
                passed = zip(inputs[-1], batches, strict=True)
                inputs.append(self.hold(self.relay.run(block, h, b.calls[block]) for h, b in passed))
            while inputs:
                self._one_back(start + len(inputs) - 1, batches, inputs.pop(), gradients)
            stop = start

    def _gradient_of_loss(self, batch: Batch, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """At the hidden states behind the last block; one window at a time, since logits are large."""
        found = torch.empty_like(hidden)
        for window in range(len(hidden)):
            here = hidden[window : window + 1].detach().requires_grad_(True)
            ids = batch.ids[window : window + 1]
            with torch.enable_grad():
                logits = self.relay.leave(ids, here)
                loss = (
                    loss_of_text(logits, ids) if Stat.SLOPE in self.needs else loss_of_sampled_labels(logits, generator)
                )
            (found[window : window + 1],) = torch.autograd.grad(loss, here)
        return found

    def _one_back(
        self, block: int, batches: list[Batch], inputs: MutableSequence[Tensor], gradients: MutableSequence[Tensor]
    ) -> None:
        """Sums of one block; `gradients` at its output become those at its input, in place."""
        layers = self.layers[block]
        sums = {layer.name: Sums() for layer in layers}
        wanted = self.needs & GRADIENT_STATS
        self.shelf.expect(sums, wanted, again=self.again)

        def on_gradient(name: str, gradient: Tensor, x: Tensor, windows: torch.Size) -> None:
            add_gradient(sums[name], gradient, x, wanted, windows)

        for i, batch in enumerate(batches):
            before = inputs[i].detach().requires_grad_(True)
            with torch.enable_grad(), hooks_on(self._modules(layers), None, on_gradient, [batch.ids.shape]):
                after = self.relay.run(block, before, batch.calls[block])
                (gradients[i],) = torch.autograd.grad(after, before, gradients[i])
        self._put(sums, wanted)
        for name, own in sums.items():
            if not own.gradient_tokens:
                raise InputError(f"{name}: no gradient reached this layer; raise gradient_windows (an expert?)")
        self._say()

    def _put(self, sums: Mapping[str, Sums], needs: frozenset[Stat]) -> None:
        """Finished sums of a block, of the windows of all ranks, as means into the shelf of whoever owns a layer."""
        check_sums(sums, "the calibration windows")
        here = layers_of(self.walk, sums)
        bring_together(sums, self.leader, here, needs, device_of(self.relay.model), self.owners)
        for name, own in sums.items():
            own.to_means()
            for stat, mean in own.totals.items():
                self.shelf.add(name, stat, mean, share=self.share, again=self.again)
            own.totals.clear()

    def _modules(self, layers: Iterable[Layer]) -> dict[str, nn.Module]:
        return {layer.name: self.relay.model.get_submodule(layer.name) for layer in layers}

    def _say(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress("calibrate", self.done, self.stages)
