"""The reference model, its text and its held-out windows, as packed by prepare_reference.py."""

import lzma
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectrim.data import load_tokenizer

WINDOW = 512
CALIBRATION_WINDOWS = 256
TEXTS = ("wikitext2", "valid.wiki", "novels")
PIECE_CHARS = 200_000
"""Text is tokenised in pieces of this length, as in the training of the reference models."""


def unpack_model(data: Path, scratch: Path) -> Path:
    """The model folder out of DATA/model.tar.xz."""
    with tarfile.open(data / "model.tar.xz") as tar:
        tar.extractall(scratch, filter="data")
    (folder,) = (path for path in scratch.iterdir() if path.is_dir())
    return folder


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, at_most: int | None = None) -> np.ndarray:
    """Ids (tokens,) uint16 of a text, piece by piece."""
    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    found: list[np.ndarray] = []
    count = 0
    for batch in (pieces[start : start + 16] for start in range(0, len(pieces), 16)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        found += [np.array(ids, dtype=np.uint16) for ids in encoded]
        count += sum(map(len, encoded))
        if at_most is not None and count >= at_most:
            break
    return np.concatenate(found)


def cut(ids: np.ndarray, count: int | None = None) -> np.ndarray:
    """The first `count` windows (all: None) of WINDOW tokens, without overlap."""
    whole = len(ids) // WINDOW if count is None else min(count, len(ids) // WINDOW)
    return ids[: whole * WINDOW].reshape(whole, WINDOW)


def training_text(data: Path, characters: int = -1) -> str:
    """The packed head of the training text, or the first `characters` of it."""
    with lzma.open(data / "training.txt.xz", "rt", encoding="utf-8") as file:
        return file.read(characters)


def calibration_windows(data: Path, model: Path) -> Tensor:
    """The first 256 windows (256, 512) of the training text."""
    ids = tokens_of(load_tokenizer(model), training_text(data, 5 * PIECE_CHARS), CALIBRATION_WINDOWS * WINDOW)
    return torch.from_numpy(cut(ids, CALIBRATION_WINDOWS).astype(np.int64))


def tokenise_training(data: Path, model: Path, cache: Path) -> None:
    """All windows of the training text into `cache`, which appears complete."""
    beside = cache.with_suffix(".part.npy")
    np.save(beside, cut(tokens_of(load_tokenizer(model), training_text(data))))
    beside.rename(cache)


def training_windows(data: Path, model: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """Calibration windows (256, 512) and training windows (N, 512): the head of the training text, and what follows."""
    if not cache.exists():
        tokenise_training(data, model, cache)
    windows = load_ids(cache)
    return windows[:CALIBRATION_WINDOWS], windows[CALIBRATION_WINDOWS:]


def load_ids(path: Path) -> Tensor:
    """Windows (count, 512) as int64."""
    return torch.from_numpy(np.load(path).astype(np.int64))


def held_out(data: Path, names: Iterable[str] = TEXTS) -> dict[str, Tensor]:
    """Windows of each held-out text."""
    return {name: load_ids(data / f"{name}.npy") for name in names}
