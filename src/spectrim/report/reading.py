"""Reading report.json: any version of it that was ever written, by anybody.

A key that is not there is None (older folders lack some); a value of the wrong kind is an `InputError` that names it.
"""

from pathlib import Path
from typing import Any

from spectrim.errors import InputError
from spectrim.store import read_json
from spectrim.store.files import shown

REPORT, CONFIG, MANIFEST = "report.json", "config.json", "manifest.json"
LARGEST = 1e305
"""Of numbers: a perplexity may be e^700, and nothing honest is above it."""
VERSION = 1
"""The newest `format_version` of report.json, config.json and manifest.json that is read here."""


class Facts:
    """A JSON object and where it came from."""

    def __init__(self, data: Any, where: str = "the report") -> None:
        self.data, self.where = data, where

    def raw(self, *path: str | int) -> Any:
        """What is at `path`, None where there is nothing."""
        value = self.data
        for at, key in enumerate(path):
            if value is None:
                return None
            if isinstance(key, int) and isinstance(value, list):
                value = value[key] if key < len(value) else None
            elif isinstance(key, str) and isinstance(value, dict):
                value = value.get(key)
            else:
                raise self._wrong(path[:at], value, "an object" if isinstance(key, str) else "a list")
        return value

    def number(self, *path: str | int) -> float | int | None:
        """A finite number."""
        value = self.raw(*path)
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise self._wrong(path, value, "a finite number")
        return value

    def count(self, *path: str | int) -> int | None:
        """A whole number of at least 0."""
        value = self.raw(*path)
        if value is not None and (type(value) is not int or value < 0):
            raise self._wrong(path, value, "a whole number of at least 0")
        return value

    def text(self, *path: str | int) -> str | None:
        """A string."""
        value = self.raw(*path)
        if value is not None and not isinstance(value, str):
            raise self._wrong(path, value, "a text")
        return value

    def at(self, *path: str | int) -> "Facts":
        """What is below `path`, empty where there is nothing."""
        value = self.raw(*path)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(path, value, "an object")
        return Facts(value or {}, f"{self.where}: {_dotted(path)}")

    def rows(self, *path: str | int) -> list["Facts"]:
        """The objects, or lists, in the list at `path`."""
        value = self._list(path)
        for position, item in enumerate(value):
            if not isinstance(item, dict | list):
                raise self._wrong((*path, position), item, "an object or a list")
        return [Facts(item, f"{self.where}: {_dotted((*path, i))}") for i, item in enumerate(value)]

    def numbers(self, *path: str | int) -> list[float]:
        """A list of finite numbers."""
        value = self._list(path)
        return [x for i in range(len(value)) if (x := self.number(*path, i)) is not None]

    def texts(self, *path: str | int) -> list[str]:
        """A list of strings."""
        value = self._list(path)
        return [x for i in range(len(value)) if (x := self.text(*path, i)) is not None]

    def names(self) -> list[str]:
        """The keys of the object itself."""
        return list(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def _list(self, path: tuple[str | int, ...]) -> list[Any]:
        value = self.raw(*path)
        if value is not None and not isinstance(value, list):
            raise self._wrong(path, value, "a list")
        return value or []

    def _wrong(self, path: tuple[str | int, ...], value: Any, expected: str) -> InputError:
        return InputError(
            f"{self.where}: {_dotted(path) or 'the top'} is {shown(repr(value))}, expected {expected}; "
            "the file was changed by hand or by another program"
        )


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def read_report(folder: Path) -> Facts:
    """The report of a folder that spectrim wrote; `InputError` where there is none, or a newer version wrote it."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; give folders that `spectrim compress` wrote")
    path = folder / REPORT
    if not path.is_file():
        raise InputError(f"{folder}: has no {REPORT}; only folders that `spectrim compress` wrote can be compared")
    report = Facts(read_json(path), str(path))
    refuse_newer(report.raw("format_version"), path)
    for name, keys in ((CONFIG, ("quantization_config", "format_version")), (MANIFEST, ("format_version",))):
        if (folder / name).is_file():
            refuse_newer(Facts(read_json(folder / name), str(folder / name)).raw(*keys), folder / name)
    return report


def refuse_newer(version: Any, path: Path) -> None:
    """A missing version is that of a plain model, or of an export; both say nothing that could be misread."""
    if version is None:
        return
    if type(version) is not int or version < 1:
        raise InputError(f"{path}: format_version is {shown(repr(version))}, expected a whole number from 1")
    if version > VERSION:
        raise InputError(
            f"{path}: format_version is {version}, this installation of spectrim reads up to {VERSION}; upgrade "
            "spectrim, or leave this folder out"
        )
