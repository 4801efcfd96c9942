"""What the closed-form part of a compression shares between its rounds: steps 2 to 5 of pipeline.py.

Statistics and spectra of all layers are held at once, which large models do not allow: large.py.

Of several processes each has the statistics and the spectra of its own layers, until `hand_round` gives all to all.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.clock import timed
from spectrim.engines.closed_form import LEADS_TO_IT, identity, pack_closed_form, unpack_closed_form
from spectrim.engines.closed_form import STAGE as CLOSED_FORM
from spectrim.engines.couple import couple
from spectrim.engines.dead_inputs import dead_inputs
from spectrim.engines.layerwise import apply_plan, decompose_all, solve_at_ranks
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import Progress, add_up, measure
from spectrim.engines.newton import newton_scores
from spectrim.engines.ordered import ordered_plan
from spectrim.engines.parts import SavedFirst, energies_of
from spectrim.engines.propagate import propagate
from spectrim.engines.ranks import Plan, plan_ranks
from spectrim.engines.search import searched_plan
from spectrim.engines.sharing import decompose_groups, find_groups, plan_groups, settle_groups
from spectrim.engines.shelf import StatsShelf, bytes_of, energies_in
from spectrim.engines.spread import at_first, energies_of_all, hand_round
from spectrim.linalg.factor import Spectrum
from spectrim.memory import Batch
from spectrim.method import SEARCHED, LayerMethod, LearnedMethod, Method, OrderedMethod
from spectrim.models.walk import Walk, device_of
from spectrim.processes import Share, present
from spectrim.stats import Stat, Stats

FIRST_STATISTICS = "statistics 0"
"""The stage of the dense model's statistics."""
CPU_BATCH, GPU_BATCH = 4, 32
"""Windows in one calibration batch; on a GPU fewer, if they are longer than `SHORT`."""
SHORT = 512


def calibration_batch(device: torch.device, length: int) -> int:
    """Windows of `length` tokens at a time."""
    return CPU_BATCH if device.type == "cpu" else max(1, GPU_BATCH * SHORT // max(SHORT, length))


@dataclass
class Run:
    """What the closed-form part shares between its rounds."""

    dense: PreTrainedModel
    method: Method
    walk: Walk
    keep: float
    seed: int
    progress: Progress | None
    clock: dict[str, float]
    gradient_windows: int
    checkpoint: Checkpoint | None = None
    one_size: bool = True
    again_at: tuple[float, ...] = ()
    length: int = SHORT
    sharded: bool = False
    """Whether processes share out what is frozen while scores are learned (sharded.py)."""
    warnings: list[str] = field(default_factory=list)
    frontier: list[dict[str, float]] = field(default_factory=list)
    energies: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    """Of the inputs of every layer, where biases make up for them."""

    def __post_init__(self) -> None:
        self.batch = Batch(calibration_batch(device_of(self.dense), self.length))
        self.unfinished = self.checkpoint if present().alone else None  # each of several has sums of its own

    @property
    def by_layer(self) -> LayerMethod:
        """The method, of a run that treats one weight at a time."""
        assert isinstance(self.method, LayerMethod)
        return self.method

    @property
    def propagates(self) -> bool:
        """True when weights change before they are cut, those that stay dense too: they then fit one size only."""
        return self.one_size and self.by_layer.error_share > 0 and self.keep < 1

    @property
    def rounds(self) -> int:
        """How often statistics are measured again."""
        return self.by_layer.rounds if self.keep < 1 else 0

    @property
    def changes(self) -> bool:
        """True when layers that stay dense are not what they were."""
        scored = isinstance(self.method, LearnedMethod) and self.method.newton_steps > 0
        return self.propagates or (self.one_size and self.keep < 1 and scored)

    def closed_form_or_saved(
        self, ids: Tensor, *, learned: bool
    ) -> tuple[MutableMapping[str, Spectrum], Plan, Checkpoint | None]:
        """The closed form, from the checkpoint if it is there; and the checkpoint, which keeps it when it must."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return *self.closed_form(ids), None
        run = identity(self.by_layer, self.walk, self.keep, self.seed, ids)
        saved = checkpoint.load(CLOSED_FORM, optional=True)
        if saved is None:
            spectra, plan = self.closed_form(ids)
            checkpoint.load(CLOSED_FORM)  # still not there: scores that belong to another one are discarded
        else:
            spectra = self.room_for_spectra()
            own = self.layers_kept()
            plan, self.means, self.warnings = unpack_closed_form(saved, self.dense, own, run, into=spectra)
            checkpoint.forget(*LEADS_TO_IT)

        def pack() -> Saved:
            packed = pack_closed_form(
                spectra, plan, run, learned=learned, changed=learned or self.changes, every=not self.one_size,
                warnings=self.warnings, means=self.means,
            )  # fmt: skip
            return (
                packed if len(spectra) == len(self.walk.layers) else packed._replace(tensors=at_first(packed.tensors))
            )

        keeper = SavedFirst(checkpoint, CLOSED_FORM, pack, kept=saved is not None, replaces=LEADS_TO_IT)
        if saved is None and checkpoint.worth(bytes_of(spectra)):
            keeper.keep()
        return spectra, plan, keeper

    def layers_kept(self) -> Walk:
        """The layers whose spectra this process keeps to the end."""
        return self.walk

    def room_for_spectra(self) -> MutableMapping[str, Spectrum]:
        """Empty, for the spectra of all layers."""
        return {}

    def closed_form(self, ids: Tensor) -> tuple[MutableMapping[str, Spectrum], Plan]:
        """Steps 2 to 5: spectra in the final metric, and the ranks under the budget."""
        first = stats = self.statistics(self.dense, ids, 0)
        self.warnings += dead_inputs(first.input_sizes() if isinstance(first, StatsShelf) else first)
        spectra, plan = self.decide(stats, 0)
        for again in range(1, 1 + self.rounds):
            stats = self.blended(first, spectra, plan, ids, again)
            spectra, plan = self.decide(stats, again)
        if self.one_size and self.keep < 1 and self.by_layer.allocation in SEARCHED:
            plan = self.search(spectra, ids)
        if self.propagates:
            self.propagate(spectra, plan, stats, ids)
        if self.one_size and self.keep < 1:
            with timed(self.clock, "solve"):
                solve_at_ranks(self.by_layer, self.walk, spectra, plan, stats)
        with timed(self.clock, "decompose"):
            self.hand_round(spectra, plan, stats)
        if self.one_size and self.keep < 1 and isinstance(self.method, LearnedMethod) and self.method.newton_steps:
            with timed(self.clock, "newton"):
                self.newton(self.method, spectra, plan, self.round_windows(ids))
        return spectra, plan

    def hand_round(self, spectra: MutableMapping[str, Spectrum], plan: Plan, stats: Mapping[str, Stats]) -> None:
        """The spectra of all layers to all ranks, of those that nothing is learned on only what is kept."""
        cut = self.one_size and not self.changes and not (self.method.windows_trained and self.keep < 1)
        hand_round(self.dense, self.walk, spectra, self.means, stats, plan if cut else None)

    def newton(
        self, method: LearnedMethod, spectra: MutableMapping[str, Spectrum], plan: Plan, windows: Tensor
    ) -> None:
        """Scores of what is kept, folded into the spectra."""
        given = (method, self.dense, self.walk, spectra, plan, windows)
        told = {"steps": method.newton_steps, "progress": self.progress, "checkpoint": self.unfinished}
        told["sharded"] = self.sharded
        self.batch.run("newton", lambda size: newton_scores(*given, batch_size=size, **told))

    def blended(
        self, first: Mapping[str, Stats], spectra: MutableMapping[str, Spectrum], plan: Plan, ids: Tensor, again: int
    ) -> Mapping[str, Stats]:
        """The mean of the first statistics and those of the compressed model."""
        second = self.measured_again(spectra, plan, ids, again)
        return {name: first[name].blend(second[name]) for name in first}

    def measured_again(
        self, spectra: Mapping[str, Spectrum], plan: Plan, ids: Tensor, again: int
    ) -> Mapping[str, Stats]:
        """Statistics of the compressed model; of all sizes it is to serve, their mean."""
        after = "" if self.unfinished is None else energies_of(spectra)
        mean: Mapping[str, Stats] = {}
        for position, size in enumerate(self.again_at or (self.keep,)):
            energies = {} if size == self.keep else energies_of_all(self.dense, self.walk, energies_in(spectra))
            at_size = plan if size == self.keep else plan_ranks(self.by_layer, self.walk, energies, size)
            student = skeleton(self.dense)
            apply_plan(student, self.walk, at_size, spectra, means=self.means)
            stage = f"{again} {position}" if position else again
            found = self.statistics(student, self.round_windows(ids), again, after, stage=stage)
            share = 1 / (position + 1)
            mean = {name: mean[name].blend(own, share) for name, own in found.items()} if mean else found
        return mean

    def round_windows(self, ids: Tensor) -> Tensor:
        """The windows of a later round: those that give gradients."""
        return ids[: self.gradient_windows]

    def statistics(
        self, model: PreTrainedModel, ids: Tensor, again: int, after: str = "", stage: int | str | None = None
    ) -> Mapping[str, Stats]:
        """Those of round `again`, kept as `stage`; `after` says by a hash what `model` is."""
        kept_as = again if stage is None else stage
        told = {"seed": self.seed + again, "progress": self.progress, "checkpoint": self.unfinished}
        with timed(self.clock, "calibrate"):
            asked = (model, self.walk, ids, self.method.needs)
            more = {"gradient_windows": self.gradient_windows, "stage": f"statistics {kept_as}", "after": after}
            more["owned"] = isinstance(self.method, LayerMethod)
            stats = self.batch.run("calibrate", lambda size: measure(*asked, batch_size=size, **more, **told))
        if self.method.refinement is None:
            return stats
        with timed(self.clock, "couple"):
            given = (model, self.walk, ids[: self.gradient_windows], stats, self.method.refinement)
            stage = f"coupling {kept_as}"
            return self.batch.run("couple", lambda size: couple(*given, batch_size=size, stage=stage, **told))

    def share_of_first(self, ids: Tensor, share: Share) -> Saved:
        """The sums that `statistics` of round 0 are made of, over a share of the windows."""
        told: dict[str, Any] = {"seed": self.seed, "progress": self.progress, "checkpoint": self.checkpoint}
        told |= {"gradient_windows": self.gradient_windows, "stage": FIRST_STATISTICS, "share": share}

        def work(size: int) -> Saved:
            passed = add_up(self.dense, self.walk, ids, self.method.needs, batch_size=size, **told)
            return passed.keeper.saved(passed.windows)

        return self.batch.run("calibrate", work)

    def search(self, spectra: Mapping[str, Spectrum], ids: Tensor) -> Plan:
        """Ranks by what the model does with them."""
        with timed(self.clock, "search"):
            given = (self.by_layer, self.dense, self.walk, spectra, self.means, self.keep, ids)
            return searched_plan(*given, seed=self.seed, progress=self.progress)

    def propagate(
        self, spectra: MutableMapping[str, Spectrum], plan: Plan, stats: Mapping[str, Stats], ids: Tensor
    ) -> None:
        """Step 5, in place. Only forward passes; on a CPU the windows of a later round are enough of them."""
        windows = self.round_windows(ids) if device_of(self.dense).type == "cpu" else ids
        given = (self.by_layer, self.dense, self.walk, spectra, plan, stats, windows)
        with timed(self.clock, "propagate"):
            after = None if self.unfinished is None else energies_of(spectra)
            told = {"progress": self.progress, "checkpoint": self.unfinished, "after": after}
            self.warnings += self.batch.run("propagate", lambda size: propagate(*given, batch_size=size, **told))

    def decide(self, stats: Mapping[str, Stats], again: int) -> tuple[MutableMapping[str, Spectrum], Plan]:
        """Spectra in the metric of these statistics, and the ranks."""
        if self.by_layer.shares:
            return self.decide_together(stats, again)
        if self.method.centres:
            self.means = {name: own.get(Stat.MEAN) for name, own in stats.items()}
        with timed(self.clock, "decompose"):
            told: dict[str, Any] = {"checkpoint": self.unfinished, "progress": self.progress}
            spectra = decompose_all(self.by_layer, self.dense, self.walk, stats, stage=f"spectra {again}", **told)
        if isinstance(self.method, OrderedMethod) and self.method.allocation == "order":
            with timed(self.clock, "allocate"):
                return spectra, ordered_plan(self.method, self.dense, self.walk, spectra, stats, self.keep)
        with timed(self.clock, "allocate"):
            energies = energies_of_all(self.dense, self.walk, energies_in(spectra))
            return spectra, plan_ranks(self.by_layer, self.walk, energies, self.keep)

    def decide_together(self, stats: Mapping[str, Stats], again: int) -> tuple[MutableMapping[str, Spectrum], Plan]:
        """The same where layers with one input may share a factor."""
        method, groups = self.by_layer, find_groups(self.dense, self.walk)
        inside = {layer.name for group in groups for layer in group}
        apart = stats if method.storage == "best" else {n: own for n, own in stats.items() if n not in inside}
        with timed(self.clock, "decompose"):
            told: dict[str, Any] = {"checkpoint": self.unfinished, "progress": self.progress}
            spectra = decompose_all(method, self.dense, self.walk, apart, stage=f"spectra {again}", **told)
            common = decompose_groups(method, self.dense, groups, stats, progress=self.progress)
        with timed(self.clock, "allocate"):
            errors = {name: own.error for name, own in common.items()}
            plan = plan_groups(method, self.walk, groups, energies_in(spectra), errors, self.keep)
        settle_groups(spectra, groups, common, plan)
        return spectra, plan
