"""Hugging Face datasets, streamed: `hub:NAME[:CONFIG][:SPLIT]` or `owner/name`. Needs the extra `hub`."""

import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal, NamedTuple

from spectrim.data.files import TEXT_SUFFIXES, checked_text
from spectrim.data.part import BLANK_LINE, Part, counted, first_chars
from spectrim.errors import InputError, UsageError, without_tokens

DEFAULT_SPLITS = {"calibration": "train", "evaluation": "test"}
DEFAULT_MAX_CHARS = 50_000_000  # a streamed web corpus has no end; the note says when this limit was met
_OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NETWORK_WORDS = ("connect", "offline", "timeout", "resolve", "network", "unreachable", "proxy")


class DatasetName(NamedTuple):
    """What to ask the hub for."""

    name: str
    config: str | None
    split: str


def looks_like_dataset(spec: str) -> bool:
    """Whether a spec that is no existing path has the shape `owner/name`."""
    return _OWNER_AND_NAME.fullmatch(spec) is not None and not spec.endswith(TEXT_SUFFIXES)


def parse_dataset(spec: str, *, split: Literal["calibration", "evaluation"]) -> DatasetName:
    """`hub:NAME[:CONFIG][:SPLIT]`; leave CONFIG empty to name only the split."""
    fields = spec.removeprefix("hub:").split(":")
    if len(fields) > 3 or not fields[0]:
        raise UsageError(f"{spec!r}: not a dataset; write hub:NAME, hub:NAME:CONFIG, hub:NAME::SPLIT or all three")
    name, config, chosen = (*fields, "", "")[:3]
    return DatasetName(name, config or None, chosen or DEFAULT_SPLITS[split])


def read_dataset(dataset: DatasetName, *, max_chars: int | None) -> Part:
    """The `text` fields of one split, in order, one document a row."""
    limit = DEFAULT_MAX_CHARS if max_chars is None else max_chars
    where = f"hub:{dataset.name}:{dataset.config or ''}:{dataset.split}"
    library = _datasets_library()
    try:
        rows = library.load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=True)
        documents = _text_fields(rows, where=where, limit=limit)
    except InputError:
        raise
    except Exception as error:  # httpx, fsspec, pyarrow, huggingface_hub: no common type below Exception
        raise InputError(_explained(error, where=where)) from error
    if not any(document.strip() for document in documents):
        raise InputError(f"{where}: no text in {len(documents)} rows; choose another config or split")
    return Part(documents, BLANK_LINE, f"{where}: {counted(documents, limit=limit)}")


def _text_fields(rows: Iterable[dict[str, Any]], *, where: str, limit: int) -> tuple[str, ...]:
    documents: list[str] = []
    num_chars = 0
    for number, row in enumerate(rows):
        if "text" not in row:
            keys = ", ".join(map(repr, sorted(row)))
            raise InputError(f"{where}, row {number}: no field 'text'; keys found: {keys}; choose another dataset")
        documents.append(checked_text(row["text"], where=f"{where}, row {number}"))
        num_chars += len(documents[-1])
        if num_chars >= limit:
            break
    return first_chars(documents, limit)


def _datasets_library() -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise UsageError(
            "reading a Hugging Face dataset needs the package 'datasets', which is not installed; "
            "install spectrim[hub], or pass a text file or builtin:stdlib"
        ) from error


def _explained(error: Exception, *, where: str) -> str:
    said = " ".join(without_tokens(f"{type(error).__name__}: {error}").split())[:300]
    if isinstance(error, ConnectionError | TimeoutError) or any(word in said.lower() for word in _NETWORK_WORDS):
        return f"{where}: no network, or the hub did not answer ({said}); use a file or builtin:stdlib"
    return f"{where}: the dataset cannot be read ({said}); check name, config and split on huggingface.co"
