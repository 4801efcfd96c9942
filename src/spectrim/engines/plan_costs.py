"""What the stages of a run are made of, in seconds of this machine: passes, products, eigenvalues, memory moved.

Passes through the model are clocked (passes.py) where that is possible; else they are counted, like everything else, by
operations over the rates of machine.py. `EFFICIENCY` and what follows it say how the counts become seconds; they were
fitted to runs of a small model on a CPU (benchmarks/plan_accuracy.py names the rows).
"""

from dataclasses import dataclass, field

from spectrim.engines.passes import Passes
from spectrim.machine import Rates
from spectrim.method import Method
from spectrim.models.walk import Walk
from spectrim.options import Step
from spectrim.stats import GRADIENT_STATS, Stat

EFFICIENCY = 0.6
"""Share of the clocked rate that products of a model's many shapes reach."""
MOVED = 24
"""Bytes that go through memory for every number that a layer reads or writes in a forward pass: casts, norms,
activations, the residual stream."""
BACKWARD = 2.0
"""What moves there and back, beside a forward pass alone."""
SOFTMAXES = {"sampled": 8.0, "compared": 8.0, "judged": 5.0}
"""Passes over the vocabulary: to sample labels and go back from them, to compare two distributions with and without a
way back, in units of log_softmax."""
SINGULAR, ROOT, TRIANGLE = 1.4, 0.8, 0.15
"""Singular components, roots of covariances, and triangular ones where the metric has two sides, in units of the
eigenvalues of as many cubed rows."""
MOST_OF_A_PASS = 0.7
"""Of a clocked pass, that products may be: the rest is the same in a compressed model."""


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
    training_windows: int = 0
    builtin_text: bool = False
    batch: int = 4  # windows of calibration at a time
    steps: tuple[Step, ...] = ()
    factor_bits: int | None = None
    any_size: bool = False
    anchors: tuple[float, ...] = ()
    any_size_steps: int = 0
    middles: int = 2
    by_blocks: bool = False  # statistics are measured there and back through single blocks (measure_blocks.py)
    samples: bool = True  # both models go on with a few prompts when they are judged
    recomputed: bool = False  # steps pass each block once more on the way back (recompute.py)

    world: int = 1  # processes; windows are then those of each
    sharded: bool = False  # each holds a part of what is frozen while scores are learned
    text_windows: int = 0  # that are cut of the text, where only some of them are worked on
    shards: int = 0  # tasks of a job array that share out the first measurement
    task: bool = False  # whether this is one of them

    @property
    def weights(self) -> int:
        return sum(layer.weight_numbers for layer in self.walk.layers)

    @property
    def blocks(self) -> int:
        return len(self.walk.block_names)


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
    """Works of what runs are made of, for one model on one machine."""

    sizes: Sizes
    rates: Rates
    passes: Passes | None = None
    stages: dict[str, Work] = field(default_factory=dict)

    def add(self, stage: str, work: Work, times: float = 1.0) -> None:
        """So often."""
        self.stages[stage] = self.stages.get(stage, Work()) + times * work

    def blocks(self, windows: float, *, share: float = 1.0, back: bool = False, trained: bool = False) -> Work:
        """Windows through all blocks, `share` of their linear numbers left; `back`: and back to their inputs.

        `trained` weights take products for their own gradients beside those of the activations.
        """
        own, tokens = self.sizes, windows * self.sizes.length
        products = 2.0 * own.weights * (1 + back * (2 if trained else 1))
        if self.passes is not None:
            clocked = self.passes.block
            if back:
                clocked = self.passes.block_trained if trained else self.passes.block_back
            clocked *= own.blocks
            in_products = min(MOST_OF_A_PASS * clocked, products / self.rates.products / EFFICIENCY)
            return Work(seconds=tokens * (clocked - (1 - share) * in_products))
        attention = 4.0 * own.blocks * own.length * own.hidden
        numbers = sum(la.outputs + la.inputs for la in own.walk.layers) + own.blocks * own.length * 2
        return Work(
            low=tokens * (products * share + attention * (1 + back)),
            moved=tokens * numbers * MOVED * (1 + BACKWARD * back),
        )

    def head(self, windows: float, *, back: bool = False) -> Work:
        """Embeddings and logits of windows."""
        tokens = windows * self.sizes.length
        if self.passes is not None:
            return Work(seconds=tokens * (self.passes.head_back if back else self.passes.head))
        return Work(low=2.0 * tokens * self.sizes.hidden * self.sizes.vocabulary * (1 + back))

    def forward(self, windows: float, *, share: float = 1.0, back: bool = False, trained: bool = False) -> Work:
        """Windows through the whole model, as `blocks`."""
        return self.blocks(windows, share=share, back=back, trained=trained) + self.head(windows, back=back)

    def loss(self, windows: float, kind: str) -> Work:
        """Over the vocabulary at every position, of a kind in `SOFTMAXES`."""
        tokens = windows * self.sizes.length
        if self.passes is not None:
            return Work(seconds=tokens * getattr(self.passes, kind))
        return Work(entries=tokens * self.sizes.vocabulary * SOFTMAXES[kind])

    def sums(self, needs: frozenset[Stat], windows: float, gradient_windows: float) -> Work:
        """Second moments; inputs that layers share (q, k, v; gate, up) are summed once, which is about half of them."""
        own, found = self.sizes, Work()
        tokens, steep = windows * own.length, gradient_windows * own.length
        if Stat.GRAM in needs:
            found += Work(full=2.0 * grams(own.walk) * tokens)
        if Stat.OUTPUT_GRAD in needs:
            found += Work(full=2.0 * sum(float(la.outputs) ** 2 for la in own.walk.layers) * steep)
        if needs & {Stat.FISHER, Stat.SLOPE}:
            found += Work(full=2.0 * own.weights * steep)
        return found

    def statistics(self, needs: frozenset[Stat], windows: float, gradient_windows: float, share: float = 1.0) -> Work:
        """One pass of engines/measure.py."""
        if not needs:
            return Work()
        steep = gradient_windows if needs & GRADIENT_STATS else 0
        again = self.blocks(2 * steep, share=share) if self.sizes.by_blocks else Work()
        return (
            again
            + self.forward(windows - steep, share=share)
            + self.forward(steep, share=share, back=True)
            + self.loss(steep, "sampled")
            + self.sums(needs, windows, steep)
        )

    def decomposition(self, method: Method) -> Work:
        """Roots of the metric and the singular components of every weight."""
        cubes, two_sided = 0.0, Stat.OUTPUT_GRAD in method.needs
        for layer in self.sizes.walk.layers:
            cubes += SINGULAR * min(layer.outputs, layer.inputs) ** 2 * max(layer.outputs, layer.inputs)
            if two_sided:
                cubes += TRIANGLE * (layer.inputs**3 + layer.outputs**3)
            elif Stat.GRAM in method.needs:
                cubes += ROOT * layer.inputs**3
        return Work(cubes=cubes)

    def step(self, batch: float, *, share: float = 1.0, teacher: bool = True, forming: float = 0.0) -> Work:
        """Of training: the student there and back to what forms its weights, the teacher there.

        `forming` are the operations that make the weights of one forward pass; going back takes as many again.
        """
        return (
            self.forward(batch, share=share, back=True, trained=True)
            + (1.0 if teacher else 0.0) * self.forward(batch)
            + (1.0 if self.sizes.recomputed else 0.0) * self.blocks(batch, share=share)
            + self.loss(batch, "compared")
            # Components of models whose steps pass blocks again are held in 16 bits (learned.py).
            + (Work(low=3.0 * forming) if self.sizes.recomputed else Work(full=2.0 * forming))
        )

    def pairs_of_inputs(self, windows: float) -> Work:
        """What propagation and refitting pass: two models to the input of each group of layers, and on; their sums.

        Both run as a whole before, unless they go block by block. The layers of a group are in the middle of their
        block, on average.
        """
        own = self.sizes
        groups = sum(len(block) for block in distinct_inputs(own.walk)) / max(1, own.blocks)
        passes = self.blocks(windows * 2 * (1 + groups / 2))
        passes += Work() if own.by_blocks else self.forward(2 * windows)
        return passes + Work(full=4.0 * grams(own.walk) * windows * own.length)


def grams(walk: Walk) -> float:
    """Numbers of the Gram matrices of all inputs, shared ones once."""
    return sum(float(n) ** 2 for block in distinct_inputs(walk) for n in block)


def components(walk: Walk) -> float:
    """Operations that form all weights from all of their components."""
    return sum(2.0 * min(la.outputs, la.inputs) * la.outputs * la.inputs for la in walk.layers)


def coordinates(walk: Walk, keep: float) -> float:
    """Operations that bring all factors out of the coordinates of their metrics (nn/spectral.py)."""
    return sum(
        2.0 * keep * la.weight_numbers / (la.outputs + la.inputs) * (la.outputs**2 + la.inputs**2) for la in walk.layers
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
