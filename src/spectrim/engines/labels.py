"""Losses whose gradients calibration measures: of labels that the model itself draws, and of the text's own tokens."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.processes import Share, present


def loss_of_sampled_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """`sum over tokens of -log p(sampled next token)` from logits (B, S, V)."""
    log_p = logits.float().log_softmax(-1)
    with torch.no_grad():
        # The Gumbel trick samples from all positions at once, on any device, from a seeded generator.
        uniform = torch.rand(log_p.shape, generator=generator, device=log_p.device).clamp_(1e-20, 1 - 1e-7)
        labels = (log_p - (-uniform.log()).log()).argmax(-1, keepdim=True)
    return -log_p.gather(-1, labels).sum()


def loss_of_text(logits: Tensor, batch: Tensor) -> Tensor:
    """`sum over tokens of -log p(next token of the text)` from logits (B, S, V) of tokens (B, S)."""
    return -logits[:, :-1].float().log_softmax(-1).gather(-1, batch[:, 1:, None]).sum()


@torch.no_grad()
def skip_labels_of_others(
    model: PreTrainedModel, ids: Tensor, batch_size: int, generator: torch.Generator, share: Share | None = None
) -> None:
    """Draw what other ranks draw for their windows of `ids` before this one's: every window has the labels that it has
    with one process (on a GPU: where shares are whole batches, since its numbers depend on how many are drawn at once).
    """
    before = (share or present().share_of)(len(ids)).start
    if not before:
        return
    words = model(input_ids=ids[:1, :1].to(generator.device), use_cache=False).logits.shape[-1]
    for start in range(0, before, batch_size):
        shape = (min(batch_size, before - start), ids.shape[1], words)
        torch.rand(shape, generator=generator, device=generator.device)
