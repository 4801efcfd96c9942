"""Training steps of models whose activations do not fit: each block is passed again on the way back.

One more forward pass, against holding what every layer of every block saves; and layers that form their weight in the
forward pass (nn/scored.py) then hold it for one block at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spectrim.memory import fits_whole
from spectrim.models.walk import Walk, device_of


def step_bytes(walk: Walk, tokens: int) -> int:
    """Roughly what a step over so many tokens saves for its way back: inputs and outputs of the layers with what lies
    between them in 16 bits, and for each weight that is formed twice its numbers in 32.
    """
    return 2 * tokens * sum(3 * la.outputs + la.inputs for la in walk.layers) + 8 * walk.numbers


def recomputes(model: PreTrainedModel, walk: Walk, tokens: int) -> bool:
    """Whether a step over so many tokens has to be recomputed block by block on this device."""
    return not fits_whole(device_of(model), step_bytes(walk, tokens))


@contextmanager
def recomputed(model: PreTrainedModel, walk: Walk, *, wanted: bool = True) -> Iterator[None]:
    """Blocks save their inputs alone, where gradients are on and it is `wanted`. Needs a model without dropout."""

    def again(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return own(*args, **kwargs)
            return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return forward

    with ExitStack() as stack:
        for name in walk.block_names if wanted else ():
            stack.enter_context(forward_instead(model.get_submodule(name), again))
        yield


@contextmanager
def forward_instead(module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, a module runs what `around` makes of its forward; then again what it ran before."""
    before = module.__dict__.get("forward")
    module.forward = around(module.forward)  # type: ignore[method-assign]  an attribute that hides the method
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]  as above
