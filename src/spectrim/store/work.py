"""OUT.resume: where a run keeps its state, beside the target, until the target is published.

lock               held while a run works on it; names the process                          store/lock.py
fingerprint.json   all that decides the result; a run with another fingerprint never goes on from here
command.json       the words after `spectrim` and the folder they were typed in, for `spectrim resume`
STAGE.safetensors  the last state of each stage                                            store/state.py
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectrim.errors import InputError, ResourceError, UsageError
from spectrim.store import disk, lock, points, writer
from spectrim.store.files import shown
from spectrim.store.limits import COMMAND_WORDS_MAX
from spectrim.store.lock import LOCK
from spectrim.store.strict_json import read_json
from spectrim.store.target import absolute

SUFFIX = ".resume"
FINGERPRINT, COMMAND = "fingerprint.json", "command.json"
FORMAT_VERSION = 1
_STAGE = re.compile(r"[a-z0-9]+( [a-z0-9]+)*")
_OURS = re.compile(rf"({LOCK}|{re.escape(FINGERPRINT)}|{re.escape(COMMAND)}|[a-z0-9-]+\.safetensors)(\.new)?")
_UNFINISHED = re.compile(r".+\.new|\.tmp[A-Za-z0-9]{6}")
"""What a kill leaves of a write: our own temporary names, and those of safetensors."""
_ANEW = "add --restart to discard it and start anew, or choose another --out"


class WorkFolder:
    """An `OUT.resume` that this process has locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claimed: dict[str, Any] = {}

    def claim(self, fields: Mapping[str, Any]) -> None:
        """Refuses a folder whose recorded fingerprint differs in one of `fields`; records those that are new."""
        asked = json.loads(json.dumps(flatten(fields), allow_nan=False))
        recorded = self._recorded()
        lines = _differing(recorded, asked)
        if lines:
            raise UsageError(
                f"{self.path}: holds the state of another run; {len(lines)} fields differ:\n  "
                + "\n  ".join(lines)
                + f"\ngive the same command to go on, {_ANEW}"
            )
        self._claimed = {**recorded, **asked}
        self._put(FINGERPRINT, {"format_version": FORMAT_VERSION, "fields": self._claimed})

    def differing(self, fields: Mapping[str, Any]) -> list[str]:
        """Which of the flat, JSON-ready `fields` are recorded here with other values, and both values."""
        return _differing(self._recorded(), fields)

    @property
    def claimed(self) -> Mapping[str, Any]:
        """The fingerprint, flattened, as far as it is known; JSON-ready."""
        return self._claimed

    def record(self, command: Sequence[str]) -> None:
        """The words of the command that works here, for `spectrim resume`; those of an older one are forgotten."""
        if command:
            self._put(COMMAND, {"format_version": FORMAT_VERSION, "words": list(command), "folder": os.getcwd()})
        else:
            disk.remove(self.path / COMMAND)

    def require_space(self, nbytes: int) -> None:
        """`ResourceError` if so much is not free: states must not take the disk that the result will need."""
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise ResourceError(
                f"{self.path}: needs {disk.gigabytes(nbytes)} with the result to come, {disk.gigabytes(free)} are "
                "free; free some space"
            )

    def _put(self, name: str, data: Mapping[str, Any]) -> None:
        """A small JSON file in one step."""
        path = self.path / name
        fresh = path.with_name(f"{name}.new")
        try:
            writer.write_json(fresh, data)
            points.point("record-written")
            os.replace(fresh, path)
            points.point("record-renamed")
            disk.fsync_folder(self.path)
            points.point("record-saved")
        except OSError as error:
            raise disk.as_resource_error(error, path) from error

    def _recorded(self) -> dict[str, Any]:
        path = self.path / FINGERPRINT
        if not self.states():  # nothing to go on from: whose folder it was does not matter
            return self._claimed
        if not os.path.lexists(path):
            raise InputError(f"{self.path}: has states but no {FINGERPRINT}, so nobody knows whose; {_ANEW}")
        try:
            found = read_json(path)
        except InputError as error:
            raise InputError(f"{error}; {_ANEW}") from error
        fields = found.get("fields")
        if found.get("format_version") != FORMAT_VERSION or not isinstance(fields, dict):
            version = shown(str(found.get("format_version")))
            raise InputError(f"{path}: format_version {version}, this spectrim reads {FORMAT_VERSION}; {_ANEW}")
        return fields

    def state_path(self, stage: str) -> Path:
        """Where the state of a stage lies. Stages are named by the code: small letters, digits, single spaces."""
        assert _STAGE.fullmatch(stage), f"stage {stage!r} gives no file name"
        return self.path / f"{stage.replace(' ', '-')}.safetensors"

    def states(self) -> list[Path]:
        """The states that are there now, complete or damaged."""
        return sorted(path for path in self.path.iterdir() if path.suffix == ".safetensors")

    def unfinished(self) -> list[Path]:
        """What the process that works here, or one that was killed, has not finished writing, and its scratch files."""
        return [path for path in self.path.iterdir() if _UNFINISHED.fullmatch(path.name)]

    def clear(self) -> None:
        """Everything but the lock is removed: the newest states first, so that what is left after a kill can always be
        gone on from, and the fingerprint last, so that no state is ever left without.
        """
        for path in sorted(self.path.iterdir(), key=_from_the_newest):
            if path.name == LOCK:
                continue
            points.point("tidying")
            if not disk.remove(path):
                raise ResourceError(f"{path}: cannot be removed; remove it yourself, then run again")
        points.point("tidied")

    def sweep(self) -> None:
        """What a killed process had not finished writing is removed: it is named by nobody and takes space."""
        for path in self.unfinished():
            disk.remove(path)

    def remove(self) -> bool:
        """Whether the folder is gone. Never raises: the result is published, or another error is under way."""
        try:
            self.clear()
        except (OSError, ResourceError):
            return False
        return disk.remove(self.path)


def _from_the_newest(path: Path) -> tuple[bool, int]:
    return path.name == FINGERPRINT, -os.lstat(path).st_mtime_ns


def work_path(out: Path) -> Path:
    """Where the state of a run to `out` lies."""
    out = absolute(out)
    return out.with_name(f"{out.name}{SUFFIX}")


def read_command(path: Path) -> tuple[list[str], str]:
    """The words and the folder that are recorded in an `OUT.resume`; `InputError` if they are not as we write them."""
    found = read_json(path / COMMAND)
    words, folder = found.get("words"), found.get("folder")
    if found.get("format_version") != FORMAT_VERSION or not isinstance(words, list) or not isinstance(folder, str):
        raise InputError(f"{path / COMMAND}: is no command as this spectrim records it; type the command yourself")
    if not 0 < len(words) <= COMMAND_WORDS_MAX or not all(isinstance(word, str) for word in words):
        raise InputError(f"{path / COMMAND}: must hold 1 to {COMMAND_WORDS_MAX} words; type the command yourself")
    return words, folder


@contextmanager
def locked(out: Path, *, restart: bool = False, take_lock: bool = False) -> Iterator[WorkFolder]:
    """`OUT.resume`, made if need be and locked by this process; with `restart` it is emptied first."""
    out = absolute(out)
    path = work_path(out)
    try:
        descriptor = _lock(path, out, take_lock)
    except OSError as error:
        raise disk.as_resource_error(error, path) from error
    try:
        points.point("locked")
        folder = WorkFolder(path)
        folder.sweep()
        if restart:
            folder.clear()
        yield folder
    finally:
        lock.release(descriptor)


def _lock(path: Path, out: Path, take_lock: bool) -> int:
    """The descriptor that holds the lock of `path`."""
    while True:
        path.mkdir(exist_ok=True)
        disk.fsync_folder(path.parent)  # else all that is saved in it is lost with its name
        if path.is_symlink():
            raise UsageError(f"{path}: is a link to {os.readlink(path)}; remove it or choose another --out")
        refuse_foreign(path)
        try:
            descriptor = lock.take(path / LOCK, what=str(out), take_lock=take_lock)
        except FileNotFoundError:  # the run before us published and removed its folder just now
            continue
        if descriptor is not None:
            return descriptor


def refuse_foreign(path: Path) -> None:
    """Nothing that spectrim did not write is read, and above all not deleted."""
    for entry in sorted(path.iterdir()):
        known = _OURS.fullmatch(entry.name) or _UNFINISHED.fullmatch(
            entry.name
        )  # may vanish at any time while another run works here
        if not known or entry.is_symlink() or entry.is_dir():
            raise UsageError(
                f"{entry}: was not put there by spectrim, which keeps the state of the run in this folder; "
                "move it away or choose another --out"
            )


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, with dots in the names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _differing(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {_value(recorded[name])} there, {_value(asked[name])} now"
        for name in asked
        if name in recorded and recorded[name] != asked[name]
    ]


def _value(value: Any) -> str:
    """A value in a message: JSON as it was recorded, long or hostile text shortened and escaped."""
    return shown(value) if isinstance(value, str) else json.dumps(value)[:80]
