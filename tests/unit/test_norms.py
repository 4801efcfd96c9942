"""Norms as one kernel are the models' own but for rounding, and only where they are."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.engines import large, recompute, way
from spectrim.engines.norms import fused_norms
from spectrim.engines.pipeline import compress_model
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

ARCHITECTURES = ("llama-gqa-bias", "gpt2", "phi3", "gemma3", "qwen3")


def norms_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_gives_the_same_but_for_rounding_and_is_itself_again(dtype: torch.dtype) -> None:
    model, ids = tiny("llama").to(dtype), token_ids(2, 9)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    own = model(input_ids=ids).logits.detach().double()
    with fused_norms(model, on="cpu") as names:
        assert names == norms_of(model)
        fused, copied = (m(input_ids=ids).logits.detach().double() for m in (model, copy.deepcopy(model)))
    assert float((fused - own).abs().max()) <= 8 * torch.finfo(dtype).eps * float(own.abs().max())
    assert torch.equal(copied, fused)
    assert torch.equal(model(input_ids=ids).logits.double(), own)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_are_the_same_but_for_rounding() -> None:
    norm = next(m for m in tiny("llama").modules() if "RMSNorm" in type(m).__name__)
    x = torch.randn(7, len(norm.weight), generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (own,) = torch.autograd.grad(norm(x), x, upstream)
    with fused_norms(nn.ModuleList([norm]), on="cpu"):
        (fused,) = torch.autograd.grad(norm(x), x, upstream)
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-6)


class OffsetRMSNorm(nn.Module):
    """Gemma's: 1 is added to the weight."""

    def __init__(self, shift: float = 1.0, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps, self.shift, self.factor = nn.Parameter(torch.rand(32)), 1e-6, shift, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.float().pow(2).mean(-1, keepdim=True)
        return ((self.weight + self.shift) * x.float() * torch.rsqrt(mean + self.factor * self.eps)).to(x.dtype)


@pytest.mark.parametrize(
    ("given", "agrees"), [({"shift": 0.0}, True), ({}, False), ({"shift": 0.0, "factor": 2.0}, False)]
)
def test_a_norm_that_computes_something_else_keeps_its_own_steps(given: dict[str, float], agrees: bool) -> None:
    model = nn.Sequential(OffsetRMSNorm(**given))
    with fused_norms(model, on="cpu") as names:
        assert names == (["0"] if agrees else [])


def test_states_in_another_precision_go_the_modules_own_way() -> None:
    model = nn.Sequential(OffsetRMSNorm(shift=0.0))
    x = torch.randn(3, 32).bfloat16()
    own = model(x)
    with fused_norms(model, on="cpu") as names:
        assert names == ["0"]
        assert torch.equal(model(x), own)


def test_norms_come_in_the_models_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a GPU, which is not here, would make float32 of them; so the kernel must not run under it."""
    model = nn.Sequential(OffsetRMSNorm(shift=0.0)).bfloat16()
    under: list[bool] = []
    kernel = F.rms_norm

    def rms_norm(*given: Any) -> torch.Tensor:
        under.append(torch.is_autocast_enabled("cpu"))
        return kernel(*given)

    monkeypatch.setattr(F, "rms_norm", rms_norm)
    with fused_norms(model, on="cpu"), torch.autocast("cpu", dtype=torch.bfloat16):
        under.clear()
        assert model(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert under == [False]


def test_only_norms_on_the_device_that_is_named_are_replaced() -> None:
    model = tiny("llama")
    with fused_norms(model, on="cuda") as names:
        assert names == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_changes(architecture: str) -> None:
    model, ids = tiny(architecture), token_ids(2, 9)
    own = model(input_ids=ids).logits.detach()
    with fused_norms(model, on="cpu"):
        torch.testing.assert_close(model(input_ids=ids).logits.detach(), own, rtol=1e-4, atol=1e-5)


def test_a_large_run_has_them_until_its_closed_form_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (way, recompute):
        monkeypatch.setattr(module, "fits_whole", lambda *_: False)
    model, ids = tiny("llama"), token_ids(6, 12)
    method = make_method("soco", options={"steps": 0, "coupling": "none", "newton": 1})
    own = compress_model(model, method, 0.6, ids)
    seen, step = [], large.measure_blocks

    def measured(given: nn.Module, *rest: object, **named: object) -> None:
        seen.append(sum("forward" in vars(module) for module in given.modules()))
        step(given, *rest, **named)

    monkeypatch.setattr(large, "fused_norms", partial(fused_norms, on="cpu"))
    monkeypatch.setattr(large, "measure_blocks", measured)
    fused = compress_model(model, method, 0.6, ids)
    assert seen == [len(norms_of(model))] * 2  # the dense model, and the student of the second measurement
    assert not any("forward" in vars(m) for result in (model, fused.model) for m in result.modules())
    assert fused.plan.targets == own.plan.targets
    torch.testing.assert_close(fused.model(input_ids=ids).logits, own.model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
