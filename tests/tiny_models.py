"""Random models of two blocks, one for each architecture that the tests cover; vocabulary 64, width 32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

VOCABULARY, WIDTH, INNER = 64, 32, 48

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": INNER, "num_key_value_heads": 2, "initializer_range": 0.15}
_ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GATED, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-gqa-bias": ("LlamaConfig", {**_GATED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_GATED, "head_dim": 8, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_GATED, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GATED, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": INNER, "word_embed_proj_dim": 16, "init_std": 0.15}),
    "gpt-neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": INNER, "initializer_range": 0.15}),
    "gpt2": ("GPT2Config", {**_COMMON, "n_inner": INNER, "initializer_range": 0.15}),
    "phi3": ("Phi3Config", {**_GATED}),
    "falcon": ("FalconConfig", {**_COMMON, "ffn_hidden_size": INNER, "initializer_range": 0.15}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_GATED, **_ROUTED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "mixtral": ("MixtralConfig", {**_GATED, **_ROUTED, "num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", {**_GATED, **_ROUTED, "num_local_experts": 4}),
}


def tiny(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode; biases and norms are random too, so that losing one shows."""
    kind, values = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**values, **changes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(windows: int = 8, length: int = 16, *, seed: int = 1) -> Tensor:
    """Random token ids (windows, length)."""
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits without a cache."""
    return model(input_ids=ids, use_cache=False).logits


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that compressing must leave alone: tensors (copied), flags, module types, hooks."""
    return {
        "tensors": {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad is None for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "types": {name: type(m) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "config": model.config.to_dict() if isinstance(model, PreTrainedModel) else None,
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Bit for bit."""
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key


@contextmanager
def transformers_alone() -> Iterator[None]:
    """As in a process that never imported spectrim: transformers does not know its format."""
    with mock.patch.dict(AUTO_QUANTIZER_MAPPING), mock.patch.dict(AUTO_QUANTIZATION_CONFIG_MAPPING):
        del AUTO_QUANTIZER_MAPPING["spectrim"], AUTO_QUANTIZATION_CONFIG_MAPPING["spectrim"]
        yield
