"""Where the parts of a block stand in models built like Llama, for methods that use how they work together."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from spectrim.errors import UsageError
from spectrim.models.walk import Walk

READS_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READS_MLP = ("mlp.gate_proj", "mlp.up_proj")
WRITES = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Two RMSNorms a block, read by q, k, v and by gate, up; o and down write to the residual stream."""
HEAD_NORMS = ("qwen3",)
"""Those with an RMSNorm over each head's queries and keys."""


class Heads(NamedTuple):
    """Of an attention layer."""

    query: int
    key: int
    width: int


def heads_of(config: PretrainedConfig) -> Heads:
    """Counts and width, as the attention layers work them out."""
    told: Any = config
    width = getattr(config, "head_dim", None) or told.hidden_size // told.num_attention_heads
    return Heads(told.num_attention_heads, told.num_key_value_heads, width)


def require_llama_like(method: str, config: PretrainedConfig, walk: Walk, allowed: tuple[str, ...], why: str) -> None:
    """UsageError for a model of another kind, or one with linear layers beside those named here."""
    if config.model_type not in allowed:
        raise UsageError(
            f"method {method} works on {', '.join(allowed)}; this model is of type {config.model_type!r}: {why}. Take "
            "a method that treats layers one by one (soco, svd-llm, ...)"
        )
    known = {*READS_ATTENTION, *READS_MLP, *WRITES}
    prefixes = [name + "." for name in walk.block_names]
    for layer in walk.layers:
        if layer.name.removeprefix(prefixes[layer.block]) not in known:
            raise UsageError(f"method {method}: the model has a layer {layer.name}, which {allowed[0]} does not have")


def linear(block: nn.Module, path: str) -> nn.Linear:
    """A linear layer of a block."""
    return cast(nn.Linear, block.get_submodule(path))


def wide_weight(block: nn.Module, path: str) -> Tensor:
    """Its weight (O, I) in float64."""
    return linear(block, path).weight.detach().double()


def wide_bias(block: nn.Module, path: str) -> Tensor | None:
    """Its bias (O,) in float64, if any."""
    bias: Tensor | None = linear(block, path).bias
    return None if bias is None else bias.detach().double()


def plain(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """A linear layer with this weight (O, I) and bias (O,), in dtype and on device of `like`."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.to(like).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(like).contiguous(), requires_grad=False)
    return made


def norm_parameters(norm: nn.Module) -> tuple[Tensor, float]:
    """Gains (D,) in float64 and eps of an RMSNorm."""
    gain = norm.weight
    assert isinstance(gain, Tensor)
    eps: Any = norm.variance_epsilon
    return gain.detach().double(), float(eps)


def gains(value: float, width: int, like: Tensor) -> nn.Parameter:
    """Equal gains (width,)."""
    return nn.Parameter(torch.full((width,), value, dtype=like.dtype, device=like.device), requires_grad=False)
