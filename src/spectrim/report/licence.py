"""What a result's model card takes over from the card of the model it was made from: licence and languages.

The source's README.md is a stranger's file: its YAML head is read up to a limit, and only short texts are taken.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from spectrim.errors import InputError
from spectrim.store.files import check_stays_inside, open_regular

CARD = "README.md"
LICENCE = "LICENSE"
HEAD_BYTES = 65_536
TEXT_MOST, LIST_MOST = 300, 200
_HEAD = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def carried_over(folder: Path) -> dict[str, Any]:
    """JSON-ready: `license`, `license_name`, `license_link`, `language`, as far as the source's card has them.

    A source without a stated licence but with a LICENSE file, which is copied, has `license: other` and a link to it.
    Where there is a card whose head cannot be read, `problem` says so.
    """
    facts: dict[str, Any] = {}
    try:
        head = _head_of(folder)
    except (InputError, yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        head, facts = {}, {"problem": f"{CARD} of the source: its metadata cannot be read ({type(error).__name__})"}
    for key in ("license", "license_name", "license_link"):
        if _is_short(head.get(key)):
            facts[key] = head[key]
    languages = head.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and 0 < len(languages) <= LIST_MOST and all(map(_is_short, languages)):
        facts["language"] = languages
    if "license" not in facts and (folder / LICENCE).is_file():
        facts |= {"license": "other", "license_name": "see-license-file", "license_link": LICENCE}
    return facts


def _head_of(folder: Path) -> dict[str, Any]:
    """The metadata of the card; empty where there is no card or no metadata in it."""
    path = folder / CARD
    if not os.path.lexists(path):
        return {}
    check_stays_inside(path, folder)
    with open_regular(path) as (file, _):
        raw = file.read(HEAD_BYTES)
    match = _HEAD.match(raw)
    data = yaml.safe_load(match[1].decode("utf-8")) if match else None
    return data if isinstance(data, dict) else {}


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= TEXT_MOST and value.isprintable()
