"""Perplexity, KL divergence and top-1 agreement of a language model on fixed windows.

Windows do not overlap (stride = window); the first token of each is not scored. KL is E[KL(dense || model)] in nats
a token over all scored positions; agreement is the share of positions where both put the same token first.

Intervals (95 %) take the windows as what was drawn, since tokens of one window depend on each other: the mean of their
means and its standard error. That of the perplexity says how it would move on other windows of the same text, which
both models share; what a compression costs is known far better, by `excess`, the paired difference of the logarithms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.measure import autocast, frozen
from spectrim.errors import NumericalError
from spectrim.evaluate.intervals import Interval, of_mean
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
    excess: float | None = None
    """Log perplexity above that of the dense model, nats a token."""
    perplexity_interval: Interval | None = None
    kl_interval: Interval | None = None
    agreement_interval: Interval | None = None
    excess_interval: Interval | None = None


WINDOWS = 16
"""Windows of up to 512 tokens in a batch."""
BOUNDS: tuple[dict[str, float], ...] = ({"least": 0.0}, {}, {"least": 0.0}, {"least": 0.0, "most": 1.0})
"""What the means of loss, excess, KL and agreement cannot leave."""


def evaluate(
    model: PreTrainedModel, ids: Tensor, *, dense: PreTrainedModel | None = None, batch_size: int = WINDOWS
) -> Quality:
    """Quality over `ids` (windows, length); `dense` is the model before compression. Batches shrink as memory does.

    `batch_size` is of windows of up to 512 tokens; of longer ones there are fewer in a batch. Several processes share
    the windows, and all return the same.
    """
    share = present().share_of(len(ids))
    size = max(1, batch_size * 512 // max(512, ids.shape[1]))
    own = Batch(size).run("evaluate", lambda size: _sums(model, ids[share], dense, size))
    sums = torch.zeros(len(own), len(ids), dtype=torch.float64)
    sums[:, share] = own
    return quality_from(present().sum_everywhere(sums), ids.shape[1])


@torch.no_grad()
def _sums(model: PreTrainedModel, ids: Tensor, dense: PreTrainedModel | None, batch_size: int) -> Tensor:
    """What `quality_from` is made from, over any number of windows (none, where there are fewer than processes)."""
    device = device_of(model)
    parts = [torch.zeros(1 if dense is None else 4, 0, dtype=torch.float64)]
    with frozen(model), autocast(device):
        for batch in ids.split(batch_size) if len(ids) else ():
            batch = batch.to(device)
            log_p = next_token_log_probabilities(model, batch)
            log_q = None
            if dense is not None:
                with frozen(dense):
                    log_q = next_token_log_probabilities(dense, batch)
            parts.append(sums_of_batch(batch, log_p, log_q))
    return torch.cat(parts, 1)


def sums_of_batch(batch: Tensor, log_p: Tensor, log_q: Tensor | None = None) -> Tensor:
    """What `quality_from` is made from (1 or 4, B), float64 on the CPU, of windows (B, S).

    `log_p` (B, S-1, V) are the model's log probabilities of each next token, `log_q` those of the dense model.
    """
    own = [-_of_text(log_p, batch)]
    if log_q is not None:
        own.append(own[0] + _of_text(log_q, batch))
        own.append((log_q.exp() * (log_q - log_p)).double().sum((1, 2)))
        own.append((log_q.argmax(-1) == log_p.argmax(-1)).double().sum(1))
    return torch.stack(own).cpu()


def _of_text(log_p: Tensor, batch: Tensor) -> Tensor:
    """Sum of log p (B,) of the text's own tokens, float64."""
    return log_p.gather(-1, batch[:, 1:, None]).double().sum((1, 2))


def quality_from(sums: Tensor, window: int) -> Quality:
    """From sums over each window (1 or 4, windows): loss; loss above the dense model's, KL, tokens put first alike."""
    count = sums.shape[1] * (window - 1)
    totals = [float(total) / count for total in sums.sum(1)]
    if not math.isfinite(totals[0]):
        raise NumericalError(
            f"the model's loss on the evaluation text is {totals[0]}: its logits are not finite; none may be NaN or "
            "Inf. Check its weights; what was made in bfloat16 or float32 can overflow in float16"
        )
    intervals = [of_mean((own / (window - 1)).tolist(), **bounds) for own, bounds in zip(sums, BOUNDS, strict=False)]
    loss = intervals[0]
    beside = {} if len(totals) == 1 else {
        **dict(zip(("excess", "kl", "agreement"), totals[1:], strict=True)),
        **dict(zip(("excess_interval", "kl_interval", "agreement_interval"), intervals[1:], strict=True)),
    }  # fmt: skip
    return Quality(
        perplexity=_exp(totals[0]),
        tokens=count,
        window=window,
        perplexity_interval=None if loss is None else Interval(_exp(loss.low), _exp(loss.high)),
        **beside,
    )


def _exp(loss: float) -> float:
    """A perplexity, however large the loss."""
    return math.exp(min(loss, 700.0))


def next_token_log_probabilities(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """log p (B, S-1, V) in float32 of each next token in `batch` (B, S)."""
    return model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
