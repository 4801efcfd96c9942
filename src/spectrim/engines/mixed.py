"""Mixed-rank fine-tuning: factors trained while the weights they stand for still do a part of the work.

for each step:   two passes a and b over the batch; in each, every layer uses its factors with probability p, else the
                 full weight;  p rises from `FIRST_SHARE` to 1 at `RISE` of the steps and stays there
                 loss = 1/2 (task(a) + task(b)) + consistency (KL(a || b) + KL(b || a))

Where p is 1 the two passes are one. Choices come from the seed and the step, so a run that goes on makes the same ones.
Source: LPAF (Ren and Zhu, arXiv 2306.14152); the consistency term is R-Drop's (Liang et al., arXiv 2106.14448), each
pass being pulled towards the other as it is. Factors are trained in the coordinates of a metric, as in distil.py; the
full weights are not trained and do not remain.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.distil import GRADIENT_NORM, METRIC_WINDOWS, from_spectral, metric_or_saved, roots_of, to_spectral
from spectrim.engines.loop import Buffers, Group, Training, train
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import low_rank_layers
from spectrim.linalg.divergence import distillation_loss, mean_kl
from spectrim.models.walk import Walk
from spectrim.nn.mixed import MixedLinear

STAGE = "mixed rank"
FIRST_SHARE, RISE = 0.5, 0.8


def low_share(step: int, steps: int) -> float:
    """The probability that a layer uses its factors."""
    return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * step / max(RISE * steps, 1))


def train_mixed(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    full: Mapping[str, Tensor],
    ids: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    label_share: float,
    consistency: float,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the low-rank layers of `student` in place over `ids` (windows, length); returns the losses.

    `full` holds the weight (O, I) that each layer's factors stand for. On any error the layers are what they were.
    """
    layers = low_rank_layers(student, walk)
    if not layers or steps == 0:
        return []
    measured, checkpoint = metric_or_saved(student, walk, ids[:METRIC_WINDOWS], layers, STAGE, seed, checkpoint)
    spectral = to_spectral(layers, roots_of(measured, layers))
    mixed = {name: MixedLinear(low, full[name]).train(layers[name].training) for name, low in spectral.items()}
    now = Choices(mixed, steps, seed)

    def loss(batch: Tensor) -> Tensor:
        with autocast(batch.device):
            with torch.no_grad():
                wanted = teacher(input_ids=batch, use_cache=False).logits[:, :-1]
            passes = []
            for turn in range(now.passes):
                now.choose(turn)
                passes.append(student(input_ids=batch, use_cache=False).logits[:, :-1])
        task = sum(distillation_loss(logits, wanted, batch[:, 1:], label_share) for logits in passes) / len(passes)
        assert isinstance(task, Tensor)
        if len(passes) == 1:
            return task
        one, other = passes
        return task + consistency * (mean_kl(one, other.detach()) + mean_kl(other, one.detach()))

    training = Training(
        stage=STAGE,
        label=STAGE,
        says="mixed-rank fine-tuning",
        advice=f"Lower the learning rate (--set learning_rate={learning_rate / 3:.2g})",
        groups=[Group(parameters=parameters_of(mixed), peak=learning_rate)],
        loss=loss,
        optimizer=lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        clip=GRADIENT_NORM,
        before_step=now.draw,
        phase=lambda: now.step,
        state=lambda: Buffers({}, {"step": now.step}),
        restore=lambda saved: now.draw(saved.facts["step"]),
        recorded=False,  # which layers run is decided on the host
    )
    trained: Mapping[str, torch.nn.Module] = layers
    for name, layer in mixed.items():
        student.set_submodule(name, layer)
    try:
        with frozen(student), frozen(teacher):
            losses = train(training, ids, progress=progress, checkpoint=checkpoint)
        trained = {name: from_spectral(low, layers[name]) for name, low in spectral.items()}
    finally:
        for name, layer in trained.items():
            student.set_submodule(name, layer)
    return losses


def parameters_of(mixed: Mapping[str, MixedLinear]) -> dict[str, torch.nn.Parameter]:
    """Factors and biases, each by a name of its own."""
    return {f"{name}.{key}": p for name, layer in mixed.items() for key, p in layer.low.named_parameters()}


class Choices:
    """Which layers use their full weight in each of a step's passes."""

    def __init__(self, layers: Mapping[str, MixedLinear], steps: int, seed: int) -> None:
        self.layers, self.steps, self.seed = [*layers.values()], steps, seed
        self.step, self.full = 0, torch.zeros(1, len(layers), dtype=torch.bool)

    @property
    def passes(self) -> int:
        """2, or 1 where both would be the same."""
        return len(self.full)

    def draw(self, step: int) -> None:
        """The choices of a step: they depend on it and the seed alone, so that a batch in parts has the same."""
        share, self.step = low_share(step, self.steps), step
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        drawn = torch.rand(2, len(self.layers), generator=generator) >= share
        self.full = drawn if share < 1 else drawn[:1]

    def choose(self, turn: int) -> None:
        """Set every layer for pass `turn`."""
        for layer, full in zip(self.layers, self.full[turn].tolist(), strict=True):
            layer.full = full
