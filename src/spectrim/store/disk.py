"""The few disk operations that safe publishing rests on, and what the system's errors mean for a user."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from pathlib import Path

from spectrim.errors import ResourceError
from spectrim.store.points import point

ADVICE = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "your quota on this disk is used up; free some space or choose another --out",
    errno.EFBIG: "the filesystem or `ulimit -f` allows no file this large; choose another --out or raise it",
    errno.EIO: "the disk or network mount reports a fault; choose another --out and check the disk",
    errno.EROFS: "the disk is mounted read-only; choose another --out",
    errno.EACCES: "give yourself permission or choose another --out",
    errno.EXDEV: "the two names are on different disks, which no rename bridges; choose another --out",
}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def gigabytes(num_bytes: int) -> str:
    """`1.50 GB (1,500,000,000 bytes)`."""
    return f"{num_bytes / 1e9:.2f} GB ({num_bytes:,} bytes)"


def system_errno(error: BaseException) -> int | None:
    """The system's error number. safetensors (Rust) raises a type of its own with the number in its text."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return None


def as_resource_error(
    error: BaseException, path: Path, removed_bytes: int | None = None, needed_bytes: int = 0
) -> ResourceError:
    """What `error` means for a user; `removed_bytes` is what had been written in `path` until then.

    `needed_bytes` is about what all of it takes, where that is known.
    """
    number = system_errno(error) or 0
    where = error.filename if isinstance(error, OSError) and error.filename else path
    after = "" if removed_bytes is None else f" after {gigabytes(removed_bytes)} in {path.name}, now removed"
    if needed_bytes and number == errno.ENOSPC:
        after += f"; all of it takes about {gigabytes(needed_bytes)}"
    advice = ADVICE.get(number, "check the disk")
    return ResourceError(f"{where}: {os.strerror(number)} (errno {number}){after}; {advice}")


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`. Never raises: it feeds messages while another error is under way."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def seal(folder: Path) -> None:
    """Umask-correct permissions on everything below `folder`, then all of it on disk, leaves first."""
    # mkdir applied the umask for us; asking os.umask() would change it for other threads for a moment.
    folder_mode = stat.S_IMODE(os.stat(folder).st_mode)
    for where, folders, names in os.walk(folder, topdown=False):
        for name in names + folders:
            path = os.path.join(where, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RuntimeError(f"bug: {path} is not a regular file; results hold no links")
            # temporary files are born 0600, and safetensors writes through them
            os.chmod(path, folder_mode if stat.S_ISDIR(mode) else folder_mode & 0o666)
        for name in names:
            _fsync(os.path.join(where, name), os.O_RDONLY)
        fsync_folder(Path(where))


def _fsync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)  # a failure is final: the kernel may have dropped the pages, a retry would lie
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Makes the bytes of a file durable."""
    _fsync(str(path), os.O_RDONLY)


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    try:
        _fsync(str(folder), os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network mounts cannot sync a folder and say so with EINVAL
            raise


def hold_folder(folder: Path) -> int:
    """A descriptor whose lock says, while it is open, that a process works in `folder`, under whatever name."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    with contextlib.suppress(OSError):  # not every filesystem locks folders
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_held(path: Path) -> bool:
    """Whether a process of this host holds the kernel's lock of a file, or of a folder that it works in."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one atomic step; False where there is no such call (not Linux, old filesystems)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def swap_by_renames(new: Path, out: Path) -> None:
    """Where there is no exchange. A kill between the renames leaves the old result under its aside name."""
    aside = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    os.rename(out, aside)
    point("old-set-aside")
    try:
        os.rename(new, out)
    except BaseException:
        os.rename(aside, out)
        raise
    os.rename(aside, new)  # now as after an exchange: the old result has the new one's former name


def remove(path: Path) -> bool:
    """Whether `path` is gone. Never raises: another error may be under way and must arrive unchanged."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return not os.path.lexists(path)
