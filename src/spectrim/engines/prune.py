"""Fine-tuning while entries go: unstructured pruning of every target layer along a cubic schedule.

for each step:   mask from the scores of the moment -> loss, backward -> score -= W * dL/dW -> Adam on what is left

The first `WARM_UP_SHARE` of the steps only collect scores, the last `SETTLE_SHARE` train at the final sparsity.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.loop import Buffers, Group, Training, train
from spectrim.engines.measure import Progress, both_logits, frozen
from spectrim.engines.pack import fill
from spectrim.linalg.divergence import distillation_loss
from spectrim.linalg.movement import sparsity_at
from spectrim.models.walk import Walk, linear_at, weight_of
from spectrim.nn.pruned import PrunedLinear, Scores

STAGE = "prune"
WARM_UP_SHARE, SETTLE_SHARE = 0.1, 0.2
GRADIENT_NORM = 1.0


def to_pruned(student: PreTrainedModel, walk: Walk) -> dict[str, PrunedLinear]:
    """Put a PrunedLinear, with a weight of its own, in the place of every target layer."""
    layers = {}
    for layer in walk.layers:
        module = linear_at(student, layer.name)
        layers[layer.name] = PrunedLinear(weight_of(module), module.bias).train(module.training)
        student.set_submodule(layer.name, layers[layer.name])
    return layers


def prune(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    sparsity: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    label_share: float,
    scores: Scores = "movement",
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Mapping[str, PrunedLinear]:
    """Prune the target layers of `student` to `sparsity` in `steps` over `ids` (windows, length); `teacher` is dense.

    `learning_rate` is relative to the root mean square of each weight. `scores` by "size" are |W| (magnitude pruning).
    """
    layers = to_pruned(student, walk)

    def loss(batch: Tensor) -> Tensor:
        logits, teacher_logits = both_logits(student, teacher, batch)
        return distillation_loss(logits[:, :-1], teacher_logits[:, :-1], batch[:, 1:], label_share)

    def before_step(step: int) -> None:
        if (begun := scheduled(step, steps)) is not None:
            for layer in layers.values():
                layer.prune(sparsity_at(begun, sparsity), scores)

    def after_backward(_step: int) -> None:
        for layer in layers.values():
            layer.tally()

    training = Training(
        stage=STAGE,
        label="prune",
        says="pruning",
        advice=f"Lower the learning rate (--set learning_rate={learning_rate / 3:.2g})",
        groups=[
            Group(parameters=parameters_of(name, layer), peak=learning_rate * scale_of(layer.weight))
            for name, layer in layers.items()
        ],
        loss=loss,
        optimizer=lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        clip=GRADIENT_NORM,
        before_step=before_step,
        after_backward=after_backward,
        state=lambda: Buffers(buffers_of(layers), {}),
        restore=lambda saved: fill(buffers_of(layers), saved.tensors, STAGE),
    )
    with frozen(student), frozen(teacher):
        train(training, ids, progress=progress, checkpoint=checkpoint)
    for layer in layers.values():  # the last gradient counts too
        layer.prune(sparsity, scores)
    return layers


def scheduled(step: int, steps: int) -> float | None:
    """Progress in [0, 1] along the schedule; None while scores are only collected."""
    start, end = WARM_UP_SHARE * steps, (1 - SETTLE_SHARE) * steps
    return None if step < start else min(1.0, (step - start) / max(end - start, 1e-9))


def parameters_of(name: str, layer: PrunedLinear) -> dict[str, torch.nn.Parameter]:
    """What is trained of one layer, by a name of its own."""
    return {f"{name}.{key}": parameter for key, parameter in layer.named_parameters()}


def scale_of(weight: Tensor) -> float:
    """Root mean square of the entries; 1 for a weight of zeros."""
    return float(weight.detach().square().mean().sqrt()) or 1.0


def buffers_of(layers: Mapping[str, PrunedLinear]) -> dict[str, Tensor]:
    """Masks and scores."""
    return {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.named_buffers()}
