"""The figures of language.py for two models of which one block at a time is in memory.

All windows pass a block of the dense model before the next one is read, then those of the compressed one; distributions
are compared batch by batch from the last states of both. The numbers are those of language.py.
"""

from collections.abc import Callable, Iterable, MutableSequence

import torch
from torch import Tensor

from spectrim.engines.measure import autocast, frozen
from spectrim.engines.relay import Hold, Relay
from spectrim.evaluate.language import WINDOWS, Quality, quality_from, sums_of_batch
from spectrim.memory import Batch
from spectrim.models.walk import device_of

Pair = tuple[Quality, Quality]


def evaluate_streamed(
    dense: Relay, small: Relay, ids: Tensor, *, hold: Hold = list, after: Callable[[], None] = lambda: None
) -> Pair:
    """Quality of the dense and of the compressed model over `ids` (windows, length).

    `after` is called when the windows are through the dense model, whose last block may then be let go.
    """
    size = max(1, WINDOWS * 512 // max(512, ids.shape[1]))

    def work(size: int) -> tuple[Tensor, Tensor]:
        return _sums(dense, small, ids, size, hold, after)

    alone, both = Batch(size).run("evaluate", work, most=len(ids))
    return quality_from(alone, ids.shape[1]), quality_from(both, ids.shape[1])


@torch.no_grad()
def _sums(
    dense: Relay, small: Relay, ids: Tensor, size: int, hold: Hold, after: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    device = device_of(dense.model)
    batches = [batch.to(device) for batch in ids.split(size)]
    with frozen(dense.model), frozen(small.model), autocast(device):
        wanted = _passed(dense, batches, hold)
        after()
        found = _passed(small, batches, hold)
        alone, both = [], []
        for i, batch in enumerate(batches):
            log_q = _next_token(dense, batch, wanted[i])
            alone.append(sums_of_batch(batch, log_q))
            both.append(sums_of_batch(batch, _next_token(small, batch, found[i]), log_q))
    return torch.cat(alone, 1), torch.cat(both, 1)


def _passed(relay: Relay, batches: Iterable[Tensor], hold: Hold) -> MutableSequence[Tensor]:
    """Hidden states behind the last block."""
    states, calls = hold(()), []
    for batch in batches:
        first, own = relay.enter(batch)
        states.append(first)
        calls.append(own)
    for block in range(len(relay.blocks)):
        for i, own in enumerate(calls):
            states[i] = relay.run(block, states[i], own[block])
    return states


def _next_token(relay: Relay, batch: Tensor, hidden: Tensor) -> Tensor:
    """log p (B, S-1, V) in float32 of each next token."""
    return relay.leave(batch, hidden)[:, :-1].float().log_softmax(-1)
