"""The closed form of large.py for models that neither the GPU nor the host can hold: `--low-memory`.

    weights       one block at a time, read from the model's files                          models/streamed.py
    statistics    in scratch files; one layer's at a time in memory                         spill.py
    spectra       their energies alone until ranks are planned; what is kept then goes to scratch files
    measure again in a student whose compressed layers lie in scratch files
    hidden states on the GPU up to STATES_SHARE of the limit, else in scratch files

The steps are those of large.py, in their order, and the numbers are the same. Only the ranks of a first round are
planned from `method.energies`, where large.py has the energies of full decompositions: the same to rounding in float64.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.clock import timed
from spectrim.engines.large import LargeRun
from spectrim.engines.layerwise import decompose_layer, energies_of_layer, place_cut
from spectrim.engines.learned import skeleton
from spectrim.engines.low_memory_way import FEWER, STATES_SHARE, limit_of
from spectrim.engines.ranks import Plan, plan_ranks
from spectrim.engines.relay import Relay, entered
from spectrim.engines.shelf import SpectraShelf, StatsShelf
from spectrim.engines.spill import FileShelf, States
from spectrim.engines.stream import Stream
from spectrim.linalg.factor import Spectrum
from spectrim.memory import memory_capped, memory_in_use, release, total_memory
from spectrim.method import LearnedMethod
from spectrim.models.streamed import Home, Streamed, settle_in
from spectrim.models.walk import Layer, Walk, device_of, linear_at, shared_inputs, weight_of
from spectrim.stage import at
from spectrim.stats import Stats
from spectrim.store.scratch import Scratch, Stored


@contextmanager
def limited(device: torch.device) -> Iterator[None]:
    """While this is open, torch runs out of the GPU's memory at the limit, and batches shrink as on any card.

    What goes by the size of the card goes by the limit: whether weights are widened, what stays on the device.
    """
    limit, total = limit_of(device), total_memory(device)
    if limit is None or total is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(limit / total, index)
    try:
        with memory_capped(limit):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


class RoomForStates:
    """Hidden states stay on the device up to STATES_SHARE of the limit, all that is allocated counted.

    Never on a CPU, where that would be the memory to be spared.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.share = device, STATES_SHARE

    def __call__(self, nbytes: int) -> bool:
        """Whether so many bytes more stay there."""
        limit = limit_of(self.device)
        return limit is not None and memory_in_use(self.device) + nbytes <= self.share * limit

    def give_way(self) -> str | None:
        """Memory ran out: from now on no states stay on the device. None where none did."""
        if limit_of(self.device) is None or not self.share:
            return None
        self.share = 0.0
        return "all hidden states in scratch files"


@dataclass(kw_only=True)
class LowMemoryRun(LargeRun):
    """One block's weights, one layer's statistics, one layer's spectrum at a time."""

    streamed: Streamed
    scratch: Scratch

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = device_of(self.dense)
        self.has_room = RoomForStates(self.device)
        self.batch.give_way = self.has_room.give_way
        if limit_of(self.device) is not None:
            self.batch.size = max(1, self.batch.size // FEWER)
        self.relay = Relay(self.dense, self.walk)
        self.relay.check()
        self.groups = shared_inputs(self.dense, self.walk.layers)
        self.streamed.home.let_go()  # else norms of the block that is there would be fused, and of no other (norms.py)

    def hold(self, tensors: Iterable[Tensor]) -> States:
        """Hidden states, wherever there is room."""
        return States(self.scratch, self.has_room, tensors)

    def relay_of(self, model: PreTrainedModel) -> Relay:
        """Of this model, or of a copy of it."""
        return self.relay if model is self.dense else Relay(model, self.walk, self.relay.gives_tuple)

    def aids(self, model: PreTrainedModel) -> dict[str, Any]:
        """What was found out once, and where states go. No block is there then: all run in the same way (norms.py)."""
        self.streamed.home.let_go()
        found = {"hold": self.hold, "relay": self.relay_of(model), "groups": self.groups}
        return found if limit_of(self.device) is None else found | {"one_way": 1}

    def begin(self, model: PreTrainedModel, walk: Walk, ids: Tensor, batch_size: int) -> Stream:
        """A model's hidden states before its first block."""
        return entered(model, walk, ids, batch_size, relay=self.relay_of(model), hold=self.hold)

    def room_for_statistics(self) -> StatsShelf:
        """In scratch files."""
        return StatsShelf(self.device, FileShelf(self.device, self.scratch))

    def room_for_spectra(self) -> SpectraShelf:
        """In scratch files."""
        return SpectraShelf(self.device, shelf=FileShelf(self.device, self.scratch))

    def blocks(self) -> Iterator[tuple[int, list[Layer]]]:
        """Each block's layers, in order, with their weights at hand."""
        for index in range(len(self.walk.block_names)):
            layers = [layer for layer in self.walk.layers if layer.block == index]
            if layers:
                self.streamed.at_hand(index)
                yield index, layers

    def decide(self, stats: Mapping[str, Stats], again: int) -> tuple[MutableMapping[str, Spectrum], Plan]:
        """Ranks from energies alone; and spectra, cut to them, if they are the last and nothing changes the weights."""
        asked = self.by_layer
        if asked.centres:
            self.means = {name: mean for name, own in stats.items() if (mean := own.mean) is not None}
        energies: dict[str, Tensor] = {}
        with timed(self.clock, "decompose"):
            for _, layers in self.blocks():
                for la in layers:
                    energies[la.name] = energies_of_layer(asked, la, self.weight(la), stats[la.name])
                    self.say(at("decompose", la.name), len(energies), len(self.walk.layers))
        release()
        with timed(self.clock, "allocate"):
            plan = plan_ranks(asked, self.walk, energies, self.keep)
        spectra = self.room_for_spectra()
        if again == self.rounds and not self.propagates:
            spectra.energies.update(energies)  # of layers that stay as they are, nothing else is needed
            with timed(self.clock, "decompose"):
                self._decompose(spectra, plan, stats)
            self._forget(stats, self.walk.layers)
        return spectra, plan

    @staticmethod
    def _forget(stats: Mapping[str, Stats], layers: Iterable[Layer]) -> None:
        """Remove the statistics of layers that nothing asks for any more."""
        assert isinstance(stats, StatsShelf)
        stats.forget([layer.name for layer in layers])

    def _decompose(self, spectra: SpectraShelf, plan: Plan, stats: Mapping[str, Stats]) -> None:
        """What is kept of every layer that is cut."""
        spectra.keep = lambda name: plan.targets[name].rank
        for _, layers in self.blocks():
            for la in layers:
                if plan.targets[la.name].codec != "dense" or self.changes:
                    spectra[la.name] = decompose_layer(self.by_layer, la, self.weight(la).double(), stats[la.name])
        release()

    def weight(self, layer: Layer) -> Tensor:
        """Of the block that is at hand."""
        return weight_of(self.dense.get_submodule(layer.name)).detach()

    def say(self, stage: str, done: int, total: int) -> None:
        """Tell how far it is."""
        if self.progress is not None:
            self.progress(stage, done, total)

    def blended(
        self, first: Mapping[str, Stats], spectra: MutableMapping[str, Spectrum], plan: Plan, ids: Tensor, again: int
    ) -> Mapping[str, Stats]:
        """In place: the mean of the first statistics and those of the compressed model."""
        assert isinstance(first, StatsShelf)
        placed: dict[str, Stored] = {}
        with timed(self.clock, "place"):
            student = self._student(plan, first, placed)
        self.measure_into(first, student, self.round_windows(ids), share=0.5, again=again)
        placed.clear()  # at once: a model is in cycles, which are not looked for often
        return first

    def _student(self, plan: Plan, stats: Mapping[str, Stats], placed: dict[str, Stored]) -> PreTrainedModel:
        """The compressed model; its layers go to scratch files as dense ones, which `placed` holds."""
        self.streamed.home.let_go()
        student, dense = skeleton(self.dense), self.streamed.home

        def read(name: str) -> Tensor:
            return placed[name].read() if name in placed else dense.read(name)

        for index, layers in self.blocks():
            dense.fill(student.get_submodule(self.walk.block_names[index]), index)
            for la in layers:
                one = SpectraShelf(self.device)  # in the precision in which large.py has it
                one[la.name] = decompose_layer(self.by_layer, la, self.weight(la).double(), stats[la.name])
                place_cut(student, self.dense, la.name, one[la.name], plan.targets[la.name], self.means.get(la.name))
                module = linear_at(student, la.name)
                for key, parameter in list(module.named_parameters()):
                    placed[f"{la.name}.{key}"] = self.scratch.put(parameter)
                    hollow = torch.empty_like(parameter, device="meta")
                    module.register_parameter(key, torch.nn.Parameter(hollow, requires_grad=False))
            self.say("place", index + 1, len(self.walk.block_names))
        dense.let_go()
        release()
        settle_in(student, self.walk, Home(self.walk.block_names, read))
        return student

    def propagate(
        self, spectra: MutableMapping[str, Spectrum], plan: Plan, stats: Mapping[str, Stats], ids: Tensor
    ) -> None:
        """Step 5; the statistics of blocks that are through are removed, so that spectra have their room.

        Begun anew when memory runs out, it passes these blocks with the spectra that they have.
        """
        self.streamed.home.let_go()
        own = self.progress

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "propagate":
                self._forget(stats, [la for la in self.walk.layers if la.block == done - 1])
            if own is not None:
                own(stage, done, total)

        self.progress = progress
        try:
            super().propagate(spectra, plan, stats, ids)
        finally:
            self.progress = own
        self._forget(stats, self.walk.layers)
        self.streamed.home.let_go()

    def newton(
        self, method: LearnedMethod, spectra: MutableMapping[str, Spectrum], plan: Plan, windows: Tensor
    ) -> None:
        """Scores of what is kept, block by block, there and back."""
        assert isinstance(spectra, SpectraShelf)
        self.newton_from(self.relay, method, spectra, plan, windows, self.hold)
        self.streamed.home.let_go()
        release()
