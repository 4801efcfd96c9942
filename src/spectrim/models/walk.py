"""Finding the linear layers of a decoder by discovery, without a table of architectures.

The decoder is the `nn.ModuleList` that holds the most linear weights; every `nn.Linear` (or transformers' `Conv1D`, the
transposed layer of GPT-2) inside its blocks is a target. Everything else is named in `Walk.untouched` with the reason.
Layers that read the same tensor (q, k, v; gate, up) are found by running one short sequence and looking at which
inputs are the same object: their statistics are then measured once.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.errors import InputError, UsageError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One target layer: where it stands and what it looks like."""

    name: str  # module path, e.g. model.layers.0.self_attn.q_proj
    block: int
    outputs: int
    inputs: int
    has_bias: bool

    @property
    def weight_numbers(self) -> int:
        return self.outputs * self.inputs

    @property
    def numbers(self) -> int:
        """Stored numbers of the dense layer, bias included."""
        return self.weight_numbers + (self.outputs if self.has_bias else 0)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The targets of a model in order, its blocks, and what is left alone with the reason."""

    layers: tuple[Layer, ...]
    block_names: tuple[str, ...]
    untouched: tuple[tuple[str, int, str], ...]  # name, numbers, why

    @property
    def numbers(self) -> int:
        return sum(layer.numbers for layer in self.layers)


LINEAR_IN_ALL_BUT_NAME = frozenset({"FalconLinear"})
"""Subclasses of `nn.Linear` with a `forward` of their own that computes `x W^T + b` all the same."""


def is_linear(module: nn.Module) -> bool:
    """A plain linear layer whose weight can be replaced."""
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or module.weight.ndim != 2:
        return False
    # Routers of experts derive from nn.Linear and return choices (Llama 4, Phi-MoE): an overridden `forward` would be
    # lost with the module.
    kind = type(module)
    return kind.forward is nn.Linear.forward or kind.__name__ in LINEAR_IN_ALL_BUT_NAME


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer (or Conv1D, or low-rank layer, which have the same attributes) at a module path."""
    return cast(nn.Linear, model.get_submodule(name))


def path_in(present: Container[str], path: str, prefix: str) -> str | None:
    """The name that a listed module has in this model, None if it has none.

    A headless model (AutoModel) has no `model.` level in its paths; a wrapped one may have an extra level.
    """
    return next((n for n in (path, path.removeprefix(prefix + "."), f"{prefix}.{path}") if n in present), None)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model reads its tokens."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device


def weight_of(module: nn.Module) -> Tensor:
    """The weight as (O, I), also for Conv1D, which stores it transposed. A view, not a copy."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.mT if isinstance(module, Conv1D) else weight


def find_layers(model: PreTrainedModel) -> Walk:
    """All linear layers inside the decoder's blocks. Works on the meta device."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder; spectrim compresses decoders (causal language models)"
        )
    name, blocks = _decoder(model)
    layers: list[Layer] = []
    seen: dict[int, str] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules(prefix=f"{name}.{index}"):
            if not is_linear(module):
                continue
            if id(module.weight) in seen:
                raise InputError(
                    f"{path} shares its weight with {seen[id(module.weight)]}: shared weights cannot be replaced"
                )
            seen[id(module.weight)] = path
            layers.append(_describe(path, module, index))
    return Walk(
        layers=tuple(layers),
        block_names=tuple(f"{name}.{i}" for i in range(len(blocks))),
        untouched=tuple(_untouched(model, name, {layer.name for layer in layers})),
    )


def _describe(path: str, module: nn.Module, block: int) -> Layer:
    outputs, inputs = weight_of(module).shape
    return Layer(name=path, block=block, outputs=outputs, inputs=inputs, has_bias=module.bias is not None)


def _decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module list that holds the most linear weights (outermost on a tie)."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights = sum(weight_of(m).numel() for m in module.modules() if is_linear(m))
            if weights and (best is None or weights > best[0]):
                best = (weights, name, module)
    if best is None:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers; nothing to compress was found"
        )
    return best[1], best[2]


def _untouched(model: PreTrainedModel, decoder: str, targets: set[str]) -> Iterator[tuple[str, int, str]]:
    """Matrices that stay as they are, with the reason. Vectors (norms, biases) are not worth a line."""
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    for path, parameter in model.named_parameters():
        owner = path.rpartition(".")[0]
        if parameter.ndim < 2 or owner in targets:
            continue
        if parameter is embedding:
            why = "input embedding"
        elif not path.startswith(decoder + "."):
            why = "outside the decoder blocks"
        elif parameter.ndim == 3:
            why = "stacked experts (3-D parameter) are not supported yet"
        else:
            why = f"not a linear layer ({type(model.get_submodule(owner)).__name__})"
        yield path, parameter.numel(), why


def shared_inputs(model: PreTrainedModel, layers: tuple[Layer, ...]) -> list[list[str]]:
    """Names of layers grouped by the input tensor they read, found by running eight tokens through the model.

    Groups come in the order in which the model runs them, which is not always the one in which it defines them (Phi-3
    has o_proj before qkv_proj); layers that did not run come last, one by one.
    """
    reads: dict[str, tuple[Any, ...]] = {}
    alive: list[Tensor] = []  # an address is only an identity while the tensor lives

    def note(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            alive.append(inputs[0])
            reads.setdefault(name, (inputs[0].data_ptr(), inputs[0].shape, inputs[0].stride()))

        return hook

    handles = [model.get_submodule(la.name).register_forward_pre_hook(note(la.name)) for la in layers]
    _run_eight_tokens(model, handles)
    groups: dict[tuple[Any, ...], list[str]] = {key: [] for key in reads.values()}
    for layer in layers:
        groups.setdefault(reads.get(layer.name, (layer.name,)), []).append(layer.name)
    return list(groups.values())


def stream_readers(model: PreTrainedModel, layers: tuple[Layer, ...]) -> frozenset[str]:
    """Names of the layers that read the residual stream: their input is what a norm of the model puts out.

    Found like shared inputs, by running eight tokens (q, k, v, gate and up of a Llama; not o and down, whose inputs are
    made inside the block).
    """
    normed: set[int] = set()
    readers: set[str] = set()
    alive: list[Tensor] = []

    def note_norm(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            normed.add(output.data_ptr())

    def note_layer(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            alive.append(inputs[0])
            if inputs[0].data_ptr() in normed:
                readers.add(name)

        return hook

    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    handles = [module.register_forward_hook(note_norm) for module in norms]
    handles += [model.get_submodule(la.name).register_forward_pre_hook(note_layer(la.name)) for la in layers]
    _run_eight_tokens(model, handles)
    return frozenset(readers)


def _run_eight_tokens(model: PreTrainedModel, handles: list[RemovableHandle]) -> None:
    """For what the hooks see; they are removed."""
    try:
        with torch.no_grad():
            ids = torch.arange(8, device=device_of(model))[None]
            model(input_ids=ids % model.config.get_text_config().vocab_size, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
