"""What a compression in memory gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.learned import Learned
from spectrim.engines.ranks import Plan
from spectrim.engines.recovery import Recovered
from spectrim.method import Method
from spectrim.models.walk import Walk
from spectrim.replacement import Replacement


class FactorQuantization(NamedTuple):
    """What low-rank and dense layers were quantised to after everything else."""

    bits: int
    group_size: int


@dataclass(kw_only=True)
class Outcome:
    """A compressed model and how it came about."""

    model: PreTrainedModel
    method: Method
    walk: Walk
    plan: Plan
    placed: Mapping[str, Replacement]
    """What each layer became; with `factor_quantization`, before that: the numbers that codes stand for."""
    learned: Learned | None = None
    recovered: tuple[Recovered, ...] = ()
    factor_quantization: FactorQuantization | None = None
    energies: Mapping[str, Tensor] = field(default_factory=dict)
    """Squared singular values (K,) of each layer in the method's metric, before the cut; none of methods of the whole
    model."""
    frontier: list[dict[str, float]] = field(default_factory=list)
    """`keep` and `predicted` loss of the best choices under other budgets, of methods that choose by such losses."""
    seconds: dict[str, float] = field(default_factory=dict)
    gradient_windows: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def distil_losses(self) -> tuple[float, ...]:
        """Losses of all `kl` steps, one after the other."""
        return tuple(x for r in self.recovered if r.step.name == "kl" for losses in r.losses for x in losses)


class Made(NamedTuple):
    """A compressed model before recovery, and the checkpoint that recovery goes on with."""

    student: PreTrainedModel
    plan: Plan
    placed: Mapping[str, Replacement]
    learned: Learned | None
    checkpoint: Checkpoint | None
