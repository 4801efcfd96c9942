"""ACIP: any compression via iterative pruning (Genzel et al., "Choose Your Model Size", arXiv 2502.01717).

    W = U diag(1[m > 0]) diag(s) V^T + alpha / R B A       plain SVD, frozen; m one real a component, B A an adapter

    1. press    m starts at 2e-2 everywhere. Masks and adapters of all layers are trained together on
                loss + lambda sum relu(m); the gradient passes the step 1[m > 0] straight through. lambda is multiplied
                every few steps, so components go out one after the other, those first that the loss holds least.
    2. order    what went out earlier is worth less; what is still there is ordered by m.
    3. stop     when the size is reached the masks are fixed, cut exactly to the budget in that order;
    4. tune     the adapters are trained on for the steps that are left.

The paper counts the factors and leaves the adapters out. Here all is counted: an adapter cannot be merged into kept
factors without raising their rank, so a layer with r components is stored as [U_r s_r, alpha / R B] [V_r^T; A], rank
r + R, or dense, with all multiplied in and nothing masked, where that takes no more.

schedule="open" with the preset `paper` is the paper's: rate 5e-5, lambda 1e-3 times 1.01 every 4 steps. A mask then
needs 400 steps to go out at the very least. schedule="tracked" (default, ours) fits the way to the number of steps: the
mask that must go out last is to reach zero at `reach` of the steps; lambda rises while it falls too slowly and sinks
while it falls too fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from spectrim.linalg.divergence import mean_kl
from spectrim.linalg.factor import Spectrum, decompose
from spectrim.method import Allocation, MaskedMethod, MethodInfo, require_choice, require_range
from spectrim.stats import Stats

TRAVEL = 4.0
"""A mask at full rate could fall this many times from its start to zero in the pressed steps (ours)."""
SPAN = 1e4
"""The pressure can grow by this much in the pressed steps (ours); the scale of the loss's gradient is not known."""


@dataclass(frozen=True, kw_only=True)
class ACIP(MaskedMethod):
    """Masks on plain singular components, pressed to the size in one descent, with adapters that repair."""

    info: ClassVar = MethodInfo(
        name="acip",
        family="weights",
        paper="arXiv 2502.01717",
        promise="prunes singular components by one descent, with adapters that repair",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            "paper": {
                "schedule": "open",
                "batch_size": 4,
                "learning_rate": 5e-5,
                "mask_learning_rate": 5e-5,
                "pressure": 1e-3,
                "growth": 1.01,
            }
        }
    )

    allocation: Allocation = "global"
    """Of the closed form (steps=0); after training the masks decide."""
    steps: int = 1000
    learning_rate: float = 1e-3
    mask_learning_rate: float = 0.0
    """0: from the number of steps, see TRAVEL."""
    growth: float = 0.0
    """Of the pressure, every `pressure_every` steps. 0: from the number of steps, see SPAN."""
    target: Literal["labels", "dense"] = "labels"
    schedule: Literal["tracked", "open"] = "tracked"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("acip", "target", self.target, ("labels", "dense"))
        require_choice("acip", "schedule", self.schedule, ("tracked", "open"))
        if self.mask_learning_rate:
            require_range("acip", "mask_learning_rate (if not 0)", self.mask_learning_rate, 1e-9, 10.0)
        if self.growth:
            require_range("acip", "growth (if not 0)", self.growth, 1.0, 1000.0)

    @property
    def pressed_steps(self) -> float:
        """Steps after which the size is to be reached."""
        return max(1.0, self.reach * self.steps)

    @property
    def compares_with_dense(self) -> bool:
        """With target="dense"."""
        return self.target == "dense"

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Singular components of the weight itself."""
        return decompose(weight)

    def loss(self, student_logits: Tensor, ids: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """Nats a token: cross-entropy of the next token (the paper's), or KL(dense || compressed)."""
        if self.target == "dense":
            assert teacher_logits is not None, "the dense model's logits are the target"
            return mean_kl(student_logits, teacher_logits)
        return F.cross_entropy(student_logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    def mask_rate(self) -> float:
        """As set, or such that masks can make their way in the pressed steps."""
        return self.mask_learning_rate or TRAVEL * self.mask_start / self.pressed_steps

    def press(self, mask: Tensor) -> Tensor:
        """Gradient of sum relu(m): 1 where m > 0."""
        return (mask > 0).to(mask.dtype)

    def next_pressure(self, pressure: float, fell: float, needed: float) -> float:
        """Times the growth; "tracked" divides by it instead where the masks fell faster than was due."""
        growth = self.growth or SPAN ** (self.pressure_every / max(self.pressed_steps, self.pressure_every))
        return pressure / growth if self.schedule == "tracked" and fell > needed else pressure * growth
