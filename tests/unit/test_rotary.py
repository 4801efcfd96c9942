"""Rotations as one kernel are the models' own steps, there and back, and only where they are.

Without a CUDA device the kernel runs in Triton's interpreter (`make kernels`), which has no bfloat16; where it must not
run is tested without Triton.
"""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig
from transformers.models.llama import modeling_llama

from spectrim.engines import large, recompute, rotary, way
from spectrim.engines.pipeline import compress_model
from spectrim.engines.rotary import NAME, fused_rotary
from spectrim.nn.kernels.launch import missing
from spectrim.nn.rotary import rotated, rotated_in_torch, suits
from spectrim.registry import make_method
from tiny_models import logits_of, tiny, token_ids

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
OWN = modeling_llama.apply_rotary_pos_emb


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def as_attention_has_it(seed: int, batch: int, heads: int, length: int, size: int, dtype: torch.dtype) -> Tensor:
    """(B, H, S, D), in memory (B, S, H, D)."""
    return normal(seed, batch, length, heads, size, dtype=dtype).transpose(1, 2)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "length", "size", "angles"), [(2, 3, 5, 32, 1), (2, 4, 7, 24, 2), (1, 1, 1, 2, 1)]
)
def test_the_kernel_gives_the_numbers_of_single_steps_there_and_back(
    dtype: torch.dtype, batch: int, heads: int, length: int, size: int, angles: int
) -> None:
    x = as_attention_has_it(0, batch, heads, length, size, dtype).requires_grad_(True)
    cos, sin = (normal(seed, angles, length, size, dtype=dtype) for seed in (1, 2))
    found = []
    for function in (rotated_in_torch, rotated):
        y = function(x, cos, sin)
        found.append((y.detach(), *torch.autograd.grad(y, x, normal(3, *y.shape, dtype=dtype))))
    assert found[0][0].stride() == found[1][0].stride()
    for wanted, made in zip(*found, strict=True):
        assert torch.equal(made, wanted)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_for_a_gpu_no_product_goes_unrounded_into_a_sum(dtype: torch.dtype) -> None:
    """At the size of a 7B model's heads: results up to about 8, of which an fma changes some thousands."""
    x = as_attention_has_it(0, 2, 32, 2048, 128, dtype).requires_grad_(True)
    angles = torch.outer(torch.arange(2048.0), 1e4 ** -(torch.arange(0, 128, 2) / 128)).repeat(1, 2)[None]
    cos, sin = (part.to(DEVICE, dtype) for part in (angles.cos(), angles.sin()))
    up = normal(1, *x.shape, dtype=dtype)
    wanted, made = rotated_in_torch(x, cos, sin), rotated(x, cos, sin)
    assert torch.equal(made, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, up)[0] for y in (made, wanted)))


@needs_triton
def test_other_strides_and_a_gradient_that_is_one_number() -> None:
    packed = normal(0, 2, 5, 3, 3 * 8)
    x = packed[..., 8:16].transpose(1, 2).requires_grad_(True)  # k of a fused q, k, v
    cos, sin = (normal(seed, 1, 5, 8) for seed in (1, 2))
    (wanted,) = torch.autograd.grad(rotated_in_torch(x, cos, sin).sum(), x)
    (found,) = torch.autograd.grad(rotated(x, cos, sin).sum(), x)
    torch.testing.assert_close(found, wanted)


def test_the_oracle_is_the_models_function() -> None:
    q, k = as_attention_has_it(0, 2, 4, 5, 8, torch.float32), as_attention_has_it(1, 2, 2, 5, 8, torch.float32)
    cos, sin = (normal(seed, 1, 5, 8) for seed in (2, 3))
    for wanted, x in zip(OWN(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(rotated_in_torch(x, cos, sin), wanted)


def test_what_the_kernel_has_no_form_for() -> None:
    x, cos = normal(0, 2, 3, 5, 8), normal(1, 1, 5, 8)
    assert suits(x, cos, cos)
    assert not suits(x[0], cos, cos)
    assert not suits(x, cos[..., :6], cos[..., :6])  # part of each head
    assert not suits(x, cos[:, :4], cos[:, :4])
    assert not suits(x, cos, cos[..., :6])
    assert not suits(x, cos.expand(3, 5, 8), cos.expand(3, 5, 8))
    assert not suits(x.half(), cos, cos)
    assert not suits(x, cos.clone().requires_grad_(True), cos)
    assert not suits(x.transpose(-1, -2).contiguous().transpose(-1, -2), cos, cos)
    assert not suits(x[..., :7], cos[..., :7], cos[..., :7])
    assert not suits(x.double(), cos.double(), cos.double())


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The kernel's place is taken by its oracle, which notes what it is given: what is tested is who calls it."""
    seen: list[torch.Size] = []

    def noted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen.append(x.shape)
        return rotated_in_torch(x, cos, sin)

    monkeypatch.setattr(rotary, "missing", lambda: None)
    monkeypatch.setattr(rotary, "rotated", noted)
    return seen


@pytest.mark.parametrize(
    ("architecture", "used"),
    [("llama-gqa-bias", True), ("qwen3", True), ("phi3", True), ("gemma3", True), ("gpt-neox", False), ("gpt2", False)],
)
def test_models_give_the_same_and_are_themselves_again(
    architecture: str, used: bool, in_torch: list[torch.Size]
) -> None:
    model, ids = tiny(architecture), token_ids(2, 9)
    own = logits_of(model, ids)
    with fused_rotary(model, on="cpu") as names:
        in_torch.clear()
        fused = [logits_of(m, ids) for m in (model, copy.deepcopy(model))]
        assert bool(in_torch) == used
        assert all("modeling" in name for name in names)
    assert all(torch.equal(logits, own) for logits in fused)
    in_torch.clear()
    assert torch.equal(logits_of(model, ids), own)
    assert not in_torch


def test_pairs_of_neighbours_keep_their_own_steps(in_torch: list[torch.Size]) -> None:
    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with fused_rotary(AutoModelForCausalLM.from_config(config), on="cpu") as names:
        assert names == []


def test_what_is_no_function_of_queries_keys_and_angles_is_left_alone(
    in_torch: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")

    def other_order(q: Tensor, k: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
        return OWN(q, k, cos, sin)

    def with_sections(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: list[int]) -> tuple[Tensor, Tensor]:
        return OWN(q, k, cos, sin)

    def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return OWN(q, k, cos * 1.01, sin)

    def keys_alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q, OWN(q, k, cos, sin)[1]

    def back_otherwise(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return OWN(q.detach() + (q - q.detach()) * 0.5, k, cos, sin)

    for function in (other_order, with_sections, scaled, keys_alone, back_otherwise):
        monkeypatch.setattr(modeling_llama, NAME, function)
        with fused_rotary(model, on="cpu") as names:
            assert names == [], function.__name__
        assert getattr(modeling_llama, NAME) is function


def test_calls_of_another_kind_go_the_models_own_way(in_torch: list[torch.Size]) -> None:
    model = tiny("llama")
    q, cos = as_attention_has_it(0, 2, 4, 5, 8, torch.float32), normal(1, 1, 5, 8)
    with fused_rotary(model, on="cpu") as names:
        assert names == ["transformers.models.llama.modeling_llama"]
        in_torch.clear()
        turned = modeling_llama.apply_rotary_pos_emb
        turned(q, q, cos, cos, unsqueeze_dim=1)
        turned(q.transpose(1, 2), q.transpose(1, 2), cos, cos, 2)
        turned(q.half(), q.half(), cos.half(), cos.half())
        turned(q, q, cos.double(), cos.double())
        assert not in_torch
        turned(q, q[:, :2], cos, cos)
    assert in_torch == [q.shape, q[:, :2].shape]


def test_only_models_on_the_device_that_is_named_and_only_with_triton(
    in_torch: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fused_rotary(tiny("llama"), on="cuda") as names:
        assert names == []
    monkeypatch.setattr(rotary, "missing", lambda: "triton is not installed")
    with fused_rotary(tiny("llama"), on="cpu") as names:
        assert names == []
    assert modeling_llama.apply_rotary_pos_emb is OWN


def test_the_models_function_is_back_after_an_error(in_torch: list[torch.Size]) -> None:
    def stopped() -> None:
        with fused_rotary(tiny("llama"), on="cpu"):
            assert modeling_llama.apply_rotary_pos_emb is not OWN
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert modeling_llama.apply_rotary_pos_emb is OWN


def test_a_large_run_has_them_until_its_closed_form_is_done(
    in_torch: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (way, recompute):
        monkeypatch.setattr(module, "fits_whole", lambda *_: False)
    model, ids = tiny("llama"), token_ids(6, 12)
    method = make_method("soco", options={"steps": 0, "coupling": "none", "newton": 1})
    own = compress_model(model, method, 0.6, ids)
    assert not in_torch
    monkeypatch.setattr(large, "fused_rotary", partial(fused_rotary, on="cpu"))
    fused = compress_model(model, method, 0.6, ids)
    assert in_torch
    assert modeling_llama.apply_rotary_pos_emb is OWN
    assert fused.plan == own.plan
    layers: list[nn.Module] = [fused.model, own.model]
    assert torch.equal(*(logits_of(made, ids) for made in layers))


@needs_triton
def test_a_model_with_the_kernel() -> None:
    model, ids = tiny("llama-gqa-bias").to(DEVICE), token_ids(2, 9).to(DEVICE)
    own = logits_of(model, ids)
    with fused_rotary(model, on=DEVICE) as names:
        assert names == ["transformers.models.llama.modeling_llama"]
        torch.testing.assert_close(logits_of(model, ids), own, rtol=1e-4, atol=1e-5)
