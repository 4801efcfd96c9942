"""From a spec to documents with a hash: `load_texts("builtin:stdlib", split="calibration")`.

A spec is `builtin:stdlib`, a text file or folder, `hub:NAME[:CONFIG][:SPLIT]`, `owner/name` on the hub, or
several of these, comma separated or as a list.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spectrim.data.files import SEPARATOR_LINE, read_file, text_files
from spectrim.data.hub import looks_like_dataset, parse_dataset, read_dataset
from spectrim.data.part import BLANK_LINE, Part
from spectrim.data.stdlib import read_stdlib
from spectrim.errors import InputError, UsageError, did_you_mean

Split = Literal["calibration", "evaluation"]
BUILTINS = ("builtin:stdlib",)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents in order. `text` is what evaluation reads: a single file comes back exactly as it is."""

    source: str
    documents: tuple[str, ...] = field(repr=False)
    sha256: str
    note: str
    joiner: str = BLANK_LINE

    @property
    def text(self) -> str:
        return self.joiner.join(self.documents)


def load_texts(spec: str | Sequence[str], *, split: Split, max_chars: int | None = None) -> Texts:
    """The documents that `spec` names, at most `max_chars` characters of them.

    `split` chooses the part of a builtin text and the default split of a dataset; a file has no parts, so
    calibrating and evaluating on the same file is for the caller to avoid.
    """
    if max_chars is not None and max_chars < 1:
        raise UsageError(f"max_chars is {max_chars}; it must be at least 1, or left out for no limit")
    specs = split_specs(spec)
    parts: list[Part] = []
    unread: list[str] = []
    left = max_chars
    for name, file in _readings(specs):
        if left is not None and left <= 0:
            unread.append(str(file or name))
            continue
        parts.append(_read_one(name, file, split=split, max_chars=left))
        left = None if left is None else left - parts[-1].num_chars
    notes = [part.note for part in parts]
    if unread:
        notes.append(f"not read, for the limit of {max_chars:,} characters was met: {', '.join(unread)}")
    documents, joiner = merge(parts)
    sha256 = hashlib.sha256(joiner.join(documents).encode()).hexdigest()
    return Texts(source=",".join(specs), documents=documents, sha256=sha256, note="; ".join(notes), joiner=joiner)


def split_specs(spec: str | Sequence[str]) -> list[str]:
    """Several specs out of a list or a comma-separated string; a path that exists may hold a comma."""
    given = [spec] if isinstance(spec, str) else list(spec)
    specs: list[str] = []
    for item in given:
        specs += [item] if _path(item).exists() else [piece.strip() for piece in item.split(",")]
    if not specs or not all(specs):
        raise UsageError(f"no text named in {spec!r}; give builtin:stdlib, a file, a folder or hub:NAME")
    return specs


def merge(parts: Sequence[Part]) -> tuple[tuple[str, ...], str]:
    """All documents and one joiner for them; a single part keeps its own, hence its exact text."""
    if len(parts) == 1:
        return parts[0].documents, parts[0].joiner
    documents = tuple(document for part in parts for document in part.documents)
    if all(part.joiner != SEPARATOR_LINE for part in parts):
        return documents, BLANK_LINE
    # A separator must stand on a line of its own, so a document that ends inside a line is completed.
    ended = tuple(doc if not doc or doc.endswith("\n") else doc + "\n" for doc in documents)
    return ended, SEPARATOR_LINE


def _readings(specs: Sequence[str]) -> list[tuple[str, Path | None]]:
    """Each spec with the files it stands for, found before anything is read."""
    readings: list[tuple[str, Path | None]] = []
    for spec in specs:
        if spec.startswith("builtin:"):
            if spec not in BUILTINS:
                raise UsageError(f"unknown built-in text {spec!r}{did_you_mean(spec, BUILTINS)}")
            readings.append((spec, None))
        elif spec.startswith("hub:") or (not _path(spec).exists() and looks_like_dataset(spec)):
            readings.append((spec, None))
        else:
            readings += [(spec, file) for file in text_files(_existing(spec))]
    return readings


def _read_one(name: str, file: Path | None, *, split: Split, max_chars: int | None) -> Part:
    if file is not None:
        return read_file(file, max_chars=max_chars)
    if name.startswith("builtin:"):
        return read_stdlib(split=split, max_chars=max_chars)
    return read_dataset(parse_dataset(name, split=split), max_chars=max_chars)


def _existing(spec: str) -> Path:
    path = _path(spec)
    if not path.exists():
        raise InputError(
            f"{spec}: no such file or folder (looked in {Path.cwd()}); "
            "give a text file, a folder, builtin:stdlib or hub:NAME"
        )
    return path


def _path(spec: str) -> Path:
    path = Path(spec)
    # expanduser fails for an unknown ~user; then the name is simply taken as it is written
    return path.expanduser() if spec == "~" or spec.startswith("~/") else path
