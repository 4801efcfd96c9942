"""`--deterministic`: two runs give the same bits, and running sums take the way that has such an algorithm."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectrim.engines.pipeline import compress_model
from spectrim.linalg.running import running_sum
from spectrim.registry import make_method
from spectrim.reproducible import deterministic
from tiny_models import tiny, token_ids

ROWS = [
    ("soco", "fast", {}, 0.6),
    ("soco", "balanced", {"steps": 4, "batch_size": 4}, 0.6),
    ("trellis", None, {"window": 8, "forms": "codes"}, 0.3),
]
of_every_kind = pytest.mark.parametrize(
    ("name", "preset", "options", "keep"), ROWS, ids=lambda value: value if isinstance(value, str) else ""
)


def tensors_of(device: str, name: str, preset: str | None, options: dict[str, Any], keep: float) -> dict[str, Tensor]:
    model, method = tiny("llama").to(device), make_method(name, preset, options)
    with deterministic(True):
        return compress_model(model, method, keep, token_ids(16, 32)).model.state_dict()


def differing(device: str, *asked: Any) -> list[str]:
    """Names of tensors that two runs do not make alike."""
    first, second = tensors_of(device, *asked), tensors_of(device, *asked)
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


@of_every_kind
def test_two_runs_give_the_same_bits(name: str, preset: str | None, options: dict[str, Any], keep: float) -> None:
    assert differing("cpu", name, preset, options, keep) == []


@pytest.mark.gpu
@of_every_kind
def test_two_runs_on_a_gpu_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, name: str, preset: str | None, options: dict[str, Any], keep: float
) -> None:
    """In one process, where cuBLAS may have started before: benchmarks/deterministic.py compares two processes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert differing("cuda", name, preset, options, keep) == []


def test_a_running_sum_goes_over_the_cpu_where_a_gpu_has_none_that_is_deterministic() -> None:
    values = torch.rand(3, 5, dtype=torch.float64)
    assert torch.equal(running_sum(values, 1), values.cumsum(1))
    on_gpu = mock.MagicMock(is_cuda=True, device="cuda:0")
    on_gpu.is_floating_point.return_value = True
    with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
        running_sum(on_gpu, 1)
    on_gpu.cpu().cumsum.assert_called_once_with(1)
    on_gpu.cumsum.assert_not_called()
    running_sum(on_gpu)
    on_gpu.cumsum.assert_called_once_with(0)
