"""INT2.1: low-rank error correction of a model in 2 bits (Chai et al., arXiv 2306.08162).

    1. the base: every weight in 2 bits, by rounding or GPTQ; frozen from here on
    2. beside it a low-rank correction, y = W_c x + U (V x), of the rank that `keep` leaves
    3. `steps` of training of all U and V together, so that the model's outputs are again those of the dense one

The paper starts as LoRA does, with U = 0 (`start=lora`); a correction of what the base misses (`eora`, `svd`,
`diagonal`: methods/weights/eora.py) is the better start and the default. It trains on text; here the loss is the one
that all methods are recovered with, of which a tenth is the text's (engines/distil.py). Gradients go to inputs and
corrections, not to codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from spectrim.errors import UsageError
from spectrim.linalg.bits import Account, budget_in
from spectrim.linalg.factor import Factors
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.methods.weights.corrections import train_corrections
from spectrim.methods.weights.eora import BASES, METRICS, EoRA, Metric
from spectrim.methods.weights.packed import PackedMethod
from spectrim.model_method import Job, TrainedModelMethod
from spectrim.models.walk import Layer, Walk
from spectrim.nn.stores import Store
from spectrim.stats import Stats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CODES = tuple(base for base in BASES if not base.startswith("2:4"))


@dataclass(frozen=True, kw_only=True)
class INT21(TrainedModelMethod, PackedMethod):
    """A rounded model whose error is learned away by thin layers beside the frozen codes."""

    info: ClassVar = MethodInfo(
        name="int2.1",
        family="weights",
        paper="arXiv 2306.08162",
        promise="2 bits a weight and a low-rank correction, trained end to end",
    )
    needs: ClassVar = EoRA.needs

    base: str = "gptq2"
    start: Literal["eora", "svd", "diagonal", "lora"] = "eora"
    group_size: int = 128
    symmetric: bool = False
    search: bool = True
    steps: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.info.name, "base", self.base, CODES)
        require_choice(self.info.name, "start", self.start, (*METRICS, "lora"))
        require_range(self.info.name, "group_size", self.group_size, 0, 1_000_000)
        self.untrained()  # checks the rest

    def untrained(self) -> EoRA:
        """Steps 1 and 2: the same without training."""
        metric: Metric = "eora" if self.start == "lora" else self.start
        return EoRA(
            base=self.base, metric=metric, group_size=self.group_size, symmetric=self.symmetric, search=self.search,
            sequential=self.sequential,
        )  # fmt: skip

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the size of the base."""
        return self.untrained().sizes

    def check_model(self, config: "PretrainedConfig", walk: Walk, keep: float) -> None:
        """What all methods of few bits refuse, and a `keep` at which there is nothing to train."""
        super().check_model(config, walk, keep)
        self.check_ranks(walk, budget_in(self.budget_unit, walk.numbers, keep), keep)

    def check_ranks(self, walk: Walk, budget: int, keep: float) -> None:
        """Refuse a budget that leaves nothing to train."""
        left = self.bytes_left(walk, budget, keep)
        if self.steps and not any(self.ranks(walk.layers, left)):
            raise UsageError(
                f"method int2.1: at keep {keep:g} the base leaves {left:,} bytes, too few for a correction of rank 1 "
                f"of any layer, and so nothing that {self.steps} steps could train; pass a larger --keep, or the "
                "method gptq, which needs none"
            )

    def account(self, layer: Layer) -> Account:
        """The base's."""
        return self.untrained().account(layer)

    def ranks(self, layers: Sequence[Layer], left: int) -> list[int]:
        """The same rank everywhere, as far as bytes go."""
        return self.untrained().ranks(layers, left)

    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """Step 1."""
        return self.untrained().store_of(weight, stats, dtype)

    def correction(self, missing: Tensor, stats: Stats, rank: int) -> Factors | None:
        """Step 2, where training starts."""
        if self.start == "lora":
            return lora_start(missing, rank)
        return self.untrained().correction(missing, stats, rank)

    def compress(self, job: Job) -> "PreTrainedModel":
        """All three steps."""
        self.check_ranks(job.walk, job.budget, job.keep)
        model = super().compress(job)
        if self.steps:
            train_corrections(self, model, job)
        return model


def lora_start(missing: Tensor, rank: int) -> Factors:
    """U = 0 and V random with the spread that keeps V x as large as x; the same for weights of the same shape."""
    outputs, inputs = missing.shape
    drawn = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(0), dtype=missing.dtype)
    return Factors(missing.new_zeros(outputs, rank), drawn.to(missing.device) / inputs**0.5)
