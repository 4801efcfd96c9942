"""Recorded steps: what is left alone on a CPU, what transformers is told, and (on a GPU) that values are the same."""

from unittest import TestCase

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from spectrim.engines.replay import EAGER_STEPS, Replay, Told, whole_windows

IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Square:
    """The loss (w x)^2; counts how often it was asked."""

    def __init__(self, device: str = "cpu") -> None:
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], device=device))
        self.shift, self.asked = torch.zeros((), device=device), 0

    def __call__(self, batch: Tensor) -> Told:
        assert self.w.grad is None
        self.asked += 1
        loss = ((batch @ self.w) + self.shift).square().mean()
        loss.backward()
        assert self.w.grad is not None
        return Told(loss.detach(), self.w.grad.norm())


def test_on_a_cpu_every_step_is_computed():
    square = Square()
    replay = Replay([square.w])
    for step in range(EAGER_STEPS + 4):
        told = replay(square, torch.full((2, 3), float(step)), None)
        assert float(told.loss) == pytest.approx((-0.5 * step) ** 2)
    assert square.asked == EAGER_STEPS + 4
    assert replay.recorded is None


def test_transformers_gives_the_same_logits_when_told_that_windows_are_whole():
    model = llama()
    before = masking_utils.find_packed_sequence_indices
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        with whole_windows():
            assert masking_utils.find_packed_sequence_indices is not before
            told = model(input_ids=IDS, use_cache=False).logits
    assert masking_utils.find_packed_sequence_indices is before
    assert torch.equal(plain, told)


def test_the_search_for_packed_sequences_returns_after_an_error():
    before = masking_utils.find_packed_sequence_indices
    with pytest.raises(ZeroDivisionError), whole_windows():
        raise ZeroDivisionError
    assert masking_utils.find_packed_sequence_indices is before


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_step_follows_batch_parameters_and_buffers():
    square = Square("cuda")
    replay = Replay([square.w])
    for step in range(EAGER_STEPS + 4):
        batch = torch.full((2, 3), float(step), device="cuda")
        square.shift.fill_(step)
        with torch.no_grad():
            square.w.copy_(torch.tensor([1.0, -2.0, 0.5 + step]))
        told = replay(square, batch, None)
        inner = (step - 0.5) * step + step
        assert float(told.loss) == pytest.approx(inner**2, abs=1e-4)
        assert square.w.grad is not None
        assert square.w.grad.tolist() == pytest.approx([2 * inner * step] * 3, abs=1e-3)
    assert square.asked == EAGER_STEPS + 1, "three as usual, one while recording"
    replay(square, torch.ones(2, 3, device="cuda"), "another phase")
    assert replay.recorded is None


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_runs_as_usual_and_the_log_says_why():
    square = Square("cuda")

    def reads_on_the_host(batch: Tensor) -> Told:
        assert float(batch.sum()) == 6.0
        return square(batch)

    replay = Replay([square.w])
    with TestCase().assertLogs("spectrim", "INFO") as told:
        for _ in range(EAGER_STEPS + 2):
            assert float(replay(reads_on_the_host, torch.ones(2, 3, device="cuda"), None).loss) == pytest.approx(0.25)
    assert not replay.possible
    assert "are not recorded" in "".join(told.output)
