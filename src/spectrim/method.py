"""The contract between a method and the engines.

A method object *is* its configuration: a frozen keyword-only dataclass that round-trips through JSON. The author of a
low-rank method states only what is its own:

    needs            which statistics of a layer calibration must measure
    decompose(...)   the weight as an ordered sum of rank-one components with the error of losing each

Ranks under a budget, storage, walking the model, hooks, memory, saving and evaluation belong to the engines.
`compress` is pure: the same weight, statistics and target give the same bytes; it never sees the model, the disk or
the clock.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from spectrim.errors import NumericalError, UsageError, did_you_mean
from spectrim.linalg.bits import Unit
from spectrim.linalg.factor import Factors, Spectrum, truncate
from spectrim.replacement import Replacement, Storage, Storages, Target, dense_replacement, encode, with_mean_kept
from spectrim.stats import Coupling, Stat, Stats

Allocation = Literal["uniform", "global", "sensitivity", "evopress", "order"]
"""How ranks are chosen: equal shares; the least sum of predicted errors; by what the whole model makes of them;
in an order of the method's own."""
SEARCHED = ("sensitivity", "evopress")


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What the registry table shows."""

    name: str
    family: str
    paper: str
    promise: str


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What the command line, the registry and the report know of every method; its fields are its options."""

    info: ClassVar[MethodInfo]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    recovery: ClassVar[tuple[str, ...]] = ()
    """Steps run after the layers are in place, as `--recover` takes them; see engines/recovery.py."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """Named sets of field values for `--preset`."""
    default_preset: ClassVar[str | None] = None
    budget_unit: ClassVar[Unit] = "numbers"
    """What `keep` is a share of: the numbers of the dense layers, or their bytes in 16 bits (linalg/bits.py)."""

    @property
    def windows_trained(self) -> int:
        """Windows that its own training goes through, each counted as often as it is used; 0: it does not train."""
        return 0

    @property
    def refinement(self) -> Coupling | None:
        """How a second gradient pass refines the covariances (engines/couple.py); None: they stay as measured."""
        return None

    @property
    def centres(self) -> bool:
        """Whether the bias makes up for the mean of what is lost: b' = b + (W - W') E[x]. Needs MEAN.

        A layer without a bias then gets one, which counts.
        """
        return False

    def to_config(self) -> dict[str, Any]:
        """JSON-ready: the method's name and all its fields."""
        return {"method": self.info.name, **dataclasses.asdict(self)}

    @classmethod
    def from_config(cls, options: Mapping[str, Any]) -> Self:
        """From field values; unknown names and values that do not fit are refused with what is allowed."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in options.items():
            if name not in fields:
                raise UsageError(f"method {cls.info.name}: unknown option {name!r}{did_you_mean(name, fields)}")
            _require_type(cls.info.name, name, value, fields[name].default)
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """A method that treats one weight at a time, given statistics of its inputs and outputs."""

    optimal_in_gram: ClassVar[bool] = False
    """True when `decompose` is optimal in the input-Gram metric (the contract tests then check it)."""

    allocations: ClassVar[tuple[str, ...]] = ("uniform", "global", *SEARCHED)
    """Those that the method can be used with."""

    storages: ClassVar[tuple[str, ...]] = ("factor", "pivot")
    """Those that the method can be used with. The others need `covariances`."""

    storage: Storages = "factor"
    allocation: Allocation = "uniform"
    rounds: int = 0
    """How often the statistics are measured again in the compressed model and averaged with the first ones."""
    generations: int = 40
    offspring: int = 16
    """Of allocation="evopress", see engines/search.py."""
    rank_multiple: int = 0
    """Ranks are multiples of it, as GPUs like them; 0: of 8 in layers of at least 512 x 512, any in smaller ones."""

    def __post_init__(self) -> None:
        require_choice(self.info.name, "storage", self.storage, self.storages)
        require_choice(self.info.name, "allocation", self.allocation, self.allocations)
        if self.shares and self.allocation not in ("uniform", "global"):
            raise UsageError(
                f"method {self.info.name}: storage={self.storage} takes allocation=uniform or global, got "
                f"{self.allocation}, which gives every layer a rank of its own"
            )
        require_range(self.info.name, "rounds", self.rounds, 0, 8)
        require_range(self.info.name, "generations", self.generations, 1, 100_000)
        require_range(self.info.name, "offspring", self.offspring, 1, 100_000)
        require_range(self.info.name, "rank_multiple", self.rank_multiple, 0, 1024)

    @property
    def shares(self) -> bool:
        """Whether layers that read one input may keep one factor of it between them (engines/sharing.py)."""
        return self.storage not in ("factor", "pivot")

    @property
    def alone(self) -> Storage:
        """The storage of a layer that shares with no other."""
        return "factor" if self.storage in ("factor", "shared") else "pivot"

    def covariances(self, stats: Stats) -> tuple[Tensor | None, Tensor]:
        """B (O, O), None for the identity, and A (I, I) of the metric of one layer: an error D costs tr(B D A D^T)."""
        raise AssertionError(f"{self.info.name} takes storage {', '.join(self.storages)}; it has no common metric")

    @property
    def error_share(self) -> float:
        """The share, in [0, 1], of the error of what runs before a layer that the layer makes up for; 0: none.

        See engines/propagate.py. `decompose` is then also given weights other than the model's, with the Gram matrix
        of the inputs in the compressed model in the place of GRAM.
        """
        return 0.0

    @abstractmethod
    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """All components of `weight` (O, I), float64, in this method's metric; strongest first."""

    def energies(self, weight: Tensor, stats: Stats) -> Tensor:
        """The energies (K,) that `decompose` would give; methods that know a shorter way override it."""
        return self.decompose(weight, stats).energy

    def at_rank(self, weight: Tensor, cut: Factors, stats: Stats) -> Factors:
        """The factors once the rank is known, for methods whose answers are not nested; most leave the `cut` as it is.

        `cut` holds the first components of `decompose`, which the ranks were planned with.
        """
        return cut

    @final
    def compress(self, weight: Tensor, stats: Stats, target: Target) -> Replacement:
        """`weight` (O, I) at the target's rank in the target's codec, in the dtype of `weight`."""
        if target.codec == "dense":
            return dense_replacement(weight)
        spectrum = self.decompose(weight.double(), stats)
        if not stats.is_finite() or not all(bool(torch.isfinite(part).all()) for part in spectrum):
            raise NumericalError(
                f"{self.info.name}: the weight or its statistics hold NaN or Inf; measure again on other text"
            )
        error = float(spectrum.energy[target.rank :].sum())
        factors = self.at_rank(weight.double(), truncate(spectrum, target.rank), stats)
        placed = encode(factors, target.codec, like=weight, error=error)
        return with_mean_kept(placed, weight, stats.get(Stat.MEAN)) if self.centres else placed


@dataclass(frozen=True, kw_only=True)
class OrderedMethod(LayerMethod):
    """A method with a rule of its own for the order in which components of all layers go, the last of a layer first."""

    allocations: ClassVar[tuple[str, ...]] = ("order", "uniform", "global", *SEARCHED)

    allocation: Allocation = "order"

    @abstractmethod
    def prices(self, weight: Tensor, spectrum: Spectrum, stats: Stats) -> Tensor:
        """What the rule looks at: one number (K,) for each component of a layer."""

    @abstractmethod
    def removal_order(self, prices: Sequence[Tensor]) -> list[int]:
        """Which layer (a position in `prices`) loses its last remaining component, one after the other, to the end."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """What a learned method may look at when it prices the components of one layer; all (K,)."""

    energy: Tensor  # second-order cost of losing the component at score 1
    scores: Tensor  # present score; of a pruned component: the one it starts from if it returns
    kept: Tensor  # bool
    gradient: Tensor  # running mean of dLoss/dscore, also for pruned components


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(LayerMethod):
    """A method that trains, end to end, on windows of text; with `steps=0` it is its closed form."""

    allocations: ClassVar[tuple[str, ...]] = ("uniform", "global")

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "steps", self.steps, 0, 1_000_000)
        require_range(self.info.name, "batch_size", self.batch_size, 1, 65_536)
        require_range(self.info.name, "learning_rate", self.learning_rate, 1e-9, 10.0)

    @property
    def windows_trained(self) -> int:
        return self.steps * self.batch_size


@dataclass(frozen=True, kw_only=True)
class LearnedMethod(TrainedMethod):
    """A method that trains one score for each component on top of its spectra; everything else stays frozen."""

    project_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "project_every", self.project_every, 1, 1_000_000)

    @property
    def newton_steps(self) -> int:
        """Newton steps on the scores in the closed form, see engines/newton.py."""
        return 0

    @abstractmethod
    def loss(self, student_logits: Tensor, ids: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar training loss from logits (B, S, V) on windows `ids` (B, S)."""

    @abstractmethod
    def keep_at(self, progress: float, keep: float) -> float | None:
        """The budget to project to at `progress` in [0, 1) of the steps; None leaves the masks as they are."""

    @abstractmethod
    def price(self, components: Components) -> Tensor:
        """What keeping each component is worth (K,), in the units of the loss; the allocation keeps the dearest."""

    @abstractmethod
    def score_on_return(self, components: Components) -> Tensor:
        """The score (K,) from which a pruned component goes on when it is taken back."""


@dataclass(frozen=True, kw_only=True)
class MaskedMethod(TrainedMethod):
    """A method that trains one mask for each component, under a pressure towards the size, and adapters beside them."""

    adapter_rank: int = 32
    adapter_alpha: float = 16.0
    mask_start: float = 0.02
    pressure: float = 0.0
    """At the start. 0: in units of the masks' gradients, see engines/masked.py."""
    pressure_every: int = 4
    reach: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "adapter_rank", self.adapter_rank, 1, 65_536)
        require_range(self.info.name, "adapter_alpha", self.adapter_alpha, 0.0, 65_536.0)
        require_range(self.info.name, "mask_start", self.mask_start, 1e-6, 1.0)
        require_range(self.info.name, "pressure", self.pressure, 0.0, 1e6)
        require_range(self.info.name, "pressure_every", self.pressure_every, 1, 1_000_000)
        require_range(self.info.name, "reach", self.reach, 0.01, 1.0)
        if self.steps and self.rank_multiple > 1:
            raise UsageError(
                f"method {self.info.name}: rank_multiple={self.rank_multiple} with steps={self.steps}: ranks follow "
                "from the masks that are left and may be any; leave it out"
            )

    @property
    @abstractmethod
    def compares_with_dense(self) -> bool:
        """Whether `loss` looks at the dense model's logits."""

    @abstractmethod
    def loss(self, student_logits: Tensor, ids: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """Scalar training loss from logits (B, S, V) of tokens (B, S), the pressure apart."""

    @abstractmethod
    def mask_rate(self) -> float:
        """Peak learning rate of the masks."""

    @abstractmethod
    def press(self, mask: Tensor) -> Tensor:
        """Gradient (K,) of the penalty on the masks, at pressure 1."""

    @abstractmethod
    def next_pressure(self, pressure: float, fell: float, needed: float) -> float:
        """The pressure for the next steps; the mask values that must go fell by `fell`, `needed` was due."""


def require_choice(method: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not in `allowed`."""
    if value not in allowed:
        raise UsageError(f"method {method}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def require_range(method: str, name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high]."""
    if not low <= value <= high:
        raise UsageError(f"method {method}: {name} must be in [{low}, {high}], got {value}")


def _require_type(method: str, name: str, value: object, default: object) -> None:
    """Options arrive from the command line or JSON: an int is a float, a bool is not a number, no other mixing."""
    wanted = type(default)
    fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise UsageError(
            f"method {method}: option {name} takes {wanted.__name__}, got {type(value).__name__} {value!r}"
        )
