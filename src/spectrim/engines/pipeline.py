"""One compression in memory, from a dense model to a compressed one; the dense model is not changed.

1. find the target layers; refuse weights that are not finite
   a method that treats the model as a whole makes it from the statistics of 2           engines/whole.py
2. measure the statistics the method needs, in one pass over the calibration windows     engines/measure.py
   and refine them in a second gradient pass, if the method asks for it                  engines/couple.py
3. decompose every weight in the method's metric                                         engines/layerwise.py
   choose all ranks under the budget                                                     engines/ranks.py
4. `rounds` times: put the compressed layers in place, measure again, average, go to 3
   ranks by what the whole model does with them, for allocations that search           engines/search.py
5. in running order, let each weight make up for the error before it, decompose it again engines/propagate.py
   methods whose answer depends on the rank solve for it (LayerMethod.at_rank)           engines/layerwise.py
   Newton steps on the scores of what is kept, if the method asks for them              engines/newton.py
6. trained methods: scores on the spectra, or masks and adapters         engines/learned.py, engines/masked.py
7. encode each layer, put it in place
8. recovery: refit, block refinement, distillation                                       engines/recovery.py
9. factors, pivot parts and dense layers in few bits, if asked for               engines/quantise_factors.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.clock import timed
from spectrim.engines.closed_form import LEADS_TO_IT, identity, pack_closed_form, unpack_closed_form
from spectrim.engines.closed_form import STAGE as CLOSED_FORM
from spectrim.engines.couple import couple
from spectrim.engines.layerwise import (
    apply_plan,
    check_weights,
    decompose_all,
    refuse_large_sides,
    solve_at_ranks,
)
from spectrim.engines.learned import skeleton, train_scores
from spectrim.engines.masked import train_masks
from spectrim.engines.measure import Progress, dead_inputs, default_gradient_windows, measure
from spectrim.engines.newton import newton_scores
from spectrim.engines.ordered import ordered_plan
from spectrim.engines.outcome import FactorQuantization, Made, Outcome
from spectrim.engines.parts import SavedFirst, energies_of, size_of
from spectrim.engines.propagate import propagate
from spectrim.engines.quantise_factors import check_asked, quantise_behind
from spectrim.engines.ranks import Plan, plan_ranks
from spectrim.engines.recovery import recover
from spectrim.engines.search import searched_plan
from spectrim.engines.spread import energies_of_all, hand_round
from spectrim.engines.unspread import refuse_unspread
from spectrim.engines.whole import make_whole, refuse_skipped
from spectrim.linalg.factor import Spectrum
from spectrim.memory import Batch
from spectrim.method import SEARCHED, LayerMethod, LearnedMethod, MaskedMethod, Method, OrderedMethod
from spectrim.model_method import ModelMethod
from spectrim.models.walk import Walk, device_of, find_layers
from spectrim.options import FACTOR_GROUP_SIZE, Nonfinite, check_keep, recovery_of
from spectrim.processes import present
from spectrim.stats import Stat, Stats

CPU_BATCH, GPU_BATCH = 4, 32
"""Windows in one calibration batch."""


# Empty layers start from torch's own random numbers: the caller's stay where they were.
@torch.random.fork_rng(devices=[])
def compress_model(
    dense: PreTrainedModel,
    method: Method,
    keep: float,
    calibration: Tensor,
    training: Tensor | None = None,
    *,
    recovery: tuple[str, ...] = (),
    factor_bits: int | None = None,
    factor_group_size: int = FACTOR_GROUP_SIZE,
    gradient_windows: int | None = None,
    nonfinite: Nonfinite = "refuse",
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Compress `dense` (weights in float32) to `keep` of the stored numbers of its decoder linears.

    `calibration` (windows, length) feeds the statistics, `training` the learned steps (None: the same windows).
    `gradient_windows` says how many of the calibration windows give gradients, see `default_gradient_windows`.
    `recovery` names further steps, see engines/recovery.py. `nonfinite="skip"` copies layers with NaN or Inf unchanged.
    `factor_bits` (8, 4 or 3) are those that low-rank and dense layers are quantised to at the end; `keep` is the share
    of their numbers all the same.
    With a `checkpoint`, every stage is saved there where that is cheap, and what it holds is taken from it: sums,
    spectra, scores, trained factors.
    """
    check_keep(keep)
    steps = recovery_of(method, recovery)
    found = find_layers(dense)
    check_asked(method, found, factor_bits, factor_group_size)
    walk, warnings = check_weights(dense, found, nonfinite)
    refuse_skipped(method, walk, found)
    refuse_large_sides(method, walk)
    clock: dict[str, float] = {}
    if gradient_windows is None:
        gradient_windows = default_gradient_windows(len(calibration), device_of(dense))
    refuse_unspread(method, steps, factor_bits, len(calibration), gradient_windows)
    run = _Run(dense, method, walk, keep, seed, progress, clock, gradient_windows, checkpoint)
    training = calibration if training is None else training
    made = (as_a_whole if isinstance(method, ModelMethod) else by_layers)(run, calibration, training)
    recovered = recover(
        steps, made.student, dense, walk, calibration, training, timed=partial(timed, clock), seed=seed,
        progress=progress, checkpoint=made.checkpoint,
    )  # fmt: skip
    rounded = None if factor_bits is None else FactorQuantization(factor_bits, factor_group_size)
    if rounded is not None:
        with timed(clock, "quantise"):
            quantise_behind(made.student, walk, calibration, **rounded._asdict(), progress=progress)
    return Outcome(
        model=made.student.eval(),
        method=method,
        walk=walk,
        plan=made.plan,
        placed=made.placed,
        learned=made.learned,
        recovered=tuple(recovered),
        factor_quantization=rounded,
        seconds=clock,
        gradient_windows=gradient_windows,
        warnings=[*warnings, *run.warnings, *(made.learned.warnings if made.learned else ())],
    )


def by_layers(run: "_Run", calibration: Tensor, training: Tensor) -> Made:
    """Steps 2 to 7 for a method that treats one weight at a time."""
    method, clock = run.by_layer, run.clock
    learns = method.windows_trained > 0 and run.keep < 1
    spectra, plan, checkpoint = run.closed_form_or_saved(calibration, learned=learns)
    student = skeleton(run.dense)
    if not learns:
        with timed(clock, "encode"):
            placed = apply_plan(student, run.walk, plan, spectra, learned=run.changes, means=run.means)
        return Made(student, plan, placed, None, checkpoint)
    given = (run.dense, run.walk, spectra, run.keep, training)
    common = {"seed": run.seed, "progress": run.progress, "checkpoint": checkpoint}
    with timed(clock, "learn"):
        if isinstance(method, MaskedMethod):
            learned = train_masks(method, *given, **common)
        else:
            assert isinstance(method, LearnedMethod)
            learned = train_scores(method, *given, plan=plan, **common)
    placed = apply_plan(student, run.walk, learned.plan, learned.factors, learned=True)
    return Made(student, learned.plan, placed, learned, checkpoint)


def as_a_whole(run: "_Run", calibration: Tensor, training: Tensor) -> Made:
    """Step 2, and then what the method makes of the model."""
    method = run.method
    assert isinstance(method, ModelMethod)
    stats = run.statistics(run.dense, calibration, 0) if method.reads_dense_stats else {}
    with timed(run.clock, "compress"):
        student, plan, placed = make_whole(
            method, run.dense, run.walk, run.keep, stats, calibration, training, gradient_windows=run.gradient_windows,
            seed=run.seed, warnings=run.warnings, timed=partial(timed, run.clock), progress=run.progress,
            checkpoint=run.checkpoint,
        )  # fmt: skip
    return Made(student, plan, placed, None, run.checkpoint)


def closed_form(
    dense: PreTrainedModel,
    method: LayerMethod,
    walk: Walk,
    keep: float,
    calibration: Tensor,
    *,
    gradient_windows: int,
    seed: int,
    clock: dict[str, float],
    progress: Progress | None,
    checkpoint: Checkpoint | None = None,
    again_at: tuple[float, ...] = (),
) -> tuple[dict[str, Spectrum], Checkpoint | None, list[str]]:
    """Steps 2 to 4 alone, for a result that serves more sizes than `keep`; `clock` collects their seconds.

    Rounds of step 4 measure at each size of `again_at` (none: at `keep`) and take the mean of all. The checkpoint that
    comes back keeps the spectra before it saves anything else; the last are warnings.
    """
    run = _Run(
        dense, method, walk, keep, seed, progress, clock, gradient_windows, checkpoint, one_size=False,
        again_at=again_at,
    )  # fmt: skip
    spectra, _, keeper = run.closed_form_or_saved(calibration, learned=False)
    return spectra, keeper, run.warnings


@dataclass
class _Run:
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
    warnings: list[str] = field(default_factory=list)
    means: dict[str, Tensor] = field(default_factory=dict)
    """Of the inputs of every layer, where biases make up for them."""

    def __post_init__(self) -> None:
        self.batch = Batch(CPU_BATCH if device_of(self.dense).type == "cpu" else GPU_BATCH)
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
    def changes(self) -> bool:
        """True when layers that stay dense are not what they were."""
        scored = isinstance(self.method, LearnedMethod) and self.method.newton_steps > 0
        return self.propagates or (self.one_size and self.keep < 1 and scored)

    def closed_form_or_saved(
        self, ids: Tensor, *, learned: bool
    ) -> tuple[dict[str, Spectrum], Plan, Checkpoint | None]:
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
            spectra, plan, self.means, self.warnings = unpack_closed_form(saved, self.dense, self.walk, run)
            checkpoint.forget(*LEADS_TO_IT)

        def pack() -> Saved:
            return pack_closed_form(
                spectra, plan, run, learned=learned, changed=learned or self.changes, every=not self.one_size,
                warnings=self.warnings, means=self.means,
            )  # fmt: skip

        keeper = SavedFirst(checkpoint, CLOSED_FORM, pack, kept=saved is not None, replaces=LEADS_TO_IT)
        if saved is None and checkpoint.worth(sum(size_of(spectrum._asdict()) for spectrum in spectra.values())):
            keeper.keep()
        return spectra, plan, keeper

    def closed_form(self, ids: Tensor) -> tuple[dict[str, Spectrum], Plan]:
        """Steps 2 to 5: spectra in the final metric, and the ranks under the budget."""
        first = stats = self.statistics(self.dense, ids, 0)
        self.warnings += dead_inputs(first)
        spectra, plan = self.decide(stats, 0)
        for again in range(1, 1 + (self.by_layer.rounds if self.keep < 1 else 0)):
            second = self.measured_again(spectra, plan, ids, again)
            stats = {name: first[name].blend(second[name]) for name in first}
            spectra, plan = self.decide(stats, again)
        if self.one_size and self.keep < 1 and self.by_layer.allocation in SEARCHED:
            with timed(self.clock, "search"):
                asked = (self.by_layer, self.dense, self.walk, spectra, self.means, self.keep, ids)
                plan = searched_plan(*asked, seed=self.seed, progress=self.progress)
        if self.propagates:
            self.propagate(spectra, plan, stats, ids)
        if self.one_size and self.keep < 1:
            with timed(self.clock, "solve"):
                solve_at_ranks(self.by_layer, self.walk, spectra, plan, stats)
        with timed(self.clock, "decompose"):
            cut = self.one_size and not self.changes and not (self.method.windows_trained and self.keep < 1)
            hand_round(self.dense, self.walk, spectra, self.means, stats, plan if cut else None)
        if self.one_size and self.keep < 1 and isinstance(self.method, LearnedMethod) and self.method.newton_steps:
            with timed(self.clock, "newton"):
                given = (self.method, self.dense, self.walk, spectra, plan, self.round_windows(ids))
                told = {"steps": self.method.newton_steps, "progress": self.progress, "checkpoint": self.unfinished}
                self.batch.run("newton", lambda size: newton_scores(*given, batch_size=size, **told))
        return spectra, plan

    def measured_again(self, spectra: Mapping[str, Spectrum], plan: Plan, ids: Tensor, again: int) -> dict[str, Stats]:
        """Statistics of the compressed model; of all sizes it is to serve, their mean."""
        after = "" if self.unfinished is None else energies_of(spectra)
        mean: dict[str, Stats] = {}
        for position, size in enumerate(self.again_at or (self.keep,)):
            energies = {} if size == self.keep else energies_of_all(self.dense, self.walk, spectra)
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
    ) -> dict[str, Stats]:
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

    def propagate(self, spectra: dict[str, Spectrum], plan: Plan, stats: Mapping[str, Stats], ids: Tensor) -> None:
        """Step 5, in place. Only forward passes; on a CPU the windows of a later round are enough of them."""
        windows = self.round_windows(ids) if device_of(self.dense).type == "cpu" else ids
        given = (self.by_layer, self.dense, self.walk, spectra, plan, stats, windows)
        with timed(self.clock, "propagate"):
            after = None if self.unfinished is None else energies_of(spectra)
            told = {"progress": self.progress, "checkpoint": self.unfinished, "after": after}
            self.warnings += self.batch.run("propagate", lambda size: propagate(*given, batch_size=size, **told))

    def decide(self, stats: Mapping[str, Stats], again: int) -> tuple[dict[str, Spectrum], Plan]:
        if self.method.centres:
            self.means = {name: own.get(Stat.MEAN) for name, own in stats.items()}
        with timed(self.clock, "decompose"):
            spectra = decompose_all(
                self.by_layer, self.dense, self.walk, stats, checkpoint=self.unfinished, stage=f"spectra {again}"
            )
        if isinstance(self.method, OrderedMethod) and self.method.allocation == "order":
            with timed(self.clock, "allocate"):
                return spectra, ordered_plan(self.method, self.dense, self.walk, spectra, stats, self.keep)
        with timed(self.clock, "allocate"):
            energies = energies_of_all(self.dense, self.walk, spectra)
            return spectra, plan_ranks(self.by_layer, self.walk, energies, self.keep)
