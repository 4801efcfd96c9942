"""log p(continuation | context) of many pairs, in batches.

Tokens are split as lm-evaluation-harness splits them: spaces that end the context move to the continuation, the whole
is encoded, and what lies beyond the context's own tokens is the continuation; no special tokens are added, except that
an empty context becomes the BOS token (EOS where there is none). Sequences longer than the model reads lose tokens on
the left. Padding is on the right, where a causal model does not see it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.data.tasks import Query, Task
from spectrim.engines.measure import autocast, frozen
from spectrim.errors import InputError, NumericalError
from spectrim.memory import Batch
from spectrim.models.walk import device_of

BATCH_TOKENS = 8192


class Encoded(NamedTuple):
    """Tokens of context and continuation; the last `num_scored` are the continuation's."""

    ids: tuple[int, ...]
    num_scored: int
    truncated: bool


class Score(NamedTuple):
    """Sum of log p in nats over the continuation, and the token that the model puts first at each of its places."""

    log_p: float
    top: tuple[int, ...]
    greedy: bool  # `top` is the continuation


def encode_task(tokenizer: PreTrainedTokenizerBase, task: Task, *, limit: int | None) -> list[list[Encoded]]:
    """Every item's pairs as tokens, cut on the left to what a model reads that takes `limit` tokens."""
    moved = [[move_spaces(query) for query in item.queries] for item in task.items]
    flat = [query for queries in moved for query in queries]
    contexts = _encode(tokenizer, list({query.context: None for query in flat}))
    wholes = _encode(tokenizer, list({query.context + query.continuation: None for query in flat}))
    prefix: list[int] = []
    if any(not contexts[query.context] for query in flat):
        prefix = _prefix(tokenizer, task)
    encoded: list[list[Encoded]] = []
    for item, queries in zip(task.items, moved, strict=True):
        encoded.append([])
        for query in queries:
            context = contexts[query.context]
            continuation = wholes[query.context + query.continuation][len(context) :]
            where = f"{task.path}, line {item.line}: {query.continuation[:40]!r}"
            encoded[-1].append(_join(context or prefix, continuation, limit, where))
    return encoded


def move_spaces(query: Query) -> Query:
    """White space at the end of the context opens the continuation instead: tokens begin with it, not end."""
    kept = query.context.rstrip()
    return Query(kept, query.context[len(kept) :] + query.continuation)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, list[int]]:
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return dict(zip(texts, ids, strict=True))  # type: ignore[arg-type]


def _prefix(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return [token]
    raise InputError(
        f"{task.path}: {task.format} items without a context need a first token to follow, and the tokenizer "
        "has neither a BOS nor an EOS token; give --tokenizer with one, or leave this task out"
    )


def _join(context: list[int], continuation: list[int], limit: int | None, where: str) -> Encoded:
    if not continuation:
        raise InputError(f"{where} adds no token to its context; the tokenizer merges or drops it, remove the item")
    if limit is not None and len(continuation) > limit:
        raise InputError(f"{where}...: {len(continuation)} tokens, the model reads {limit}; remove the item")
    ids = context + continuation
    kept = ids if limit is None else ids[-(limit + 1) :]  # the last token is only predicted, never read
    return Encoded(tuple(kept), len(continuation), len(kept) < len(ids))


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most `batch_tokens` with padding (or one item)."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > batch_tokens:
            found.append([])
        found[-1].append(i)
    return found


@torch.no_grad()
def score(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """One score for each pair, in the given order."""
    scores: list[Score | None] = [None] * len(encoded)
    done = 0
    with frozen(model), autocast(device_of(model)):
        for chosen in batches([len(one.ids) for one in encoded], batch_tokens):
            found = Batch(len(chosen)).run("tasks", partial(_score_in_parts, model, [encoded[i] for i in chosen]))
            for i, one in zip(chosen, found, strict=True):
                scores[i] = one
            done += len(chosen)
            if progress is not None:
                progress(done, len(encoded))
    return [one for one in scores if one is not None]


def _score_in_parts(model: PreTrainedModel, batch: list[Encoded], size: int) -> list[Score]:
    device = device_of(model)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    return [one for part in parts for one in _score_batch(model, part, device)]


def _score_batch(model: PreTrainedModel, batch: list[Encoded], device: torch.device) -> list[Score]:
    rows = [row for row, one in enumerate(batch) for _ in range(one.num_scored)]
    # Token t is predicted from the logits at t - 1.
    places = [t - 1 for one in batch for t in range(len(one.ids) - one.num_scored, len(one.ids))]
    targets = torch.tensor([t for one in batch for t in one.ids[-one.num_scored :]], device=device)
    logits = model(input_ids=_padded(batch).to(device), use_cache=False).logits
    log_p = logits[torch.tensor(rows, device=device), torch.tensor(places, device=device)].float().log_softmax(-1)
    found = log_p.gather(-1, targets[:, None])[:, 0].cpu().double()
    if not torch.isfinite(found).all():
        raise NumericalError("log p of a task's continuation is not finite: the model's logits are not; is it damaged?")
    top = log_p.argmax(-1).tolist()
    scores, start = [], 0
    for one in batch:
        part = slice(start, start := start + one.num_scored)
        tokens = tuple(top[part])
        scores.append(Score(float(found[part].sum()), tokens, tokens == one.ids[-one.num_scored :]))
    return scores


def _padded(batch: list[Encoded]) -> Tensor:
    """Input ids (B, S) without the last token of each; right of that comes token 0, which nothing before it sees."""
    width = max(len(one.ids) for one in batch) - 1
    return torch.tensor([[*one.ids[:-1], *[0] * (width - len(one.ids) + 1)] for one in batch])
