"""SoCo: learned singular spectrum (Li et al., arXiv 2502.15092), as reconstructed here; see docs/soco.md.

    W = P diag(s) Q^T,   W' = P diag(s * score) Q^T       P, s, Q frozen; one score a component, 1 at the start
    loss = (1 - share) KL(dense || compressed) + share E[-log p(next token)], end to end, all layers at once

    1. coarse compression   (the first `explore` of the steps): the budget falls from 1 to the request, quadratically;
                            at each projection the cheapest components of all layers are pruned
    2. oscillation          (the next `refine`): at the exact budget, pruned components whose gradient promises more
                            than a kept one is worth come back, and the kept one goes
    3. polarisation         (the rest): the support is fixed, scores settle, some above 1 to make up for what is gone

Prices are second order: losing a kept component costs  1/2 e score^2  (e: its energy in the metric), taking a pruned
one back gains  g^2 / (2 e)  with g the running mean of its gradient, at score  -g / e. `hysteresis` says by how much
a newcomer must beat the one it replaces.

basis="two-sided" (default): components of the K-FAC metric, in which the Hessian of the scores is near the identity.
basis="svd": the plain singular components of the paper; e is then the diagonal of the score Hessian.

The paper reaches the budget by a penalty on the ratio; a penalty with its weight and rate is fragile (one large penalty
ended above perplexity 500). Projection onto the budget is its limit and needs no weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from spectrim.errors import UsageError
from spectrim.linalg.divergence import distillation_loss
from spectrim.linalg.factor import Spectrum, decompose
from spectrim.method import Components, LearnedMethod, MethodInfo, require_choice, require_range
from spectrim.methods.weights.two_sided import TwoSidedMetric, two_sided_energies, two_sided_spectrum
from spectrim.stats import Stat, Stats

LARGEST_SCORE_ON_RETURN = 2.0
"""A component is never taken back at more than this score: the quadratic model does not reach further."""


@dataclass(frozen=True, kw_only=True)
class SoCo(TwoSidedMetric, LearnedMethod):
    """Learned scores on frozen singular components, allocated over all layers under one budget."""

    info: ClassVar = MethodInfo(
        name="soco",
        family="weights",
        paper="arXiv 2502.15092",
        promise="learns which components to keep, and how strongly, end to end",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            # Coupling takes longer than all the rest of the closed form on a CPU; one Newton step gives more for less.
            "fast": {"coupling": "none", "newton": 1, "steps": 0, "distil_steps": 0},
            "balanced": {"steps": 400, "distil_steps": 0, "label_share": 0.1},
            "best": {"steps": 0, "distil_steps": 600},
        }
    )
    default_preset: ClassVar = "balanced"

    basis: Literal["two-sided", "svd"] = "two-sided"
    newton: int = 0
    steps: int = 300
    distil_steps: int = 0
    explore: float = 0.0
    refine: float = 0.6
    hysteresis: float = 0.2
    label_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("soco", "basis", self.basis, ("two-sided", "svd"))
        require_range("soco", "newton", self.newton, 0, 100)
        require_range("soco", "distil_steps", self.distil_steps, 0, 1_000_000)
        for name in ("explore", "refine", "label_share"):
            require_range("soco", name, getattr(self, name), 0.0, 1.0)
        require_range("soco", "explore + refine", self.explore + self.refine, 0.0, 1.0)
        require_range("soco", "hysteresis", self.hysteresis, 0.0, 100.0)
        if self.shares and (self.steps or self.basis != "two-sided"):
            what = f"steps={self.steps}" if self.steps else f"basis={self.basis}"
            raise UsageError(
                f"method soco: storage={self.storage} with {what}: learned scores and the plain basis choose "
                "components of each layer by itself. Take --preset fast or best with the two-sided basis, or "
                "storage=pivot"
            )

    @property
    def newton_steps(self) -> int:
        """As asked for."""
        return self.newton

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the chosen basis, strongest first by what losing each costs to second order."""
        if self.basis == "two-sided":
            return two_sided_spectrum(weight, stats, self.input_shrinkage, self.output_shrinkage)
        return price_in_loss(decompose(weight), stats)

    def energies(self, weight: Tensor, stats: Stats) -> Tensor:
        """Of those components."""
        if self.basis == "two-sided":
            return two_sided_energies(weight, stats, self.input_shrinkage, self.output_shrinkage)
        return super().energies(weight, stats)

    def loss(self, student_logits: Tensor, ids: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(dense || compressed) and a little of the next-token loss, in nats a token; the last token has no label."""
        return distillation_loss(student_logits[:, :-1], teacher_logits[:, :-1], ids[:, 1:], self.label_share)

    def keep_at(self, progress: float, keep: float) -> float | None:
        """Phases 1 to 3."""
        if progress < self.explore:
            return keep + (1 - keep) * (1 - progress / self.explore) ** 2
        return keep if progress < self.explore + self.refine else None

    def price(self, components: Components) -> Tensor:
        """1/2 e score^2 for kept components, with the hysteresis; the promised gain for pruned ones."""
        kept = components.energy * components.scores.double().square() * (1 + self.hysteresis)
        promised = components.energy * self.score_on_return(components).double().square()
        return kept.where(components.kept, promised)

    def score_on_return(self, components: Components) -> Tensor:
        """Newton's step from 0: -g / e."""
        tiny = components.energy.max().clamp(min=1e-300) * 1e-20
        newton = -components.gradient.double() / components.energy.clamp(min=float(tiny))
        return newton.clamp(-LARGEST_SCORE_ON_RETURN, LARGEST_SCORE_ON_RETURN).to(components.scores.dtype)


def price_in_loss(spectrum: Spectrum, stats: Stats) -> Spectrum:
    """The same components with energies (p^T B p)(q^T A q): the diagonal of the score Hessian; in that order."""
    left_curvature = ((stats.get(Stat.OUTPUT_GRAD) @ spectrum.left) * spectrum.left).sum(0)
    right_curvature = ((spectrum.right @ stats.get(Stat.GRAM)) * spectrum.right).sum(1)
    energy = (left_curvature * right_curvature).clamp(min=0)
    return spectrum._replace(energy=energy).order_by(energy)
