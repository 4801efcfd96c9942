"""Who works on an output: one process, which holds a kernel lock and has written down who it is.

The kernel's lock (flock) ends with its process, so a kill blocks nobody. On some network mounts it holds within one
host only, or not at all; therefore the file also says host, boot and process. A record of another host is believed
until `--take-lock` says that its process is gone. A run that ends in order leaves an empty record.
"""

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from spectrim.errors import InputError, UsageError
from spectrim.store.files import read_capped, shown
from spectrim.store.strict_json import parse_object

LOCK = "lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BYTES_MAX = 1000


def identity() -> dict[str, Any]:
    """This process, as it is written down; `started` tells it from a later process of the same number."""
    return {"process": os.getpid(), "host": os.uname().nodename, "boot": boot_id(), "started": started(os.getpid())}


def boot_id() -> str:
    """Changes when the machine starts anew; empty where there is no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def started(process: int) -> int | None:
    """When a process began, in ticks since boot; None if there is none or it cannot be told."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def read_holder(path: Path) -> dict[str, Any] | None:
    """What a lock file says; None if it is empty. Damaged ones say nothing that could be believed: `InputError`."""
    raw = read_capped(path, limit_bytes=_BYTES_MAX)
    if not raw.strip():
        return None
    holder = parse_object(raw, where=str(path))
    if type(holder.get("process")) is not int or not isinstance(holder.get("host"), str):
        raise InputError(f"{path}: does not say which process on which host")
    return holder


def describe(holder: dict[str, Any]) -> str:
    """`process 12 on host`, safe for a terminal."""
    host = holder["host"] if holder["host"].replace("-", "").replace(".", "").isalnum() else shown(holder["host"])
    return f"process {holder['process']} on {host}"


def is_elsewhere(holder: dict[str, Any]) -> bool:
    """True for another host: nobody here can know whether that process lives."""
    return holder["host"] != os.uname().nodename


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this host still runs: same boot, same number, begun at the same time."""
    if is_elsewhere(holder) or holder.get("boot") != boot_id():
        return False
    return holder.get("started") is not None and started(holder["process"]) == holder["started"]


def take(path: Path, *, what: str, take_lock: bool = False) -> int | None:
    """A descriptor that holds the lock file `path`, None if the file was removed meanwhile; `UsageError` if held."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path.parent}: {_who(path)} is working on {what}; {_WAIT}") from None
        except OSError as error:  # a filesystem without locks: what is written down must do
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise
        if not _is_still(path, descriptor):
            os.close(descriptor)
            return None
        _refuse_holder(path, what, take_lock)
        _write(descriptor, json.dumps(identity()).encode())
    except BaseException:
        _close(descriptor)
        raise
    return descriptor


def release(descriptor: int) -> None:
    """Ends the lock and leaves an empty record: nobody works here."""
    with contextlib.suppress(OSError):  # on a full disk the record stays, and its process is gone
        _write(descriptor, b"")
    os.close(descriptor)


_WAIT = "wait for it, stop it, or choose another --out"


def _refuse_holder(path: Path, what: str, take_lock: bool) -> None:
    """The kernel gave us the lock; what is written down may still name another process."""
    if take_lock:
        return
    holder = read_holder_or_none(path)  # nothing: torn by a crash of the process that wrote it
    if holder is None or holder["process"] == os.getpid():
        return
    if is_elsewhere(holder):
        raise UsageError(
            f"{path.parent}: {describe(holder)} was working on {what}, and nobody here can tell whether it still is; "
            f"look there, {_WAIT}; if that process is gone, add --take-lock"
        )
    if is_alive(holder):
        raise UsageError(
            f"{path.parent}: {describe(holder)} is working on {what}, although the lock is free (locks do not work on "
            f"this filesystem); {_WAIT}"
        )


def read_holder_or_none(path: Path) -> dict[str, Any] | None:
    """What a lock file says, nothing if it is damaged."""
    try:
        return read_holder(path)
    except InputError:
        return None


def _who(path: Path) -> str:
    holder = read_holder_or_none(path)
    return "another process" if holder is None else describe(holder)


def _write(descriptor: int, raw: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, raw, 0)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` names the opened file: a lock on a file that was removed meanwhile protects nothing."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
