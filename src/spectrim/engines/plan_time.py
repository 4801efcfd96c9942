"""Seconds of a run, stage by stage: what is to be computed, over what this machine does in a second (machine.py).

Products count by their operations, in the precision they run in; what only moves numbers, by its bytes; softmax over
the vocabulary and eigenvalues by rates of their own. The constants say how often a stage goes through its data, and
were set by runs of a small model on a CPU (benchmarks/plan_accuracy.py); `START_S` is what importing torch takes.

Methods that treat the model as a whole solve for their form in ways of their own: `known` is then False for those that
no constants are given for, and their seconds are left out rather than guessed.
"""

from dataclasses import dataclass, field

from spectrim.engines.search import SENSITIVITY_LEVELS, SENSITIVITY_WINDOWS, STAGES
from spectrim.linalg.curvature import coupling_operations
from spectrim.machine import Rates
from spectrim.method import LayerMethod, LearnedMethod, MaskedMethod, Method, TrainedMethod
from spectrim.model_method import ModelMethod, TrainedModelMethod
from spectrim.models.walk import Walk
from spectrim.options import RECOVERY_BATCH, Step
from spectrim.stats import GRADIENT_STATS, Stat

START_S = 5.0
"""Of a process until it can work; the written folder is read again in a fresh one, which starts once more."""
TEXT_S = 2.0
"""Reading and tokenising the text of a run: as much as `builtin:stdlib` takes."""
EFFICIENCY = 0.6
"""Share of the clocked rate that products of a model's many shapes reach."""
MOVED = 24
"""Bytes that go through memory for every number that a layer reads or writes in a forward pass: casts, norms,
activations, the residual stream."""
BACKWARD = 2.0
"""What moves there and back, beside a forward pass alone."""
SAMPLED = 8.0
"""Passes over the vocabulary to sample labels and go back from them, in units of log_softmax."""
JUDGED = 5.0
"""The same to compare two distributions."""
SINGULAR, ROOT = 1.1, 0.4
"""Singular value decompositions and roots of covariances, in units of the eigenvalues of as many cubed rows."""
COLUMN_SWEEPS = {"gptq": 1.0, "rtn": 0.0, "eora": 1.0}
"""Methods of few bits whose time is known: sweeps over the columns of each weight."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What time depends on, of a model and a request."""

    walk: Walk
    hidden: int
    vocabulary: int
    keep: float
    windows: int
    gradient_windows: int
    length: int
    eval_windows: int
    bytes_read: int
    bytes_written: int
    steps: tuple[Step, ...] = ()
    factor_bits: int | None = None
    any_size: bool = False
    anchors: tuple[float, ...] = ()
    any_size_steps: int = 0
    middles: int = 2

    @property
    def weights(self) -> int:
        return sum(layer.weight_numbers for layer in self.walk.layers)


@dataclass
class Work:
    """What one stage computes."""

    low: float = 0.0  # operations of products in the precision of forward passes
    full: float = 0.0  # in float32
    moved: float = 0.0  # bytes
    entries: float = 0.0  # of softmax over the vocabulary
    cubes: float = 0.0  # of rows whose eigenvalues are found
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __rmul__(self, times: float) -> "Work":
        return Work(*(times * getattr(self, name) for name in self.__dataclass_fields__))

    def on(self, rates: Rates) -> float:
        """Seconds."""
        products = self.low / rates.products + self.full / rates.full_products
        others = self.moved / rates.copied + self.entries / rates.softmax + self.cubes * rates.eigen
        return products / EFFICIENCY + others + self.seconds


@dataclass
class Costs:
    """Works of what runs are made of, for one model."""

    sizes: Sizes
    stages: dict[str, Work] = field(default_factory=dict)

    def add(self, stage: str, work: Work, times: float = 1.0) -> None:
        """So often."""
        self.stages[stage] = self.stages.get(stage, Work()) + times * work

    def forward(self, windows: float, *, share: float = 1.0, back: float = 0.0, trained: bool = False) -> Work:
        """Windows through the model, `share` of its linear numbers left; `back`: so many times that through backwards.

        `trained` weights take products for their own gradients beside those of the activations.
        """
        own, tokens = self.sizes, windows * self.sizes.length
        linear = 2.0 * own.weights * share
        blocks = len(own.walk.block_names)
        attention = 4.0 * blocks * own.length * own.hidden
        head = 2.0 * own.hidden * own.vocabulary
        numbers = sum(la.outputs + la.inputs for la in own.walk.layers) + blocks * own.length * 2
        passes = 1 + back * (2.0 if trained else 1.0)
        return Work(
            low=tokens * (linear * passes + (attention + head) * (1 + back)),
            moved=tokens * numbers * MOVED * (1 + BACKWARD * back),
        )

    def softmax(self, windows: float, passes: float) -> Work:
        """Over the vocabulary at every position."""
        return Work(entries=windows * self.sizes.length * self.sizes.vocabulary * passes)

    def sums(self, method: Method, windows: float, gradient_windows: float) -> Work:
        """Second moments; inputs that layers share (q, k, v; gate, up) are summed once, which is about half of them."""
        own, found = self.sizes, Work()
        inputs = sum(float(n) ** 2 for block in distinct_inputs(own.walk) for n in block)
        tokens, steep = windows * own.length, gradient_windows * own.length
        if Stat.GRAM in method.needs:
            found += Work(full=2.0 * inputs * tokens)
        if Stat.OUTPUT_GRAD in method.needs:
            found += Work(full=2.0 * sum(float(la.outputs) ** 2 for la in own.walk.layers) * steep)
        if method.needs & {Stat.FISHER, Stat.SLOPE}:
            found += Work(full=2.0 * own.weights * steep)
        return found

    def statistics(self, method: Method, windows: float, gradient_windows: float, share: float = 1.0) -> Work:
        """One pass of engines/measure.py."""
        if not method.needs:
            return Work()
        steep = gradient_windows if method.needs & GRADIENT_STATS else 0
        return (
            self.forward(windows - steep, share=share)
            + self.forward(steep, share=share, back=1.0)
            + self.softmax(steep, SAMPLED)
            + self.sums(method, windows, steep)
        )

    def decomposition(self, method: Method) -> Work:
        """Roots of the metric and the singular components of every weight."""
        cubes = 0.0
        for layer in self.sizes.walk.layers:
            cubes += SINGULAR * min(layer.outputs, layer.inputs) ** 2 * max(layer.outputs, layer.inputs)
            cubes += ROOT * layer.inputs**3 if Stat.GRAM in method.needs else 0
            cubes += ROOT * layer.outputs**3 if Stat.OUTPUT_GRAD in method.needs else 0
        return Work(cubes=cubes)

    def training_step(self, batch: int, share: float, *, trained: bool, teacher: bool = True) -> Work:
        """The student there and back, the teacher there."""
        return (
            self.forward(batch, share=share, back=1.0, trained=trained)
            + (1.0 if teacher else 0.0) * self.forward(batch)
            + self.softmax(batch, SAMPLED)
        )


def distinct_inputs(walk: Walk) -> list[list[int]]:
    """Widths of inputs, block by block: layers of one width in a row read the same tensor, but for the last one."""
    blocks: dict[int, list[int]] = {}
    for layer in walk.layers:
        blocks.setdefault(layer.block, []).append(layer.inputs)
    return [_runs(widths) for widths in blocks.values()]


def _runs(widths: list[int]) -> list[int]:
    """Four layers of attention read two inputs, three of an MLP two; other counts are taken as they are."""
    common = max(set(widths), key=widths.count)
    same, others = widths.count(common), [w for w in widths if w != common]
    return [common] * (same if same < 4 else (same + 1) // 2) + others


def seconds_by_stage(method: Method, sizes: Sizes, rates: Rates) -> tuple[dict[str, float], bool]:
    """Seconds of every stage, and whether those of the method itself are known."""
    costs = Costs(sizes)
    costs.add("start", Work(seconds=START_S))
    costs.add("text", Work(seconds=TEXT_S))
    costs.add("load", Work(moved=6.0 * sizes.bytes_read))
    known = True
    if isinstance(method, LayerMethod):
        _by_layers(costs, method)
    else:
        known = _as_a_whole(costs, method)
    share = sizes.keep
    for step in sizes.steps:
        _recovery(costs, step, share)
    if sizes.factor_bits is not None:
        gram = sum(float(n) ** 2 for block in distinct_inputs(sizes.walk) for n in block)
        tokens = sizes.windows * sizes.length
        costs.add("quantise", costs.forward(2 * sizes.windows, share=share) + Work(full=2.0 * gram * tokens))
        costs.add("quantise", columns(sizes.walk, 2.0))
    judged = sizes.eval_windows * ((2 * len(sizes.anchors) + 1) if sizes.any_size else 3)
    costs.add("evaluate", costs.forward(judged) + costs.softmax(sizes.eval_windows, JUDGED * max(1, judged // 3)))
    costs.add("write", Work(moved=8.0 * sizes.bytes_written))
    costs.add("reload", Work(seconds=START_S) + Work(moved=6.0 * sizes.bytes_written))
    return {stage: work.on(rates) for stage, work in costs.stages.items()}, known


def columns(walk: Walk, sweeps: float) -> Work:
    """A sweep over the columns of every weight with error feedback, and the inverse it needs, all in float64."""
    products = sum(2.0 * la.outputs * float(la.inputs) ** 2 for la in walk.layers)
    moved = sum(20.0 * 8 * la.outputs * la.inputs for la in walk.layers)
    return sweeps * Work(full=2 * products, moved=moved, cubes=sum(float(la.inputs) ** 3 for la in walk.layers) / 3)


def _by_layers(costs: Costs, method: LayerMethod) -> None:
    """Steps 2 to 7 of engines/pipeline.py."""
    own = costs.sizes
    rounds = method.rounds if own.keep < 1 else 0
    sizes_measured = own.middles if own.any_size else 1
    share = min(own.keep, 1.0)
    costs.add("calibrate", costs.statistics(method, own.windows, own.gradient_windows))
    again = costs.statistics(method, own.gradient_windows, own.gradient_windows, share=1.0)
    costs.add("calibrate", again, rounds * sizes_measured)
    costs.add("decompose", costs.decomposition(method), 1 + rounds)
    if method.refinement is not None:
        coupled = sum(coupling_operations(la.outputs, la.inputs, own.length) for la in own.walk.layers)
        one = (
            costs.forward(own.gradient_windows, back=1.0)
            + costs.softmax(own.gradient_windows, SAMPLED)
            + Work(full=coupled * own.gradient_windows)
        )
        costs.add("couple", one, 1 + rounds * sizes_measured)
    if not own.any_size and own.keep < 1:
        _for_one_size(costs, method, share)
    if isinstance(method, TrainedMethod) and method.steps and own.keep < 1:
        steps = own.any_size_steps if own.any_size else method.steps
        wide = sum(min(la.outputs, la.inputs) * (la.outputs + la.inputs) for la in own.walk.layers) / own.weights
        teacher = not isinstance(method, MaskedMethod) or method.compares_with_dense
        costs.add("learn", costs.training_step(method.batch_size, wide, trained=False, teacher=teacher), steps)


def _for_one_size(costs: Costs, method: LayerMethod, share: float) -> None:
    """What fits one size only: propagation, searched ranks, Newton steps."""
    own = costs.sizes
    gram = sum(float(n) ** 2 for block in distinct_inputs(own.walk) for n in block)
    if method.error_share > 0:
        windows = own.gradient_windows
        costs.add("propagate", costs.forward(4 * windows) + Work(full=4.0 * gram * windows * own.length))
        costs.add("propagate", costs.decomposition(method))
    if isinstance(method, LearnedMethod) and method.newton_steps:
        step = costs.training_step(own.gradient_windows, 1.0, trained=False)
        costs.add("newton", step, method.newton_steps)
    searched = searched_windows(method, len(own.walk.layers))
    if searched:
        costs.add("search", costs.forward(searched, share=1.0) + costs.softmax(searched, JUDGED))


def _as_a_whole(costs: Costs, method: Method) -> bool:
    """Methods of few bits by columns; False for others, whose own work is not known."""
    own = costs.sizes
    assert isinstance(method, ModelMethod)
    if isinstance(method, TrainedModelMethod) and method.steps:
        costs.add("learn", costs.training_step(method.batch_size, own.keep, trained=True), method.steps)
    sweeps = COLUMN_SWEEPS.get(method.info.name)
    if sweeps is None:
        return False
    costs.add("compress", costs.statistics(method, 2 * own.windows, 0) + columns(own.walk, sweeps))
    return True


def _recovery(costs: Costs, step: Step, share: float) -> None:
    """One recovery step (engines/recovery.py)."""
    own = costs.sizes
    if step.steps is None:
        costs.add(step.name, costs.forward(2 * own.windows) + Work(full=4.0 * own.weights * own.windows * own.length))
        return
    batch = RECOVERY_BATCH
    if step.name == "kl":
        costs.add("distil", costs.training_step(batch, share, trained=True), step.steps)
        costs.add("distil", costs.forward(64, back=1.0) + costs.softmax(64, SAMPLED))
        return
    blocks = len(own.walk.block_names)
    one = costs.forward(batch, share=share, back=1.0, trained=True)
    costs.add("block", (1.0 / blocks) * one, step.steps * blocks)  # each block alone, in turn
    costs.add("block", costs.forward(2 * min(1024, step.steps * batch)))


def searched_windows(method: LayerMethod, layers: int) -> int:
    """Windows that an allocation that searches runs the compressed model on."""
    if method.allocation == "sensitivity":
        return layers * SENSITIVITY_LEVELS * SENSITIVITY_WINDOWS
    if method.allocation == "evopress":
        judged = [method.offspring, *(survivors + 1 for survivors, _ in STAGES[:-1])]
        return method.generations * sum(n * windows for n, (_, windows) in zip(judged, STAGES, strict=True))
    return 0
