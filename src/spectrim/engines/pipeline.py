"""One compression in memory, from a dense model to a compressed one; the dense model is not changed.

1. find the target layers; refuse weights that are not finite
   (2 to 5 are engines/run.py; of models too large to hold statistics of all layers, engines/large.py)
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

from collections.abc import Collection, MutableMapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.clock import timed
from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.large import LargeRun
from spectrim.engines.layerwise import apply_plan, check_weights, refuse_large_sides
from spectrim.engines.learned import skeleton, train_scores
from spectrim.engines.masked import train_masks
from spectrim.engines.measure import Progress
from spectrim.engines.outcome import FactorQuantization, Made, Outcome
from spectrim.engines.quantise_factors import check_asked, quantise_behind
from spectrim.engines.recovery import recover
from spectrim.engines.run import Run
from spectrim.engines.sharded import is_sharded
from spectrim.engines.shelf import energies_in
from spectrim.engines.spread import energies_of_all
from spectrim.engines.unspread import refuse_unspread
from spectrim.engines.way import way_of
from spectrim.engines.whole import make_whole, refuse_skipped
from spectrim.linalg.factor import Spectrum
from spectrim.method import LayerMethod, LearnedMethod, MaskedMethod, Method
from spectrim.model_method import ModelMethod
from spectrim.models.walk import Walk, device_of, find_layers
from spectrim.options import FACTOR_GROUP_SIZE, Nonfinite, check_keep, recovery_of
from spectrim.processes import Share, present


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
    insists: Collection[str] = (),
    shard_weights: bool | None = None,
) -> Outcome:
    """Compress `dense` (weights in float32) to `keep` of the stored numbers of its decoder linears.

    `calibration` (windows, length) feeds the statistics, `training` the learned steps (None: the same windows).
    `gradient_windows` says how many of the calibration windows give gradients, see `default_gradient_windows`.
    `recovery` names further steps, see engines/recovery.py. `nonfinite="skip"` copies layers with NaN or Inf unchanged.
    `factor_bits` (8, 4 or 3) are those that low-rank and dense layers are quantised to at the end; `keep` is the share
    of their numbers all the same.
    With a `checkpoint`, every stage is saved there where that is cheap, and what it holds is taken from it: sums,
    spectra, scores, trained factors.
    `insists` names the options that were asked for: where memory is too small for one, the model is refused; for the
    method's own choice of `coupling` it is done without, which the warnings say and the outcome's method shows.
    `shard_weights`: whether several processes share out what is frozen while scores are learned (None: where one GPU
    should not hold all of it, sharded.py).
    """
    check_keep(keep)
    steps = recovery_of(method, recovery)
    found = find_layers(dense)
    check_asked(method, found, factor_bits, factor_group_size)
    walk, warnings = check_weights(dense, found, nonfinite)
    refuse_skipped(method, walk, found)
    refuse_large_sides(method, walk)
    way = way_of(device_of(dense), walk, method, insists)
    present().refuse_unequal("way to measure", "at once" if way.whole else "block by block", "use GPUs of one size")
    method = way.method
    clock: dict[str, float] = {}
    if gradient_windows is None:
        gradient_windows = default_gradient_windows(len(calibration), device_of(dense), calibration.shape[1])
    refuse_unspread(method, steps, factor_bits, len(calibration), gradient_windows)
    run = (Run if way.whole else LargeRun)(
        dense, method, walk, keep, seed, progress, clock, gradient_windows, checkpoint, length=calibration.shape[1],
        sharded=is_sharded(dense, walk, method, shard_weights) if keep < 1 else False,
    )  # fmt: skip
    training = calibration if training is None else training
    make = as_a_whole if isinstance(method, ModelMethod) else by_layers
    made = make(run, calibration, training)
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
        energies=run.energies,
        frontier=run.frontier,
        seconds=clock,
        gradient_windows=gradient_windows,
        warnings=[*warnings, *way.warnings, *run.warnings, *(made.learned.warnings if made.learned else ())],
    )


def measure_share(
    dense: PreTrainedModel,
    method: Method,
    calibration: Tensor,
    share: Share,
    *,
    gradient_windows: int | None = None,
    nonfinite: Nonfinite = "refuse",
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Saved:
    """What `compress_model` measures first, over a share of the windows, as a state that can be added up.

    With a `checkpoint` it is saved there while it is unfinished.
    """
    walk, _ = check_weights(dense, find_layers(dense), nonfinite)
    if gradient_windows is None:
        gradient_windows = default_gradient_windows(len(calibration), device_of(dense), calibration.shape[1])
    run = Run(
        dense, method, walk, 1.0, seed, progress, {}, gradient_windows, checkpoint, length=calibration.shape[1]
    )  # fmt: skip
    return run.share_of_first(calibration, share)


def by_layers(run: Run, calibration: Tensor, training: Tensor) -> Made:
    """Steps 2 to 7 for a method that treats one weight at a time."""
    method, clock = run.by_layer, run.clock
    learns = method.windows_trained > 0 and run.keep < 1
    spectra, plan, checkpoint = run.closed_form_or_saved(calibration, learned=learns)
    run.energies = energies_of_all(run.dense, run.walk, energies_in(spectra))
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
            learned = train_scores(method, *given, plan=plan, sharded=run.sharded, **common)
    placed = apply_plan(student, run.walk, learned.plan, learned.factors, learned=True)
    return Made(student, learned.plan, placed, learned, checkpoint)


def as_a_whole(run: Run, calibration: Tensor, training: Tensor) -> Made:
    """Step 2, and then what the method makes of the model."""
    method = run.method
    assert isinstance(method, ModelMethod)
    stats = run.statistics(run.dense, calibration, 0) if method.reads_dense_stats else {}
    with timed(run.clock, "compress"):
        student, plan, placed = make_whole(
            method, run.dense, run.walk, run.keep, stats, calibration, training, gradient_windows=run.gradient_windows,
            seed=run.seed, warnings=run.warnings, frontier=run.frontier, timed=partial(timed, run.clock),
            progress=run.progress, checkpoint=run.checkpoint,
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
) -> tuple[MutableMapping[str, Spectrum], Checkpoint | None, list[str]]:
    """Steps 2 to 4 alone, for a result that serves more sizes than `keep`; `clock` collects their seconds.

    Rounds of step 4 measure at each size of `again_at` (none: at `keep`) and take the mean of all. The checkpoint that
    comes back keeps the spectra before it saves anything else; the last are warnings.
    """
    run = (Run if way_of(device_of(dense), walk, method).whole else LargeRun)(
        dense, method, walk, keep, seed, progress, clock, gradient_windows, checkpoint, one_size=False,
        again_at=again_at, length=calibration.shape[1],
    )  # fmt: skip
    spectra, _, keeper = run.closed_form_or_saved(calibration, learned=False)
    return spectra, keeper, run.warnings
