"""Distillation: all factors trained against the dense model's distribution, for any low-rank model.

loss = E[KL(dense || compressed)], AdamW, warm-up and cosine; embeddings, norms and dense layers stay as they are.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.loop import Checkpoint, Group, Training, train
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import low_rank_layers, pivot_buffers, restore_pivots
from spectrim.linalg.divergence import mean_kl
from spectrim.models.walk import Walk

GRADIENT_NORM = 1.0


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    stage: str = "kl",
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the factors of `student` in place for `steps`; returns the losses. Stops at a loss that is not finite."""
    layers = low_rank_layers(student, walk)
    parameters = {f"{name}.{p}": t for name, layer in layers.items() for p, t in layer.named_parameters()}
    if not parameters or steps == 0:
        return []

    def loss(batch: Tensor) -> Tensor:
        with autocast(batch.device):
            with torch.no_grad():
                teacher_logits = teacher(input_ids=batch, use_cache=False).logits
            return mean_kl(student(input_ids=batch, use_cache=False).logits, teacher_logits)

    training = Training(
        stage=stage,
        label="distil",
        says="distillation",
        advice="Lower its learning rate (distil(learning_rate=...) in Python), or leave the step out",
        groups=[Group(parameters=parameters, peak=learning_rate)],
        loss=loss,
        optimizer=lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        clip=GRADIENT_NORM,
        state=lambda: pivot_buffers(layers),
        restore=lambda saved: restore_pivots(layers, saved, stage),
    )
    with frozen(student), frozen(teacher):
        return train(training, ids, progress=progress, checkpoint=checkpoint)
