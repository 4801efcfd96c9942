"""Going on with a prompt: what `spectrim generate` prints and the page of sizes shows."""

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spectrim.errors import UsageError
from spectrim.models.load import check_vocabulary, context_length


def prompt_ids(words: PreTrainedTokenizerBase, prompt: str, config: PretrainedConfig, new_tokens: int) -> Tensor:
    """Token ids (1, T) of a prompt; UsageError for an empty one, and where the continuation has no room."""
    ids = words(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty; give at least one word")
    limit = context_length(config)
    if limit is not None and ids.shape[1] + new_tokens > limit:
        raise UsageError(
            f"a prompt of {ids.shape[1]} tokens and --max-new-tokens {new_tokens} pass the {limit} tokens that "
            "the model reads; shorten one of them"
        )
    return ids


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    ids: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text of up to `new_tokens` tokens after `ids` (1, T); greedy at temperature 0."""
    check_vocabulary(model, ids)
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **sampling)  # type: ignore[operator]
    return str(words.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
