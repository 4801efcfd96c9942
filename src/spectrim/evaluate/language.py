"""Perplexity, KL divergence and top-1 agreement of a language model on fixed windows.

Windows do not overlap (stride = window); the first token of each is not scored. KL is E[KL(dense || model)] in nats
a token over all scored positions; agreement is the share of positions where both put the same token first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.measure import autocast, frozen
from spectrim.errors import NumericalError
from spectrim.memory import Batch
from spectrim.models.walk import device_of
from spectrim.processes import present


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one model on one set of windows; the last two only where a dense model was given."""

    perplexity: float
    tokens: int
    window: int
    kl: float | None = None
    agreement: float | None = None


def evaluate(
    model: PreTrainedModel, ids: Tensor, *, dense: PreTrainedModel | None = None, batch_size: int = 16
) -> Quality:
    """Quality over `ids` (windows, length); `dense` is the model before compression. Batches shrink as memory does.

    Several processes share the windows and all return the same.
    """
    own = ids[present().share_of(len(ids))]
    sums = Batch(batch_size).run("evaluate", lambda size: _sums(model, own, dense, size))
    loss, divergence, same, count = present().sum_everywhere(sums).tolist()
    if not math.isfinite(loss):
        raise NumericalError(
            f"the model's loss on the evaluation text is {loss}: its logits are not finite; none may be NaN or Inf. "
            "Check its weights; what was made in bfloat16 or float32 can overflow in float16"
        )
    return Quality(
        perplexity=math.exp(min(loss / count, 700.0)),
        tokens=int(count),
        window=ids.shape[1],
        kl=None if dense is None else divergence / count,
        agreement=None if dense is None else same / count,
    )


@torch.no_grad()
def _sums(model: PreTrainedModel, ids: Tensor, dense: PreTrainedModel | None, batch_size: int) -> Tensor:
    """(4,) float64 over the windows: loss, divergence, positions that agree, positions."""
    device = device_of(model)
    loss = divergence = 0.0
    same = count = 0
    with frozen(model), autocast(device):
        for batch in ids.split(batch_size) if len(ids) else ():
            batch = batch.to(device)
            log_p = next_token_log_probabilities(model, batch)
            loss -= float(log_p.gather(-1, batch[:, 1:, None]).double().sum())
            count += batch[:, 1:].numel()
            if dense is not None:
                with frozen(dense):
                    log_q = next_token_log_probabilities(dense, batch)
                divergence += float((log_q.exp() * (log_q - log_p)).double().sum())
                same += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    return torch.tensor([loss, divergence, same, count], dtype=torch.float64)


def next_token_log_probabilities(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """log p (B, S-1, V) in float32 of each next token in `batch` (B, S)."""
    return model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
