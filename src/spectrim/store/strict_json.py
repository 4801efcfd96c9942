"""JSON from strangers, read strictly: what Python's parser forgives or crashes on is refused with a reason.

Size, number of values and nesting are measured on the raw bytes, before the parser allocates or recurses.
"""

import json
import math
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from spectrim.errors import InputError
from spectrim.store.files import LFS_MAGIC, foreign_kind, read_capped, shown
from spectrim.store.limits import (
    JSON_BYTES_MAX,
    JSON_CONTAINERS_MAX,
    JSON_DEPTH_MAX,
    JSON_INT_DIGITS_MAX,
    JSON_MARKS_MAX,
)

_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """Raised inside the parser's hooks, where the file's name is not known."""


def read_json(path: Path, *, limit_bytes: int = JSON_BYTES_MAX) -> dict[str, Any]:
    """The object in a JSON file; `InputError` on duplicate keys, NaN, BOM, deep nesting, huge integers."""
    raw = read_capped(Path(path), limit_bytes=limit_bytes)
    if raw.startswith(LFS_MAGIC):
        raise InputError(f"{path}: is {foreign_kind(raw)}")
    return parse_object(raw, where=str(path))


def parse_object(raw: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object in `raw`. `where` opens the message of every refusal."""
    try:
        _check_raw(raw)
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_modest,
        )
        if not isinstance(value, dict):
            raise _Refused(f"holds {type(value).__name__}, not an object at the top")
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character would crash a later print
    except UnicodeError as error:
        raise InputError(f"{where}: not valid JSON: not UTF-8 ({error}); download it again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}; correct it or download it again") from error
    return value


def _check_raw(raw: bytes) -> None:
    if raw.startswith(b"\xef\xbb\xbf"):
        raise _Refused("starts with a byte order mark (save it as UTF-8 without BOM)")
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > JSON_CONTAINERS_MAX:
        raise _Refused(f"{containers:,} objects and lists, allowed {JSON_CONTAINERS_MAX:,}")
    marks = containers + raw.count(b",") + raw.count(b":") + raw.count(b'"')
    if marks > JSON_MARKS_MAX:
        raise _Refused(f"{marks:,} values and marks, allowed {JSON_MARKS_MAX:,}")
    depth = _depth(raw) if containers > JSON_DEPTH_MAX else containers
    if depth > JSON_DEPTH_MAX:
        raise _Refused(f"nested {depth:,} deep, allowed {JSON_DEPTH_MAX}")


def _depth(raw: bytes) -> int:
    """Deepest nesting. Brackets in strings must neither count nor hide others: strings are cut out first."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    brackets = outside.translate(None, delete=_NOT_BRACKETS)
    return max(accumulate((_STEP[byte] for byte in brackets), initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"duplicate key {shown(key)}")
            seen.add(key)
    return unique


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"number {shown(text)} does not fit a 64-bit float")
    return value


def _modest(text: str) -> int:
    if len(text) > JSON_INT_DIGITS_MAX:
        raise _Refused(f"integer of {len(text):,} digits, allowed {JSON_INT_DIGITS_MAX}")
    return int(text)
