"""Distillation: all factors trained against the dense model's distribution, for any low-rank model.

loss = E[KL(dense || compressed)], AdamW, warm-up and cosine; embeddings, norms and dense layers stay as they are.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.learned import set_learning_rate
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.errors import NumericalError
from spectrim.linalg.divergence import mean_kl
from spectrim.models.walk import Walk
from spectrim.nn.linears import LowRankLinear, PivotLinear

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
    progress: Progress | None = None,
) -> list[float]:
    """Train the factors of `student` in place for `steps`; returns the losses. Stops at a loss that is not finite."""
    modules = [student.get_submodule(layer.name) for layer in walk.layers]
    low_rank = [m for m in modules if isinstance(m, LowRankLinear | PivotLinear)]
    parameters = [p for m in low_rank for p in m.parameters()]
    if not parameters or steps == 0:
        return []
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    device = parameters[0].device
    losses = []
    with frozen(student), frozen(teacher):
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(steps):
            set_learning_rate(optimizer, learning_rate, step, steps)
            batch = ids[order[(torch.arange(batch_size) + step * batch_size) % len(order)]].to(device)
            with autocast(device):
                with torch.no_grad():
                    teacher_logits = teacher(input_ids=batch, use_cache=False).logits
                loss = mean_kl(student(input_ids=batch, use_cache=False).logits, teacher_logits)
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    f"distillation: the loss is {float(loss.detach())} at step {step} of {steps}; "
                    "lower its learning rate"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if progress is not None:
                progress("distil", step + 1, steps)
    return [float(x) for x in losses]
