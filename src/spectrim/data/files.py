"""Text files and folders: plain, xz- or gzip-compressed, or JSON lines; read as a stream, checked, split.

A line `<|endoftext|>` separates documents. It becomes the joiner, so that joining the documents gives the
file back character for character (line ends normalised to "\\n"), which perplexity figures depend on.
"""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from spectrim.data.part import BLANK_LINE, Part, counted, first_chars
from spectrim.errors import InputError

LINE_CHARS_MAX = 64 * 2**20  # of one JSON line; a file can be one line of any size
SEPARATOR_LINE = "<|endoftext|>\n"
_SEPARATOR = re.compile(r"^<\|endoftext\|>\n", re.M)
TEXT_SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz")


def text_files(path: Path) -> list[Path]:
    """`path` itself, or the text files directly inside it by name."""
    if not path.is_dir():
        return [path]
    with _reading(path):
        entries = sorted(path.iterdir())
    found = [entry for entry in entries if entry.is_file() and entry.name.endswith(TEXT_SUFFIXES)]
    if not found:
        names = ", ".join(entry.name for entry in entries[:10]) or "nothing"
        raise InputError(
            f"{path}: no text file among the {len(entries)} entries of this folder ({names}); "
            f"allowed endings: {', '.join(TEXT_SUFFIXES)}"
        )
    return found


def read_file(path: Path, *, max_chars: int | None) -> Part:
    """The documents of one text file; reading stops after `max_chars` characters."""
    if not path.name.endswith(TEXT_SUFFIXES):
        raise InputError(
            f"{path}: cannot tell how to read this file from its name; allowed endings: "
            f"{', '.join(TEXT_SUFFIXES)}; rename, convert or decompress it"
        )
    if ".jsonl" in "".join(path.suffixes[-2:]):
        documents, joiner = _read_json_lines(path, max_chars), BLANK_LINE
    else:
        text = _read_text(path, max_chars)
        documents = tuple(_SEPARATOR.split(text))
        joiner = SEPARATOR_LINE if len(documents) > 1 else BLANK_LINE
    if not any(document.strip() for document in documents):
        num_chars = sum(map(len, documents))
        raise InputError(f"{path}: no text in it ({num_chars} characters, all white space); give another file")
    return Part(documents, joiner, f"{path.name}: {counted(documents, limit=max_chars)}")


def _read_text(path: Path, max_chars: int | None) -> str:
    with _reading(path), _open(path) as stream:
        text = stream.read(-1 if max_chars is None else max_chars)
    _refuse_binary(path, text, "character")
    return text


def _read_json_lines(path: Path, max_chars: int | None) -> tuple[str, ...]:
    documents: list[str] = []
    num_chars = 0
    with _reading(path), _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LINE_CHARS_MAX + 1), ""), start=1):
            if len(line) > LINE_CHARS_MAX:
                raise InputError(
                    f"{path}, line {number}: more than {LINE_CHARS_MAX:,} characters in one line; one document a line"
                )
            _refuse_binary(path, line, f"line {number}, character")
            if not line.strip():
                continue
            documents.append(_text_field(line, where=f"{path}, line {number}"))
            num_chars += len(documents[-1])
            if max_chars is not None and num_chars >= max_chars:
                break
    return first_chars(documents, max_chars)


def _text_field(line: str, *, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); each line must be an object with a field 'text'") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}; each line must be an object with a field 'text'")
    if "text" not in row:
        keys = ", ".join(map(repr, sorted(row)[:10])) or "none"
        raise InputError(f"{where}: no field 'text'; keys found: {keys}; rename the field that holds the text")
    return checked_text(row["text"], where=where)


def checked_text(text: object, *, where: str) -> str:
    """`text` when it is a string that can be encoded as UTF-8."""
    if not isinstance(text, str):
        raise InputError(f"{where}: field 'text' is {type(text).__name__}, it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} of 'text' is a lone surrogate, not valid Unicode; repair it"
        ) from error
    return text


def _refuse_binary(path: Path, text: str, unit: str) -> None:
    position = text.find("\0")
    if position >= 0:
        raise InputError(f"{path}: binary, not text (NUL at {unit} {position}); give a UTF-8 text file")


def _open(path: Path) -> TextIO:
    # Universal newlines, as train_reference.py reads; utf-8-sig drops the byte order mark some editors write.
    if path.suffix == ".xz":
        return cast(TextIO, lzma.open(path, "rt", encoding="utf-8-sig"))
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig"))
    return path.open(encoding="utf-8-sig")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path}: not UTF-8 (byte 0x{byte:02x}: {error.reason}); convert it, for example with iconv"
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged or not {path.suffix} data ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check path and rights") from error
