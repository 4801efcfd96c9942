"""Seconds of a run, stage by stage: what is to be computed (plan_costs.py), in the seconds of this machine.

How often a stage passes, steps or measures is taken from where the run takes it: options of the method, recovery steps,
and the constants of the engines.

Methods that treat the model as a whole solve for their form in ways of their own: what they do to a layer is clocked
(plan_layers.py). `known` is False for those that have not said what that is; their seconds are left out, not guessed.
"""

from spectrim.data.windows import CALIBRATION_EXCESS
from spectrim.engines.block import MOST_WINDOWS
from spectrim.engines.distil import METRIC_WINDOWS
from spectrim.engines.newton import HELD_OUT, LENGTHS
from spectrim.engines.passes import Passes
from spectrim.engines.plan_costs import ROOT, Costs, Sizes, Work, components, coordinates, grams
from spectrim.engines.plan_layers import LayerSeconds
from spectrim.engines.search import SENSITIVITY_LEVELS, SENSITIVITY_WINDOWS, STAGES
from spectrim.evaluate.language import WINDOWS
from spectrim.evaluate.samples import NEW_TOKENS
from spectrim.linalg.curvature import coupling_operations
from spectrim.machine import Rates
from spectrim.method import LayerMethod, LearnedMethod, MaskedMethod, Method, TrainedMethod
from spectrim.model_method import ModelMethod, TrainedModelMethod
from spectrim.options import RECOVERY_BATCH, Step
from spectrim.stats import Stat

TEXT_S, TOKENS_A_SECOND = 1.8, 3.7e5
"""Reading `builtin:stdlib` and a tokenizer, and tokenising, on one thread of a CPU."""
BUILTIN_TOKENS = 430_000
"""That `builtin:stdlib` has for calibration."""
ENCODE = 1.0
"""Putting a weight in its codec, in units of the eigenvalues of as many cubed rows."""
CALL_S = {"cpu": 1e-3, "cuda": 5e-4}
"""Of a layer with two products where there was one, in passes of few tokens. Of a GPU: between what two runs took."""
STREAMED = 4
"""Windows at a time of passes in running order (engines/paired.py, engines/blockwise.py)."""


def seconds_by_stage(
    method: Method,
    sizes: Sizes,
    rates: Rates,
    passes: Passes | None = None,
    layers: LayerSeconds | None = None,
    *,
    start: float = 5.0,
) -> tuple[dict[str, float], bool]:
    """Seconds of every stage, and whether those of the method itself are known.

    `start` is what a process takes until it can work; the written folder is read again in a fresh one, which starts
    once more. `layers` is the own work of a method that treats the model as a whole.
    """
    costs = Costs(sizes, rates, passes)
    costs.add("start", Work(seconds=start))
    cut = max(sizes.windows, sizes.text_windows, sizes.training_windows)
    looked_at = CALIBRATION_EXCESS * cut * sizes.length
    read = min(looked_at, BUILTIN_TOKENS) if sizes.builtin_text else looked_at
    costs.add("text", Work(seconds=TEXT_S + read / TOKENS_A_SECOND))
    costs.add("load", Work(moved=6.0 * sizes.bytes_read))
    if sizes.task:
        costs.add("calibrate", costs.statistics(method.needs, sizes.windows, sizes.gradient_windows))
        return {stage: work.on(rates) for stage, work in costs.stages.items()}, True
    known = True
    if isinstance(method, LayerMethod):
        _by_layers(costs, method)
    else:
        assert isinstance(method, ModelMethod)
        known = _as_a_whole(costs, method, layers)
    for step in sizes.steps:
        _recovery(costs, step)
    if sizes.factor_bits is not None:
        tokens = sizes.windows * sizes.length
        costs.add("quantise", costs.forward(2 * sizes.windows, share=sizes.keep))
        costs.add("quantise", Work(full=2.0 * grams(sizes.walk) * tokens))
        known = known and layers is not None
        if layers is not None:
            costs.add("quantise", Work(seconds=layers.once["quantise"]))
            costs.add("quantise", Work(seconds=layers.each_pass), sizes.windows / STREAMED)
    _judging(costs, 0.0 if layers is None else layers.each_pass)
    costs.add("write", Work(moved=8.0 * sizes.bytes_written))
    costs.add("reload", Work(seconds=start) + Work(moved=6.0 * sizes.bytes_written))
    return {stage: work.on(rates) for stage, work in costs.stages.items()}, known


def _judging(costs: Costs, each_pass: float) -> None:
    """The dense model, then both; of all sizes, each anchor beside the dense one. Then what both say.

    `each_pass` are seconds that the compressed model takes beside its products, to unpack its weights.
    """
    own = costs.sizes
    if not own.eval_windows:
        return
    pairs = len(own.anchors) if own.any_size else 1
    costs.add("evaluate", costs.forward((2 * pairs + 1) * own.eval_windows))
    costs.add("evaluate", costs.loss(own.eval_windows, "judged"), pairs)
    costs.add("evaluate", Work(seconds=each_pass), -(-own.eval_windows // WINDOWS))
    if own.samples and costs.passes is not None:
        layers = len(own.walk.layers) * CALL_S["cpu" if costs.rates.device.startswith("cpu") else "cuda"]
        once = own.blocks * costs.passes.short + costs.passes.short_head
        costs.add("samples", Work(seconds=NEW_TOKENS * (2 * once + layers + each_pass)))


def _by_layers(costs: Costs, method: LayerMethod) -> None:
    """Steps 2 to 7 of engines/pipeline.py."""
    own = costs.sizes
    rounds = method.rounds if own.keep < 1 else 0
    again = rounds * (own.middles if own.any_size else 1)
    if not own.shards:
        costs.add("calibrate", costs.statistics(method.needs, own.windows, own.gradient_windows))
    costs.add("calibrate", costs.statistics(method.needs, own.gradient_windows, own.gradient_windows), again)
    costs.add("decompose", costs.decomposition(method), (1 + rounds) / own.world)
    if method.refinement is not None:
        coupled = sum(coupling_operations(la.outputs, la.inputs, own.length) for la in own.walk.layers)
        one = (
            costs.forward(own.gradient_windows, back=True)
            + costs.loss(own.gradient_windows, "sampled")
            + Work(full=coupled * own.gradient_windows)
        )
        costs.add("couple", one, 1 + again)
    if not own.any_size and own.keep < 1:
        _for_one_size(costs, method)
    cubes = sum(min(la.outputs, la.inputs) ** 2 * max(la.outputs, la.inputs) for la in own.walk.layers)
    costs.add("encode", Work(cubes=ENCODE * cubes / own.world))
    if isinstance(method, TrainedMethod) and method.steps and own.keep < 1:
        steps = own.any_size_steps if own.any_size else method.steps
        costs.add("learn", step_of(costs, method), steps)


def step_of(costs: Costs, method: TrainedMethod) -> Work:
    """One step on scores or masks: every weight is formed from all components, and has a gradient."""
    teacher = not isinstance(method, MaskedMethod) or method.compares_with_dense
    return costs.step(method.batch_size / costs.sizes.world, teacher=teacher, forming=components(costs.sizes.walk))


def _for_one_size(costs: Costs, method: LayerMethod) -> None:
    """What fits one size only: propagation, searched ranks, Newton steps."""
    own = costs.sizes
    if method.error_share > 0:
        costs.add("propagate", costs.pairs_of_inputs(own.gradient_windows))
        costs.add("propagate", costs.decomposition(method), 1 / own.world)
    if isinstance(method, LearnedMethod) and method.newton_steps:
        held = max(1, own.gradient_windows // HELD_OUT)
        given = max(1, own.gradient_windows - held)
        batches = -(-given // own.batch)
        gradient = costs.step(given) + Work(full=2.0 * (batches - 1) * components(own.walk))
        looked = 1 + len(LENGTHS)  # at most: it stops where the loss rises
        judged = costs.forward(2 * held) + costs.loss(held, "judged") + Work(full=components(own.walk))
        costs.add("newton", gradient + looked * judged, method.newton_steps)
    searched = searched_windows(method, len(own.walk.layers))
    if searched:
        costs.add("search", costs.forward(searched) + costs.loss(searched, "judged"))


def _as_a_whole(costs: Costs, method: ModelMethod, layers: LayerSeconds | None) -> bool:
    """Methods that have said what they do to a layer; False for others, whose own work is not known."""
    own = costs.sizes
    if isinstance(method, TrainedModelMethod) and method.steps:
        costs.add("learn", costs.step(method.batch_size, share=own.keep), method.steps)
    if layers is None:
        return False
    if method.reads_dense_stats and not own.shards:
        costs.add("calibrate", costs.statistics(method.needs, own.windows, own.gradient_windows))
    for stage, seconds in layers.once.items():
        costs.add(stage, Work(seconds=seconds))
    if method.drifts:
        costs.add("compress", costs.pairs_of_inputs(own.windows))
    elif method.needs and not method.reads_dense_stats:
        costs.add("compress", costs.forward(2 * own.windows) + costs.sums(method.needs, own.windows, 0))
    if method.drifts or not method.reads_dense_stats:
        costs.add("compress", Work(seconds=layers.each_pass), 2 * own.windows / STREAMED)
    return True


def _recovery(costs: Costs, step: Step) -> None:
    """One recovery step (engines/recovery.py)."""
    own, batch = costs.sizes, RECOVERY_BATCH
    if step.steps is None:
        roots = sum(float(n) ** 3 for layer in own.walk.layers for n in (layer.inputs,))
        costs.add(step.name, costs.pairs_of_inputs(own.windows) + Work(cubes=ROOT * roots))
        return
    windows = min(own.training_windows, batch * step.steps) or own.windows
    if step.name == "kl":
        forming = coordinates(own.walk, own.keep)
        costs.add("distil", costs.step(batch, share=own.keep, forming=forming), step.steps)
        metric = min(METRIC_WINDOWS, windows)
        needs = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
        costs.add("distil", costs.statistics(needs, metric, metric, share=own.keep))
        sides = sum(float(n) ** 3 for layer in own.walk.layers for n in (layer.outputs, layer.inputs))
        costs.add("distil", Work(cubes=ROOT * sides))
        return
    one = costs.blocks(batch, share=own.keep, back=True, trained=True)
    costs.add("block", one, step.steps)  # each block alone, in turn
    # Both models once as a whole, what the dense blocks give, and the compressed model after each block.
    kept = min(MOST_WINDOWS, windows)
    costs.add("block", costs.forward(2 * kept) + costs.blocks(2 * kept))


def searched_windows(method: LayerMethod, layers: int) -> int:
    """Windows that an allocation that searches runs the compressed model on."""
    if method.allocation == "sensitivity":
        return layers * SENSITIVITY_LEVELS * SENSITIVITY_WINDOWS
    if method.allocation == "evopress":
        judged = [method.offspring, *(survivors + 1 for survivors, _ in STAGES[:-1])]
        return method.generations * sum(n * windows for n, (_, windows) in zip(judged, STAGES, strict=True))
    return 0
