"""What calibration measures of a linear layer, for every method that asks for it."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Stat(Enum):
    """What calibration can measure at a linear layer y = W x; g is the gradient of the loss at y."""

    GRAM = "gram"  # E[x x^T]              (I, I)
    MEAN = "mean"  # E[x]                  (I,)
    MEAN_ABS = "mean_abs"  # E|x|          (I,)
    OUTPUT_GRAD = "output_grad"  # E[g g^T], labels sampled from the model     (O, O)
    FISHER = "fisher"  # E[(dL/dW)^2] elementwise, one sample a sequence       (O, I)
    SLOPE = "slope"  # E[dL/dW], labels from the text (of sampled labels it is 0)   (O, I)


INPUT_STATS = frozenset({Stat.GRAM, Stat.MEAN, Stat.MEAN_ABS})
"""Those of what a layer reads: measured once for layers that read the same."""
SYMMETRIC_STATS = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
"""Matrices of which the part on and above the diagonal says all."""
SAMPLED_STATS = frozenset({Stat.OUTPUT_GRAD, Stat.FISHER})
GRADIENT_STATS = SAMPLED_STATS | {Stat.SLOPE}
"""Those that need backward passes, from labels sampled from the model or from the text's own."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Measured statistics of one layer, float64. Fields that no method asked for are None."""

    tokens: int
    gram: Tensor | None = None
    mean: Tensor | None = None
    mean_abs: Tensor | None = None
    output_grad: Tensor | None = None
    fisher: Tensor | None = None
    slope: Tensor | None = None

    def measured(self) -> dict[str, Tensor]:
        """What is there, by field name."""
        return {stat.value: value for stat in Stat if (value := getattr(self, stat.value)) is not None}

    def blend(self, other: "Stats", share: float = 0.5) -> "Stats":
        """The mean of two measurements, `share` of it from `other`."""
        theirs = other.measured()
        both = {name: (1 - share) * own + share * theirs[name] for name, own in self.measured().items()}
        return Stats(tokens=self.tokens + other.tokens, **both)

    def is_finite(self) -> bool:
        """No NaN or Inf in anything that was measured."""
        return all(bool(torch.isfinite(value).all()) for value in self.measured().values())

    def get(self, stat: Stat) -> Tensor:
        """The statistic; asking for one that was not declared in `needs` is a programming error."""
        value = getattr(self, stat.value)
        assert value is not None, f"{stat} was not measured: declare it in `needs`"
        return value


@dataclass(frozen=True)
class Coupling:
    """A refinement of GRAM and OUTPUT_GRAD by the correlation of tokens; both are inverted after this shrinkage."""

    input_shrinkage: float
    output_shrinkage: float
