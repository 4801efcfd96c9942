"""How far one next-token distribution is from another, with the gradient formed beside the value.

Logits of a batch are the largest tensor of a training step (tokens x vocabulary). Left to autograd, their softmaxes are
kept several times over in float32; here each chunk of tokens gives its share of the loss and its gradient

    d loss / d student = (q - (1 - share) p - share onehot(label)) / tokens       p teacher, q student

at once, and only that gradient is kept, in the dtype of the logits.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**26
"""Logits that are widened to float32 at a time (256 MiB)."""


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """E[KL(teacher || student)] over positions, logits (B, S, V), in float32."""
    return distillation_loss(student_logits, teacher_logits)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, label_share: float = 0.0
) -> Tensor:
    """`(1 - share) E[KL(teacher || student)] + share E[-log student(label)]` in nats a position, float32 scalar.

    Logits (..., V), labels (...) int64 (needed when `label_share` > 0). No second derivatives.
    """
    vocabulary = student_logits.shape[-1]
    if label_share and labels is None:
        raise AssertionError("labels are needed for a label share above 0")
    flat = None if labels is None or not label_share else labels.reshape(-1)
    return _Distillation.apply(  # pyright: ignore[reportReturnType]
        student_logits.reshape(-1, vocabulary), teacher_logits.reshape(-1, vocabulary), flat, label_share
    )


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor | None, share: float) -> Tensor:
        tokens, vocabulary = student_NV.shape
        wide = torch.promote_types(student_NV.dtype, torch.float32)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_NV = torch.empty_like(student_NV) if needs_gradient else None
        total = torch.zeros((), dtype=wide, device=student_NV.device)
        rows = max(1, CHUNK_NUMBERS // vocabulary)
        for start in range(0, tokens, rows):
            here = slice(start, start + rows)
            log_q = student_NV[here].to(wide).log_softmax(-1)
            log_p = teacher_NV[here].to(wide).log_softmax(-1)
            p = log_p.exp()
            total += (1 - share) * (p * (log_p - log_q)).sum()
            if labels_N is not None:
                total -= share * log_q.gather(-1, labels_N[here, None]).sum()
            if gradient_NV is not None:
                slope = log_q.exp_().sub_(p, alpha=1 - share)
                if labels_N is not None:
                    slope.scatter_add_(-1, labels_N[here, None], slope.new_full((len(slope), 1), -share))
                gradient_NV[here] = slope.div_(tokens).to(gradient_NV.dtype)
        ctx.save_for_backward(gradient_NV)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad_outputs[0].to(gradient_NV.dtype), None, None, None)
