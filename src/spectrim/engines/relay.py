"""A model's blocks run by hand, one after the other, with everything else of the model left to itself.

    enter   the model runs with blocks that hand on what they are given: the hidden states before block 0, and what
            every block is called with beside them (positions, masks)
    run     one block
    leave   the model runs with blocks that hand on, the last of which gives the hidden states: logits

Nothing of an architecture is assumed but that blocks are called in order, and with nothing that depends on the hidden
states but those; `check` compares with the model itself.
"""

from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.stream import Call, Stream, shared
from spectrim.errors import UsageError
from spectrim.models.walk import Walk, device_of

Act = Callable[[int, Tensor, Call], Tensor]
"""From a block's number, its hidden states and the rest of its arguments to what it gives on."""
Hold = Callable[[Iterable[Tensor]], MutableSequence[Tensor]]
"""Makes whatever holds hidden states: a list, or something that keeps them elsewhere (spill.py)."""
TOLERANCE = 1e-2
"""How far logits may be from those of the model, relative to the largest: rounding in bf16 only."""


class _Entered(Exception):
    """No error: the way out of the model once all blocks were called."""


class Relay:
    """The blocks of one model."""

    def __init__(self, model: PreTrainedModel, walk: Walk, gives_tuple: Sequence[bool] | None = None) -> None:
        """`gives_tuple` says of each block whether it gives a tuple, where that is known of another copy."""
        self.model = model
        self.blocks = [model.get_submodule(name) for name in walk.block_names]
        self.gives_tuple = [False] * len(self.blocks) if gives_tuple is None else list(gives_tuple)
        self.calls: dict[torch.Size, list[Call]] = {}
        self._logits: Tensor | None = None  # of the few tokens, where the model ran them as a whole
        if gives_tuple is None:
            self._learn_returns()

    def enter(self, batch: Tensor) -> tuple[Tensor, list[Call]]:
        """Hidden states before block 0 of tokens (B, S), and the call of every block."""
        first: list[Tensor] = []
        calls: list[Call] = []

        def act(block: int, hidden: Tensor, call: Call) -> Tensor:
            if block == 0:
                first.append(hidden)
            calls.append(call)
            if block + 1 == len(self.blocks):
                raise _Entered
            return hidden

        with self._acting(act), suppress(_Entered):
            self.model(input_ids=batch, use_cache=False)
        known = self.calls.setdefault(batch.shape, calls)
        return first[0], [shared(call, own) for call, own in zip(calls, known, strict=True)]

    def run(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        """What a block makes of its hidden states (B, S, E)."""
        rest, kwargs = call
        output = self.blocks[block](hidden, *rest, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def leave(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """Logits (B, S, V) from the hidden states after the last block."""

        def act(block: int, given: Tensor, _call: Call) -> Tensor:
            return hidden if block + 1 == len(self.blocks) else given

        with self._acting(act):
            return self.model(input_ids=batch, use_cache=False).logits

    @torch.no_grad()
    def check(self) -> None:
        """UsageError unless running block by block gives the model's own logits."""
        batch = self._few_tokens()
        hidden, calls = self.enter(batch)
        for block, call in enumerate(calls):
            hidden = self.run(block, hidden, call)
        own = (self.model(input_ids=batch, use_cache=False).logits if self._logits is None else self._logits).float()
        off = float((self.leave(batch, hidden).float() - own).abs().max() / own.abs().max().clamp(min=1e-30))
        if not off <= TOLERANCE:
            raise UsageError(
                f"{type(self.model).__name__}: block by block its logits are off by {off:.1e} (allowed {TOLERANCE:g}); "
                "its blocks hand each other more than hidden states. It can only be measured as a whole: use shorter "
                "windows (--calib-length) or a device with more memory"
            )

    def _few_tokens(self) -> Tensor:
        ids = torch.arange(8, device=device_of(self.model))[None]
        return ids % self.model.config.get_text_config().vocab_size

    @torch.no_grad()
    def _learn_returns(self) -> None:
        """Whether each block gives a tensor or a tuple, from running eight tokens."""

        def note(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.gives_tuple[index] = isinstance(output, tuple)

            return hook

        handles = [block.register_forward_hook(note(i)) for i, block in enumerate(self.blocks)]
        try:
            self._logits = self.model(input_ids=self._few_tokens(), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _acting(self, act: Act) -> Iterator[None]:
        """`act` in the place of every block's own forward."""

        def forward(index: int) -> Callable[..., Any]:
            def replaced(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                given = act(index, hidden, (args[1:], kwargs))
                return (given,) if self.gives_tuple[index] else given

            return replaced

        try:
            for index, block in enumerate(self.blocks):
                block.forward = forward(index)  # type: ignore[method-assign]  an attribute that hides the method
            yield
        finally:
            for block in self.blocks:
                del block.forward


@torch.no_grad()
def entered(
    model: PreTrainedModel, walk: Walk, ids: Tensor, batch_size: int, *, relay: Relay | None = None, hold: Hold = list
) -> Stream:
    """What `stream.start` gives for `ids` (windows, length), without running a block; nor does a known `relay`."""
    relay = Relay(model, walk) if relay is None else relay
    stream = Stream(model=model, blocks=relay.blocks, hidden=hold(()), arguments=[], passed=[])
    for batch in ids.split(batch_size):
        hidden, calls = relay.enter(batch.to(device_of(model)))
        stream.hidden.append(hidden)
        stream.arguments.append(calls)
        stream.passed.append(0)
    return stream
