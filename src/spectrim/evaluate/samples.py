"""What two models say: greedy continuations of the same prompts, the dense model's beside the compressed one's.

Plain greedy decoding without a cache, so that neither a model's generation settings nor its cache decide what is
shown; prompts are the beginnings of evaluation windows, which no step of the run has seen.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.engines.measure import autocast, frozen
from spectrim.evaluate.room import within_context
from spectrim.models.walk import device_of

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 24, 32


def compare_samples(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    ids: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompts: int = PROMPTS,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    warnings: list[str] | None = None,
) -> list[dict[str, Any]]:
    """JSON-ready: prompt, both continuations, and for how many tokens they are the same.

    No more tokens than the model reads at once; none at all where those are too few, which `warnings` is told.

    `ids` (windows, length) are evaluation windows; the prompts are the beginnings of a few, far from each other.
    Without a tokenizer the texts are token ids.
    """
    length, new_tokens = within_context(dense.config, min(prompt_tokens, ids.shape[1]), new_tokens)
    if not new_tokens:
        if warnings is not None:
            warnings.append("no samples: the model's context has no room for a prompt and a continuation")
        return []
    rows = [round(i * (len(ids) - 1) / max(prompts - 1, 1)) for i in range(min(prompts, len(ids)))]
    start = ids[rows, :length]
    said = {name: greedy(model, start, new_tokens) for name, model in (("dense", dense), ("compressed", small))}

    def text(tokens: Tensor) -> str:
        if tokenizer is None:
            return " ".join(map(str, tokens.tolist()))
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return [
        {
            "prompt": text(start[i]),
            "dense": text(said["dense"][i]),
            "compressed": text(said["compressed"][i]),
            "new_tokens": new_tokens,
            "same_tokens": same_at_first(said["dense"][i], said["compressed"][i]),
            "decoded": tokenizer is not None,
        }
        for i in range(len(start))
    ]


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Tensor:
    """The (rows, new_tokens) most probable next tokens after `ids` (rows, length), one after the other, on the CPU.

    Every pass has the whole length, what is not said yet as zeros behind: a causal model does not see them. Passes that
    grow would have a CPU's library compile kernels for every length of every layer, and keep them (0.6 MB each).
    """
    device = device_of(model)
    length = ids.shape[1]
    now = torch.nn.functional.pad(ids, (0, new_tokens)).to(device)
    with frozen(model), autocast(device):
        for end in range(length, length + new_tokens):
            now[:, end] = model(input_ids=now, use_cache=False).logits[:, end - 1].argmax(-1)
    return now[:, length:].cpu()


def same_at_first(a: Tensor, b: Tensor) -> int:
    """How many tokens are equal before the first that differs."""
    return int((a == b).long().cumprod(0).sum())
