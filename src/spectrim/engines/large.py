"""The closed form of run.py for models whose statistics and spectra of all layers a GPU cannot hold at once.

Which models these are: way.py.

    statistics    measured block by block (measure_blocks.py), kept on the host, averaged there round by round
    spectra       in float32 (shelf.py); once ranks are planned, only the components that are kept
    decisions     before propagation, which decomposes every weight again, the last plan needs energies alone
    measure again in a student of plain layers: nothing is stored that is only looked at
    scores        Newton's step there and back, one block of the student at a time (newton_blocks.py)

Of several processes each measures its windows, and keeps the statistics and the spectra of the layers that it owns to
the end: a layer is handed round for the moment in which all place it.

The same steps in the same order; results differ from run.py by float32 rounding of the spectra. States of these
stages are not saved: they are larger than the time they take is worth.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.clock import timed
from spectrim.engines.layerwise import decompose_all, energies_of_layer, place_cut
from spectrim.engines.learned import skeleton
from spectrim.engines.measure_blocks import measure_blocks
from spectrim.engines.newton_blocks import newton_blocks
from spectrim.engines.norms import fused_norms
from spectrim.engines.propagate import propagate
from spectrim.engines.ranks import Plan, plan_ranks
from spectrim.engines.relay import Hold, Relay, entered
from spectrim.engines.rotary import fused_rotary
from spectrim.engines.run import Run
from spectrim.engines.shelf import SpectraShelf, StatsShelf, energies_in
from spectrim.engines.spread import energies_of_all, handed_some, holders_of, is_own, layers_of, means_of_all, owners_of
from spectrim.engines.stream import Stream
from spectrim.linalg.factor import Spectrum
from spectrim.memory import release
from spectrim.method import SEARCHED, LearnedMethod
from spectrim.models.walk import Walk, device_of, weight_of
from spectrim.processes import present
from spectrim.stats import Stats


class LargeRun(Run):
    """One block's statistics and one layer's spectrum at a time."""

    @property
    def trains(self) -> bool:
        """Whether all components are learned on: in 16 bits on the device, with the accurate ones on the host."""
        return self.method.windows_trained > 0

    def closed_form(self, ids: Tensor) -> tuple[MutableMapping[str, Spectrum], Plan]:
        """As of Run; norms and rotations run as one kernel each, in the model and in its students."""
        with fused_norms(self.dense), fused_rotary(self.dense):
            return super().closed_form(ids)

    def statistics(
        self, model: PreTrainedModel, ids: Tensor, again: int, after: str = "", stage: int | str | None = None
    ) -> Mapping[str, Stats]:
        """Of the dense model, into a new shelf."""
        shelf = self.room_for_statistics()
        self.measure_into(shelf, model, ids, share=1.0, again=again)
        return shelf

    def measure_into(self, shelf: StatsShelf, model: PreTrainedModel, ids: Tensor, *, share: float, again: int) -> None:
        """One measurement, as `share` of the mean."""
        if not self.method.needs:
            for layer in self.layers_kept().layers:
                shelf.describe(layer.name, int(ids.numel()), {}, again=again)
            return
        given = (model, self.walk, ids, self.method.needs, shelf)
        told = {"seed": self.seed + again, "share": share, "again": again, "progress": self.progress}
        told |= self.aids(model)
        with timed(self.clock, "calibrate"):
            self.batch.run(
                "calibrate",
                lambda size: measure_blocks(*given, batch_size=size, gradient_windows=self.gradient_windows, **told),
                most=len(ids),
            )
        release()

    def blended(
        self, first: Mapping[str, Stats], spectra: MutableMapping[str, Spectrum], plan: Plan, ids: Tensor, again: int
    ) -> Mapping[str, Stats]:
        """In place: the mean of the first statistics and those of the model compressed to each size it is to serve.

        Half of it from the first ones. The spectra are cleared where they serve one size, as their layers are placed.
        """
        assert isinstance(first, StatsShelf)
        sizes = self.again_at or (self.keep,)
        for position, size in enumerate(sizes):
            energies = {} if size == self.keep else energies_of_all(self.dense, self.walk, energies_in(spectra))
            at_size = plan if size == self.keep else plan_ranks(self.by_layer, self.walk, energies, size)
            with timed(self.clock, "place"):
                student = skeleton(self.dense)
                self.place_all(student, spectra, at_size, last=position + 1 == len(sizes))
            share = 1 / (len(sizes) + position + 1)  # in the end: half of the first, the rest in equal parts
            self.measure_into(first, student, self.round_windows(ids), share=share, again=again + position)
        return first

    def place_all(
        self, student: PreTrainedModel, spectra: MutableMapping[str, Spectrum], plan: Plan, *, last: bool
    ) -> None:
        """Every layer at its planned size, from whoever has it; where it is the `last` time, its spectrum goes."""
        holders = holders_of(self.walk, spectra)
        means = self.means
        if self.by_layer.centres:
            means = means_of_all(self.dense, self.walk, means)
        for layer in self.walk.layers:
            target = plan.targets[layer.name]
            (given,) = handed_some(self.dense, [layer.name], holders, lambda n: spectra[n]).values()
            place_cut(student, self.dense, layer.name, given, target, means.get(layer.name))
            if last and layer.name in spectra:
                del spectra[layer.name]

    def layers_kept(self) -> Walk:
        """Those that this process owns."""
        owners = owners_of(self.walk, self.method.needs)
        return layers_of(self.walk, [name for name in owners if is_own(name, owners)])

    def hand_round(self, spectra: MutableMapping[str, Spectrum], plan: Plan, stats: Mapping[str, Stats]) -> None:
        """Nothing: no process could keep all of them."""

    def room_for_statistics(self) -> StatsShelf:
        """On the host."""
        return StatsShelf(device_of(self.dense))

    def aids(self, _model: PreTrainedModel) -> dict[str, Any]:
        """Further arguments of a measurement of this model."""
        return {}

    def begin(self, model: PreTrainedModel, walk: Walk, ids: Tensor, batch_size: int) -> Stream:
        """A model's hidden states before its first block."""
        return entered(model, walk, ids, batch_size)

    def room_for_spectra(self) -> SpectraShelf:
        """On the host where all components are learned on."""
        return SpectraShelf(device_of(self.dense), on_host=self.trains)

    def decide(self, stats: Mapping[str, Stats], again: int) -> tuple[MutableMapping[str, Spectrum], Plan]:
        """Ranks, and the spectra where they are used before propagation makes others."""
        asked = self.by_layer
        if asked.centres:
            self.means = {name: mean for name, own in stats.items() if (mean := own.mean) is not None}
        spectra = self.room_for_spectra()
        with timed(self.clock, "decompose"):
            if again == self.rounds and self.propagates and asked.allocation not in SEARCHED:
                energies = {
                    la.name: energies_of_layer(asked, la, weight_of(self.dense.get_submodule(la.name)), stats[la.name])
                    for la in self.walk.layers
                    if la.name in stats
                }
            else:
                decompose_all(asked, self.dense, self.walk, stats, into=spectra, progress=self.progress)
                energies = spectra.energies
        self.settle(stats)
        with timed(self.clock, "allocate"):
            return spectra, plan_ranks(asked, self.walk, energies_of_all(self.dense, self.walk, energies), self.keep)

    @staticmethod
    def settle(stats: Mapping[str, Stats]) -> None:
        """Let go of what came to the device for the layer that was looked at last, and of what torch keeps in hand."""
        assert isinstance(stats, StatsShelf)
        stats.recent = {}
        release()

    def propagate(
        self, spectra: MutableMapping[str, Spectrum], plan: Plan, stats: Mapping[str, Stats], ids: Tensor
    ) -> None:
        """Step 5 over the windows of a later round: what they tell of a drift is enough."""
        assert isinstance(spectra, SpectraShelf)

        def keep(name: str) -> int | None:
            target = plan.targets[name]
            return None if self.trains or target.codec == "dense" else target.rank

        spectra.keep = keep
        given = (self.by_layer, self.dense, self.walk, spectra, plan, stats, self.round_windows(ids))
        with timed(self.clock, "propagate"):
            told = {"progress": self.progress, "begin": self.begin}
            self.warnings += self.batch.run("propagate", lambda size: propagate(*given, batch_size=size, **told))
        self.settle(stats)

    def newton(
        self, method: LearnedMethod, spectra: MutableMapping[str, Spectrum], plan: Plan, windows: Tensor
    ) -> None:
        """Scores of what is kept, block by block; processes that have parts of the spectra take newton.py's way."""
        if not present().alone:
            super().newton(method, spectra, plan, windows)
            return
        assert isinstance(spectra, SpectraShelf)
        relay = Relay(self.dense, self.walk)
        relay.check()
        self.newton_from(relay, method, spectra, plan, windows)
        release()

    def newton_from(
        self, relay: Relay, method: LearnedMethod, spectra: SpectraShelf, plan: Plan, windows: Tensor, hold: Hold = list
    ) -> None:
        """There and back over the blocks of a checked `relay`; `hold` keeps hidden states."""
        given = (method, relay, self.walk, spectra, plan, windows)
        told = {"steps": method.newton_steps, "hold": hold, "progress": self.progress}
        self.batch.run("newton", lambda size: newton_blocks(*given, batch_size=size, **told))
