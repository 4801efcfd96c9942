"""A folder that holds all sizes, one size beside the full one: what `spectrim ui` shows; knows no user interface."""

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.errors import UsageError
from spectrim.evaluate.continuation import continued, prompt_ids
from spectrim.evaluate.language import Quality, evaluate
from spectrim.integrations.any_size import AnySizeFormat
from spectrim.models.load import Source, check_vocabulary, context_length, load_model, meta_model
from spectrim.models.walk import find_layers

FULL = 1.0
JUDGED_TOKENS = 512
"""Of a text that was typed in: as many as a window of an evaluation has, so that an answer takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One size: what it says, what it takes, how well it predicts the text (None where there was no text)."""

    size: float
    text: str
    numbers: int
    bytes: int
    keep: float
    quality: Quality | None


class Sizes:
    """The full model, and the one of the size that was asked for last; both stay loaded, calls wait for each other."""

    def __init__(self, source: Source, words: PreTrainedTokenizerBase, device: torch.device) -> None:
        """UsageError for a folder of one size."""
        if source.any_size is None:
            raise UsageError(
                f"{source.name}: holds one size only, so there is none to choose; make a folder that holds all with "
                "`spectrim compress MODEL --any-size --out all`"
            )
        self.stored = AnySizeFormat.from_json(source.any_size)
        self.source, self.words, self.device = source, words, device
        self.dense_walk = find_layers(meta_model(source.config))
        self.lock = Lock()
        self.held: dict[float, PreTrainedModel] = {}

    @property
    def smallest(self) -> float:
        """The smallest size there is."""
        return self.stored.anchors[-1]

    @property
    def first(self) -> float:
        """The size that a load without a size gives."""
        return float(getattr(self.source.config, "size_ratio", None) or self.smallest)

    def compare(self, size: float, prompt: str, text: str = "", new_tokens: int = 40) -> tuple[Side, Side]:
        """The full model and the one of `size`: both go on with `prompt`, both are judged on `text` where there is any.

        UsageError for a size that the folder does not hold, an empty prompt, one that leaves no room, and a text of one
        token.
        """
        size = self.stored.check_size(size)
        ids = prompt_ids(self.words, prompt, self.source.config, new_tokens)
        judged = self.text_ids(text)
        with self.lock:
            full, small = self.at(FULL), self.at(size)
            return (
                self._side(full, FULL, ids, new_tokens, judged),
                self._side(small, size, ids, new_tokens, judged, dense=full),
            )

    def text_ids(self, text: str) -> Tensor | None:
        """The first tokens (1, T) of a text to judge by; None for an empty one."""
        if not text.strip():
            return None
        limit = min(JUDGED_TOKENS, context_length(self.source.config) or JUDGED_TOKENS)
        ids = self.words(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :limit]
        if ids.shape[1] < 2:
            raise UsageError("the text to judge by has one token; perplexity needs two, of which the second is judged")
        return ids

    def at(self, size: float) -> PreTrainedModel:
        """The model of a size; the one that was held beside the full one is let go first."""
        if size not in self.held:
            for other in [held for held in self.held if held != FULL]:
                del self.held[other]
            self.held[size] = load_model(self.source, self.device, size=size)
        return self.held[size]

    def _side(
        self,
        model: PreTrainedModel,
        size: float,
        ids: Tensor,
        new_tokens: int,
        judged: Tensor | None,
        dense: PreTrainedModel | None = None,
    ) -> Side:
        quality = None
        if judged is not None:
            check_vocabulary(model, judged)
            quality = evaluate(model, judged, dense=dense)
        tensors = {t.data_ptr(): (name, t) for name, t in model.state_dict().items() if t.numel()}  # tied ones once
        prefixes = tuple(layer.name + "." for layer in self.dense_walk.layers)
        linear = sum(t.numel() for name, t in tensors.values() if name.startswith(prefixes))
        return Side(
            size=size,
            text=continued(model, self.words, ids, new_tokens),
            numbers=sum(t.numel() for _, t in tensors.values()),
            bytes=sum(t.nbytes for _, t in tensors.values()),
            keep=linear / self.dense_walk.numbers,
            quality=quality,
        )


def rows_of(full: Side, small: Side) -> list[tuple[str, str, str]]:
    """What the table on the page says: name, of the full model, of the chosen size."""
    rows = [
        ("kept of the decoder's linear layers", f"{full.keep:.4f}", f"{small.keep:.4f}"),
        ("numbers in all", f"{full.numbers:,}", f"{small.numbers:,}"),
        ("bytes in all", f"{full.bytes:,}", f"{small.bytes:,}"),
    ]
    if full.quality is not None and small.quality is not None:
        rows += [
            ("perplexity of your text", f"{full.quality.perplexity:.2f}", f"{small.quality.perplexity:.2f}"),
            ("KL to the full model, nats a token", "0", _four(small.quality.kl)),
            ("same top token as the full model", "1", _four(small.quality.agreement)),
            ("tokens judged", str(full.quality.tokens), str(small.quality.tokens)),
        ]
    return rows


def _four(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.4f}"
