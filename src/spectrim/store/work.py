"""OUT.resume: where a run that trains keeps its state, beside the target, until the target is published.

lock               held (flock) while a run works on it; names the process. A dead process holds no lock
fingerprint.json   all that decides the result; a run with another fingerprint never goes on from here
STAGE.safetensors  the last state of each stage                                            store/state.py
"""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectrim.errors import InputError, ResourceError, UsageError
from spectrim.store import disk, writer
from spectrim.store.files import read_capped, shown
from spectrim.store.strict_json import read_json
from spectrim.store.target import absolute

LOCK, FINGERPRINT = "lock", "fingerprint.json"
FORMAT_VERSION = 1
_STAGE = re.compile(r"[a-z0-9]+( [a-z0-9]+)*")
_OURS = re.compile(rf"({LOCK}|{re.escape(FINGERPRINT)}|[a-z0-9-]+\.safetensors)(\.new)?")
_ANEW = "add --restart to discard it and start anew, or choose another --out"


class WorkFolder:
    """An `OUT.resume` that this process has locked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, fields: Mapping[str, Any]) -> None:
        """Refuses a folder whose recorded fingerprint differs in one of `fields`; records those that are new."""
        asked = json.loads(json.dumps(flatten(fields), allow_nan=False))
        recorded = self._recorded()
        differing = [name for name in asked if name in recorded and recorded[name] != asked[name]]
        if differing:
            lines = [f"{name}: {_value(recorded[name])} there, {_value(asked[name])} now" for name in differing]
            raise UsageError(
                f"{self.path}: holds the state of another run; {len(lines)} fields differ:\n  "
                + "\n  ".join(lines)
                + f"\ngive the same command to go on, {_ANEW}"
            )
        path = self.path / FINGERPRINT
        fresh = path.with_name(f"{path.name}.new")
        try:
            writer.write_json(fresh, {"format_version": FORMAT_VERSION, "fields": {**recorded, **asked}})
            os.replace(fresh, path)
            disk.fsync_folder(self.path)
        except OSError as error:
            raise disk.as_resource_error(error, path) from error

    def _recorded(self) -> dict[str, Any]:
        path = self.path / FINGERPRINT
        if not os.path.lexists(path):
            if self.states():
                raise InputError(f"{self.path}: has states but no {FINGERPRINT}, so nobody knows whose; {_ANEW}")
            return {}
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

    def clear(self) -> None:
        """Everything but the lock is removed; the states first, so that none is ever left without a fingerprint."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == FINGERPRINT):
            if path.name != LOCK and not disk.remove(path):
                raise ResourceError(f"{path}: cannot be removed; remove it yourself, then run again")

    def remove(self) -> bool:
        """Whether the folder is gone. Never raises: the result is published, or another error is under way."""
        try:
            self.clear()
        except (OSError, ResourceError):
            return False
        return disk.remove(self.path)


@contextmanager
def locked(out: Path, *, restart: bool = False) -> Iterator[WorkFolder]:
    """`OUT.resume`, made if need be and locked by this process; with `restart` it is emptied first."""
    out = absolute(out)
    path = out.with_name(f"{out.name}.resume")
    try:
        descriptor = _lock(path, out)
    except OSError as error:
        raise disk.as_resource_error(error, path) from error
    try:
        folder = WorkFolder(path)
        if restart:
            folder.clear()
        yield folder
    finally:
        os.close(descriptor)


def _lock(path: Path, out: Path) -> int:
    """The descriptor that holds the lock of `path`."""
    while True:
        path.mkdir(exist_ok=True)
        if path.is_symlink():
            raise UsageError(f"{path}: is a link to {os.readlink(path)}; remove it or choose another --out")
        _refuse_foreign(path)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(path / LOCK, flags, 0o666)
        except FileNotFoundError:  # the run before us published and removed its folder just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path / LOCK, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            holder = shown(read_capped(path / LOCK, limit_bytes=1000).decode(errors="replace"))
            os.close(descriptor)
            raise UsageError(
                f"{path}: {holder} is working on {out}; wait for it, stop it, or choose another --out"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` names the opened file: a lock on a file that was removed meanwhile protects nothing."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refuse_foreign(path: Path) -> None:
    """Nothing that spectrim did not write is read, and above all not deleted."""
    for entry in sorted(path.iterdir()):
        known = _OURS.fullmatch(entry.name)  # may vanish at any time while another run works here
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


def _value(value: Any) -> str:
    """A value in a message: JSON as it was recorded, long or hostile text shortened and escaped."""
    return shown(value) if isinstance(value, str) else json.dumps(value)[:80]
