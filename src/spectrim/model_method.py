"""The contract of a method that treats the model as a whole.

Where the form of the result is no ordered spectrum of each weight (narrower layers, a basis shared by several layers,
tensor networks, codes of few bits), a method makes the small model itself, under the budget that all methods have. What
it puts in the place of layers are plain ones or such of a codec of its own (nn/codecs.py); measuring, counting, saving,
loading and judging belong to the engines, as for every method.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from spectrim.method import Method, require_range
from spectrim.stats import Stats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from spectrim.engines.checkpoint import Checkpoint
    from spectrim.engines.measure import Progress
    from spectrim.models.walk import Layer, Walk


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a method is given. Tokens are ids (windows, length) on the CPU; the dense model is not to be changed."""

    dense: "PreTrainedModel"  # weights in float32
    walk: "Walk"
    keep: float
    budget: int
    """Numbers (or bytes, by the method's `budget_unit`) that all target layers may store together, biases, masks and
    indices included."""
    stats: Mapping[str, Stats]
    """By layer name: what `needs` names, measured on `calibration`; empty where it names nothing."""
    calibration: Tensor
    training: Tensor
    gradient_windows: int
    seed: int
    warnings: list[str]
    """What there is to say about the result; to be added to."""
    timed: Callable[[str], AbstractContextManager[None]]
    """`with job.timed("train"):` adds to the seconds of that stage in the report."""
    frontier: list[dict[str, float]] = field(default_factory=list)
    """What other budgets would lose, where the method can tell: `keep` and `predicted` loss; to be added to."""
    progress: "Progress | None" = None
    checkpoint: "Checkpoint | None" = None


class Piece(NamedTuple):
    """Something that a method does to every weight, for `plan` to clock (engines/plan_layers.py)."""

    stage: str
    """Of the report; `EACH_PASS`: what the layer does beside its product whenever it runs."""
    work: Callable[[], object]
    numbers: int = 0
    """It is done to so many numbers of the weight, and takes as long for all others; 0: it is done to the whole weight,
    and grows with the cube of its sides."""
    share: float = 1.0
    """Of the layers that it is done to."""


EACH_PASS = "each pass"


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method):
    """A method that makes the whole compressed model."""

    codecs: ClassVar[tuple[str, ...]]
    """Those of nn/codecs.py that its layers may have; empty where it leaves plain layers, narrower ones."""
    trains_factors: ClassVar[bool] = False
    """True when its layers are low-rank ones, which recovery steps can train."""

    drifts: ClassVar[bool] = False
    """True when it goes through the model in order with what the dense and the compressed one feed to each layer."""

    @property
    def reads_dense_stats(self) -> bool:
        """Whether `Job.stats` are wanted; False where it measures by itself what it needs."""
        return bool(self.needs)

    def check_model(self, config: "PretrainedConfig", walk: "Walk", keep: float) -> None:
        """Refuse, before any weight is loaded, what cannot be done: UsageError that names the architecture or size."""

    def least(self, walk: "Walk") -> int | None:
        """The smallest that the layers may store together, in the unit of the budget; None where it is not known."""
        return None

    def stored(self, walk: "Walk", budget: int) -> int:
        """What the layers will store together, in the unit of the budget, as far as shapes tell: all of it."""
        return budget

    def rehearsal(self, layer: "Layer", weight: Tensor, stats: Stats, keep: float) -> Sequence[Piece]:
        """Its own work on one layer, on a `weight` (O, I), float64, and statistics that `plan` made up; none where it
        has not said what that is.
        """
        return ()

    @abstractmethod
    def compress(self, job: Job) -> "PreTrainedModel":
        """A compressed model of its own that may share unchanged parameters with the dense one; deterministic.

        The engine checks the budget, the numbers and that all weights are finite.
        """


@dataclass(frozen=True, kw_only=True)
class TrainedModelMethod(ModelMethod):
    """One that can train what it has put in place, in its own storage, on the training windows."""

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        require_range(self.info.name, "steps", self.steps, 0, 1_000_000)
        require_range(self.info.name, "batch_size", self.batch_size, 1, 65_536)
        require_range(self.info.name, "learning_rate", self.learning_rate, 1e-9, 10.0)

    @property
    def windows_trained(self) -> int:
        return self.steps * self.batch_size
