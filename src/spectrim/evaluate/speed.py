"""How fast a model generates: greedy decoding at batch 1 with the key/value cache, the way it is loaded."""

import time

import torch
from transformers import PreTrainedModel

from spectrim.evaluate.room import within_context


@torch.no_grad()
def decode_tokens_per_s(model: PreTrainedModel, *, new_tokens: int = 32, prompt_tokens: int = 16) -> float | None:
    """Tokens per second after a warm-up, median of three runs; None where the context has no room for any."""
    prompt_tokens, new_tokens = within_context(model.config, prompt_tokens, new_tokens)
    if not new_tokens:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    prompt = (torch.arange(prompt_tokens, device=model.device)[None] * 7919) % vocabulary
    few = min(4, new_tokens)
    model.generate(prompt, max_new_tokens=few, min_new_tokens=few, do_sample=False)  # type: ignore[operator]
    rates = []
    for _ in range(3):
        _wait(model.device)
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
        _wait(model.device)
        rates.append(new_tokens / (time.perf_counter() - start))
    return sorted(rates)[1]


def speed_note(small: float | None, dense: float | None) -> str | None:
    """What to say where the compressed model decodes slower than the dense one, None where it does not (or unknown)."""
    if small is None or dense is None or small >= dense:
        return None
    return (
        f"the compressed model decodes at {small / dense:.2f} of the dense model's speed ({small:.1f} and {dense:.1f} "
        "tokens/s, eagerly at batch 1): it has fewer bytes to read but more products to start. docs/speed.md says what "
        "helps (torch.compile with a static cache, spectrim.speed_up)"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
