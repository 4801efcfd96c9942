"""Does a model repeat itself? The share of 4-grams of its greedy continuations that were there before.

    repetition = 1 - different n-grams / all n-grams        of one continuation; then the mean over continuations

(`rep-n` of Welleck et al. 2019, arXiv 1908.04319.) A degenerate model loops: 0.9 and more. Perplexity does not see it,
since it never reads what the model wrote itself. Small models loop under greedy decoding whether compressed or not, so
only the difference to the dense model of the same run means anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.measure import autocast, frozen
from spectrim.errors import UsageError
from spectrim.evaluate.intervals import Interval, of_mean
from spectrim.evaluate.room import within_context
from spectrim.models.walk import device_of

NGRAM = 4


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Mean share over continuations, and its 95 % interval (None for a single one)."""

    share: float
    interval: Interval | None
    continuations: int
    tokens: int


def repeated_share(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of one sequence that occur earlier in it; 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def repetition(model: PreTrainedModel, prompts: Tensor, *, tokens: int = 64, batch_size: int = 16) -> Repetition | None:
    """Of greedy continuations of `prompts` (N, S), each `tokens` long; what follows an end token does not count.

    Of shorter prompts and continuations where the model reads no more at once; None where no n-gram would fit.
    """
    if tokens < NGRAM:
        raise UsageError(f"repetition needs at least {NGRAM} tokens to a continuation, got {tokens}")
    length, tokens = within_context(model.config, prompts.shape[1], tokens)
    if tokens < NGRAM:
        return None
    prompts = prompts[:, :length]
    device, shares = device_of(model), []
    end = ends_of(model)
    with frozen(model), autocast(device):
        for batch in prompts.split(batch_size):
            given = batch.to(device)
            out = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False,
                pad_token_id=min(end, default=0),
            )  # fmt: skip  # pyright: ignore
            for written in out[:, given.shape[1] :].tolist():
                stop = next((i for i, token in enumerate(written) if token in end), len(written))
                shares.append(repeated_share(written[:stop]))
    return Repetition(
        share=sum(shares) / len(shares), interval=of_mean(shares, least=0.0, most=1.0), continuations=len(shares),
        tokens=tokens,
    )  # fmt: skip


def ends_of(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text."""
    config = model.generation_config
    end = None if config is None else config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)
