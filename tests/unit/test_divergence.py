"""The distillation loss and its gradient against autograd in float64."""

import pytest
import torch

from spectrim.linalg import divergence
from spectrim.linalg.divergence import distillation_loss, mean_kl


def slow_loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """As the definition has it, everything left to autograd."""
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return (1 - share) * divergence - share * log_q.gather(-1, labels[..., None]).mean()


def drawn(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 11, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(11, (3, 5), generator=generator)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("chunk", [11, 40, 2**26])
def test_value_and_gradient_equal_autograd(monkeypatch, share, chunk):
    monkeypatch.setattr(divergence, "CHUNK_NUMBERS", chunk)
    student, teacher, labels = drawn(torch.float64)
    fast, slow = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = distillation_loss(fast, teacher, labels, share)
    (3 * loss).backward()
    expected = slow_loss(slow, teacher, labels, share)
    (3 * expected).backward()
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(fast.grad, slow.grad, rtol=1e-9, atol=1e-14)


def test_half_precision_logits_are_widened():
    student, teacher, labels = drawn(torch.bfloat16)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    expected = slow_loss(student.detach(), teacher, labels, 0.1)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_nothing_is_left_between_equal_distributions():
    student, _, _ = drawn()
    moved = (student + 7.0).requires_grad_()  # a constant changes no distribution
    loss = mean_kl(moved, student)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert float(moved.grad.abs().max()) < 1e-6


def test_a_nan_logit_is_seen():
    student, teacher, _ = drawn()
    student[0, 0, 0] = torch.nan
    assert torch.isnan(mean_kl(student, teacher))


def test_labels_are_needed_for_their_share():
    student, teacher, _ = drawn()
    with pytest.raises(AssertionError, match="labels"):
        distillation_loss(student, teacher, None, 0.1)
