"""Llama models of any size with random weights whose spectra fall, built on the device; and what they cost at least."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from spectrim.models.walk import Walk, find_layers

MATRIX_RATE = 790e12
"""Operations a second of one H200 in bf16, measured with large square products."""


class Shape(NamedTuple):
    """What decides the cost of a model; the default is Llama 2 7B."""

    width: int = 4096
    inner: int = 11008
    depth: int = 32
    vocabulary: int = 32_000

    @property
    def heads(self) -> int:
        return max(1, self.width // 128)


QUICK = Shape(128, 352, 3, 512)


def build(shape: Shape, device: torch.device, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """The model; every linear weight is a product `(A * k^-1/2) B` scaled to entries of 0.02."""
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        max_position_embeddings=4096, dtype=dtype,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            elif id(parameter) in linears:
                parameter.copy_(falling(*parameter.shape, generator).to(dtype))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * 0.02)
    return model.eval()


def falling(outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    """A full-rank matrix (O, I) whose singular values fall, float32."""
    rank, device = min(outputs, inputs), generator.device
    left = torch.randn(outputs, rank, generator=generator, device=device)
    right = torch.randn(rank, inputs, generator=generator, device=device)
    weights = torch.arange(1, rank + 1, device=device) ** -0.5
    product = (left * weights) @ right
    return product * (0.02 / product.square().mean().sqrt())


def forward_operations(model: PreTrainedModel, tokens: int, length: int) -> float:
    """Of one forward pass: all linear layers, and attention over windows of `length` (half of it is masked)."""
    numbers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    config = model.config
    attention = 2.0 * tokens * length * config.hidden_size * config.num_hidden_layers
    return 2.0 * numbers * tokens + attention


def gram_operations(walk: Walk, tokens: int, gradient_tokens: int) -> float:
    """Of the upper triangles of all statistics of a two-sided metric, inputs that layers share counted once."""
    shared = {(la.block, la.inputs, la.name.rpartition(".")[0] if "o_proj" not in la.name else la.name): la.inputs
              for la in walk.layers}  # fmt: skip
    return tokens * sum(n**2 for n in shared.values()) + gradient_tokens * sum(la.outputs**2 for la in walk.layers)


def walk_of(model: PreTrainedModel) -> Walk:
    """Its target layers."""
    return find_layers(model)
