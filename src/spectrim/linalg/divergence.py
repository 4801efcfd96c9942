"""How far one next-token distribution is from another."""

from torch import Tensor


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """E[KL(teacher || student)] over positions, logits (B, S, V), in float32."""
    log_p = teacher_logits.float().log_softmax(-1)
    log_q = student_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
