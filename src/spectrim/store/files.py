"""Opening files that strangers wrote: regular files only, links only inside allowed roots, size known first.

Nothing here blocks on a pipe or a device, and what was checked is what is read: the opened handle must be the
file that was looked at.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from spectrim.errors import InputError
from spectrim.store.limits import NAMED_IN_MESSAGE_MAX

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

LFS_MAGIC = b"version https://git-lfs"

_FOREIGN = (
    (
        LFS_MAGIC,
        "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder or download it again",
    ),
    (b"GGUF", "a GGUF file (llama.cpp); use the safetensors folder that it was converted from"),
    (b"PK\x03\x04", "a zip archive, probably a pickled PyTorch checkpoint, which spectrim never opens"),
    (b"\x80\x02", "a pickle, which can run code and which spectrim never opens"),
    (b"\x80\x04", "a pickle, which can run code and which spectrim never opens"),
    (b"\x89HDF", "an HDF5 file (Keras or TensorFlow); use the safetensors folder of the same model"),
    (b"<!DOCTYPE", "a web page; the download was refused or needs a login, download it again"),
    (b"<html", "a web page; the download was refused or needs a login, download it again"),
)


def foreign_kind(head: bytes) -> str | None:
    """What a file is when its first bytes belong to another format, with advice; None when unknown."""
    return next((what for magic, what in _FOREIGN if head.startswith(magic)), None)


def shown(text: str) -> str:
    """A stranger's text made safe for a terminal and a log: quoted, escaped, at most about 80 characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def listed(lines: Iterable[str]) -> str:
    """The first few of many findings, one a line, then how many more there are."""
    every = list(lines)
    more = len(every) - NAMED_IN_MESSAGE_MAX
    tail = [f"and {more} more"] if more > 0 else []
    return "\n  " + "\n  ".join(every[:NAMED_IN_MESSAGE_MAX] + tail)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """The open file and its size. Whatever goes wrong, also while reading, is an `InputError` naming it."""
    try:
        with os.fdopen(_open_checked(path), "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}") from error


def _open_checked(path: Path) -> int:
    before = os.stat(path)
    _require_regular(path, before)
    # O_NONBLOCK: should a pipe take the file's place between the two calls, open must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    after = os.fstat(descriptor)
    if not os.path.samestat(before, after):
        os.close(descriptor)
        raise InputError(f"{path}: was replaced by another file while it was being opened; run again")
    return descriptor


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise InputError(f"{path}: is {kind}, not a regular file; put the real file in its place")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return f"{error}; choose another path"
    advice = {
        errno.ENOENT: "check the path or download it again",
        errno.EACCES: "give yourself read permission (chmod u+r)",
        errno.ELOOP: "the links lead in a circle; replace them by the file",
        errno.EIO: "the disk or network mount reports a fault; copy the folder elsewhere and check it",
    }.get(error.errno or 0, "check the file and its disk")
    return f"{error.strerror or error} (errno {error.errno}); {advice}"


def read_capped(path: Path, *, limit_bytes: int) -> bytes:
    """All bytes of a regular file of at most `limit_bytes`; the size is checked before anything is read."""
    with open_regular(path) as (file, size):
        if size > limit_bytes:
            raise InputError(f"{path}: {size:,} bytes, allowed {limit_bytes:,}; is this the right file?")
        raw = file.read(size + 1)
    if len(raw) != size:
        raise InputError(f"{path}: changed while it was read ({size:,} bytes, then {len(raw):,}); run again")
    return raw


def read_fully(file: BufferedReader, into: memoryview) -> int:
    """Fills a buffer however little each read gives (network mounts, signals); less only at the end of the file."""
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            break
        done += count
    return done


Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""


def stamp_of(path: Path) -> Stamp:
    """What tells a file from one that took its place or was written to since."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_stays_inside(path: Path, folder: Path) -> None:
    """Refuses a file that links lead out of `folder`, unless to the blobs of the same Hugging Face cache."""
    try:
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}") from error
    if not any(real.is_relative_to(root) for root in _allowed_roots(folder)):
        raise InputError(
            f"{path}: is a link to {real}, outside of the model folder; copy that file into the folder if you trust it"
        )


def _allowed_roots(folder: Path) -> list[Path]:
    real = Path(os.path.realpath(folder))
    roots = [real]
    # models--org--name/snapshots/<commit>/file links to models--org--name/blobs/<hash>. `blobs` is taken by
    # name and not resolved, so a `blobs` that is itself a link elsewhere opens no door.
    for snapshot in (real, *real.parents):
        if snapshot.parent.name == "snapshots":
            roots.append(snapshot.parent.parent / "blobs")
            break
    return roots
