"""Figures beyond perplexity by name, for `spectrim eval --metrics NAME`: of a model, and of the dense one beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.measure import autocast, frozen
from spectrim.errors import UsageError, did_you_mean
from spectrim.evaluate.matrix_entropy import matrix_entropy
from spectrim.evaluate.nuclear_norm import nuclear_norm
from spectrim.evaluate.repetition import repetition
from spectrim.models.walk import device_of

PROMPT_TOKENS = 32
"""Tokens of each window that a continuation starts from."""
MOST_TEXTS = 32
"""Windows at most for figures that cost a decomposition or a continuation each."""


@torch.no_grad()
def last_hidden(model: PreTrainedModel, ids: Tensor, *, batch_size: int = 4) -> list[Tensor]:
    """The hidden states (S, d) that the head reads, of every window of `ids` (N, S), on the CPU in float32."""
    found: list[Tensor] = []
    with frozen(model), autocast(device_of(model)):
        for batch in ids.split(batch_size):
            out = model(input_ids=batch.to(device_of(model)), use_cache=False, output_hidden_states=True)
            found += out.hidden_states[-1].float().cpu().unbind()
    return found


def _repetition(model: PreTrainedModel, ids: Tensor) -> Any:
    return repetition(model, ids[:MOST_TEXTS, :PROMPT_TOKENS])


def _nuclear_norm(model: PreTrainedModel, ids: Tensor) -> Any:
    return nuclear_norm(last_hidden(model, ids[:MOST_TEXTS]))


def _entropy(model: PreTrainedModel, ids: Tensor) -> Any:
    return matrix_entropy(last_hidden(model, ids[:MOST_TEXTS]))


METRICS: Mapping[str, Callable[[PreTrainedModel, Tensor], Any]] = {
    "repetition": _repetition,
    "nuclear-norm": _nuclear_norm,
    "entropy": _entropy,
}
"""By name: from a model and windows of text (N, S) to a dataclass of figures, or None where they cannot be had."""
OF_FILES = ("kick", "forgetting")
"""Those that read questions or tasks instead of windows."""


def check_metrics(names: Sequence[str]) -> None:
    """UsageError for a name that no metric has."""
    for name in names:
        if name not in (*METRICS, *OF_FILES):
            raise UsageError(f"unknown metric {name!r}{did_you_mean(name, (*METRICS, *OF_FILES))}")


def _facts(figures: Any) -> dict[str, Any] | None:
    return None if figures is None else asdict(figures)


def measure_metrics(names: Sequence[str], models: Mapping[str, PreTrainedModel], ids: Tensor) -> dict[str, Any]:
    """`{metric: {model: figures}}`; None for figures that a model's context has no room for."""
    return {
        name: {which: _facts(METRICS[name](model, ids)) for which, model in models.items()}
        for name in names
        if name in METRICS
    }
