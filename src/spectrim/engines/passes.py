"""How long a pass through one block of a model takes here, and what is behind the blocks: clocked, not reckoned.

A model of the same shapes with a single block and random weights is built on the device, and passed by as many tokens
as a run passes at a time (fewer where that would take long). Products, attention, what moves through memory and the
starting of kernels are all in it, in the proportions of this model on this machine. Of a block whose widths grow with
depth, and of models that mix blocks of several kinds, it says nothing: only the first block is built.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spectrim.engines.labels import loss_of_sampled_labels
from spectrim.engines.measure import autocast, frozen
from spectrim.engines.relay import Relay
from spectrim.engines.stream import Call
from spectrim.errors import UsageError
from spectrim.linalg.divergence import distillation_loss, mean_kl
from spectrim.machine import seconds_of
from spectrim.memory import holds_wide, is_out_of_memory, release
from spectrim.models.walk import Walk, find_layers

OPERATIONS = {"cpu": 5e9, "cuda": 2e13}
"""Of one forward pass through the block, at most: tenths of a second."""
ENTRIES = {"cpu": 2**24, "cuda": 2**28}
"""Logits at a time, at most."""
FEW_TOKENS = 48
"""As in the passes that compare samples: two prompts and what is said so far, in the middle."""
TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Seconds a token; `short` and `short_head` are seconds of one pass of few tokens."""

    tokens: int  # of the passes that were clocked
    block: float
    block_back: float  # there, and back to the hidden states
    block_trained: float  # and to the weights of all linear layers
    head: float  # embeddings, norm, logits
    head_back: float
    sampled: float  # labels drawn from logits, and the way back
    compared: float  # two models' logits, and the way back
    judged: float  # two models' logits
    short: float
    short_head: float


def clock_passes(
    config: PretrainedConfig, walk: Walk, device: torch.device, *, windows: int, length: int, numbers: int
) -> Passes | str:
    """The passes of `windows` of `length` tokens; in words, why there are none.

    `numbers` are those of the whole model, which decide the dtype that its weights are held in.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    weights = sum(layer.weight_numbers for layer in walk.layers if layer.block == 0)
    most = int(OPERATIONS[kind] / (2 * weights))
    if most < FEW_TOKENS:
        return f"one block has {weights:,} numbers, too many to be clocked in the time of a plan on this device"
    length = min(length, most)
    batch = max(1, min(windows, most // length))
    dtype = torch.float32 if holds_wide(device, numbers) else torch.bfloat16
    try:
        with torch.random.fork_rng(devices=[device] if kind == "cuda" else []):
            model = one_block(config, device, dtype)
            with frozen(model), autocast(device):
                return _Clock(model, device).all(batch, length, ENTRIES[kind])
    except UsageError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "there is no memory for one block and the vocabulary"
    finally:
        release()


def one_block(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with its first block alone and random weights; UsageError where there is no such model."""
    config = copy.deepcopy(config)
    told = config.get_text_config()
    told.num_hidden_layers = 1
    if isinstance(kinds := getattr(told, "layer_types", None), list):
        told.layer_types = kinds[:1]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # configs that name things for every layer fail in as many ways as there are models
        raise UsageError(f"a model of one block cannot be made ({type(error).__name__})") from error
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    model.tie_weights()
    return model.eval()


@dataclass
class _Clock:
    model: PreTrainedModel
    device: torch.device

    def all(self, batch: int, length: int, entries: int) -> Passes:
        relay = Relay(self.model, find_layers(self.model))
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (batch, length), device=self.device)
        hidden, calls = relay.enter(ids)
        block = partial(self.block, relay, hidden, calls[0])
        ahead = max(1, min(batch, entries // (length * vocabulary)))  # whose logits are made at once
        head = partial(self.head, relay, ids[:ahead], hidden[:ahead])
        few, (first, few_calls) = ids[:1, :FEW_TOKENS], relay.enter(ids[:1, :FEW_TOKENS])
        with torch.no_grad():
            logits = relay.leave(ids[:ahead], hidden[:ahead])
        back = self.seconds(partial(block, "hidden"))
        trained = self.seconds(partial(block, "weights"))
        tokens, made = batch * length, ahead * length
        return Passes(
            tokens=tokens,
            block=self.seconds(partial(block, "")) / tokens,
            block_back=back / tokens,
            block_trained=max(back, trained) / tokens,
            head=self.seconds(partial(head, back=False)) / made,
            head_back=self.seconds(partial(head, back=True)) / made,
            sampled=self.seconds(partial(self.sampled, logits)) / made,
            compared=self.seconds(partial(self.compared, logits)) / made,
            judged=self.seconds(partial(self.judged, logits)) / made,
            short=self.seconds(partial(self.block, relay, first, few_calls[0], "")),
            short_head=self.seconds(partial(self.head, relay, few, first, back=False)),
        )

    def seconds(self, work: Callable[[], object]) -> float:
        return seconds_of(work, self.device, tries=TRIES)

    def block(self, relay: Relay, hidden: Tensor, call: Call, back: str) -> None:
        """One block; with gradients of the hidden states, or of the weights too."""
        if not back:
            with torch.no_grad():
                relay.run(0, hidden, call)
            return
        given = hidden.detach().requires_grad_(True)
        linear = [weight for weight in relay.blocks[0].parameters() if weight.ndim == 2 and back == "weights"]
        for weight in linear:
            weight.requires_grad_(True)
        out = relay.run(0, given, call)
        torch.autograd.grad(out, [given, *linear], torch.ones_like(out), allow_unused=True)
        for weight in linear:
            weight.requires_grad_(False)

    def head(self, relay: Relay, ids: Tensor, hidden: Tensor, *, back: bool) -> None:
        """What is behind the blocks, and the way back to them."""
        with torch.set_grad_enabled(back):
            given = hidden.detach().requires_grad_(back)
            logits = relay.leave(ids, given)
            if back:
                torch.autograd.grad(logits, given, torch.ones_like(logits))

    def sampled(self, logits: Tensor) -> None:
        given = logits.detach().requires_grad_(True)
        generator = torch.Generator(device=self.device).manual_seed(0)
        torch.autograd.grad(loss_of_sampled_labels(given, generator), given)

    def compared(self, logits: Tensor) -> None:
        given = logits.detach().requires_grad_(True)
        torch.autograd.grad(distillation_loss(given, logits), given)

    def judged(self, logits: Tensor) -> None:
        with torch.no_grad():
            mean_kl(logits, logits)


def facts_of(passes: Passes | None) -> dict[str, float] | None:
    """JSON-ready."""
    return None if passes is None else dataclasses.asdict(passes)
