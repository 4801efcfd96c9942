"""Writing a result so that OUT is, at every moment, absent, what it was before, or complete.

1. `preflight` refuses in seconds what would fail after hours.
2. `staged` gives a folder beside the target; everything is written there.
3. On a clean exit every file and folder is fsynced, then one rename (or one atomic exchange) publishes it.
4. On any exception the folder is removed. A SIGKILL leaves at most an `OUT.partial-*` folder, never a partial OUT.
"""

import ctypes
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectrim.errors import ResourceError, UsageError

_log = logging.getLogger(__name__)

# Files, journals and the filesystem's own tables come on top of the weights.
SPACE_FACTOR = 1.1

_ADVICE = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "your quota on this disk is used up; free some space or choose another --out",
    errno.EFBIG: "the filesystem or `ulimit -f` does not allow files this large; raise it or choose another --out",
    errno.EIO: "the disk or network mount reports a fault; choose another --out and check the disk",
    errno.EROFS: "the disk is mounted read-only; choose another --out",
    errno.EACCES: "give yourself write permission or choose another --out",
}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# A mark that the folder is a model, so that a slip like `--out ~ --overwrite` deletes nothing.
_MODEL_MARKS = ("manifest.json", "config.json")


def point(name: str) -> None:
    """A named moment of publishing. Does nothing; tests replace it to kill the process exactly there."""


def preflight(out: Path, *, source: Path | None, overwrite: bool, bytes_needed: int) -> None:
    """Refuses an `out` that cannot or must not be written, before any work. Creates missing parent folders."""
    out = _absolute(out)
    if source is not None:
        _refuse_source(out, source)
    _refuse_existing(out, overwrite=overwrite)
    if overwrite:
        _refuse_foreign_folder(out)
    ancestor = _existing_ancestor(out.parent)
    _refuse_small_disk(ancestor, out, bytes_needed)
    _create_parents(out, ancestor)
    _probe(out)


def _absolute(out: Path) -> Path:
    # not realpath: a link at OUT must be seen as a link
    return Path(os.path.abspath(out))


def _same_place(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except (OSError, ValueError):
        return False


def _refuse_source(out: Path, source: Path) -> None:
    real_out, real_source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    # by name and by device and inode: bind mounts and case-insensitive disks give one folder two names
    if real_out == real_source or _same_place(real_out, real_source):
        raise UsageError(
            f"{out}: is the source model itself; the source is never changed, choose another --out"
        )
    if _is_within(real_out, real_source):
        raise UsageError(f"{out}: lies inside the source model {source}; choose an --out outside of it")
    if _is_within(real_source, real_out):
        raise UsageError(f"{out}: contains the source model {source}; choose an --out that does not")


def _is_within(inner: Path, outer: Path) -> bool:
    return inner.is_relative_to(outer) or any(_same_place(parent, outer) for parent in inner.parents)


def _refuse_existing(out: Path, *, overwrite: bool) -> None:
    if out.is_symlink():
        raise UsageError(f"{out}: is a link to {os.readlink(out)}; give the real path as --out")
    if os.path.ismount(out):
        raise UsageError(
            f"{out}: is a mount point, which cannot be replaced; use a folder in it: --out {out / 'model'}"
        )
    if not os.path.lexists(out) or overwrite:
        return
    if not out.is_dir():
        raise UsageError(
            f"{out}: exists and is not a folder; choose another --out, or --overwrite to replace it"
        )
    num_entries = len(_entries(out))
    if num_entries:
        raise UsageError(
            f"{out}: exists and holds {num_entries} entries; choose another --out, or --overwrite to replace it"
        )


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise _as_resource_error(error, folder) from error


def _refuse_foreign_folder(out: Path) -> None:
    if not out.is_dir():
        return
    entries = _entries(out)
    if entries and not any(mark in entries for mark in _MODEL_MARKS):
        raise UsageError(
            f"{out}: --overwrite replaces models only, and this folder of {len(entries)} entries has no "
            f"{' or '.join(_MODEL_MARKS)}; choose another --out, or delete the folder yourself"
        )


def _existing_ancestor(folder: Path) -> Path:
    ancestor = folder
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ResourceError(
            f"{ancestor}: is not a folder, so nothing can be written in it; choose another --out"
        )
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{ancestor}: cannot be written; give yourself permission or choose another --out"
        )
    return ancestor


def _refuse_small_disk(ancestor: Path, out: Path, bytes_needed: int) -> None:
    needed, free = int(bytes_needed * SPACE_FACTOR), shutil.disk_usage(ancestor).free
    if free < needed:
        raise ResourceError(
            f"{out}: needs {_amount(needed)} on this disk, {_amount(free)} are free; free some space or choose "
            "another --out"
        )


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB ({num_bytes:,} bytes)"


def _create_parents(out: Path, ancestor: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.parent
        while folder != ancestor:
            folder = folder.parent
            _fsync_folder(folder)
    except OSError as error:
        raise ResourceError(
            f"{out.parent}: cannot be created: {error.strerror}; create it (mkdir -p) or choose another --out"
        ) from error


def _probe(out: Path) -> None:
    """Makes and removes a partial folder: the only sure test of permission, quota and length of the name."""
    os.rmdir(_create_partial(out))


def _create_partial(out: Path) -> Path:
    while True:
        partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir()
        except FileExistsError:
            continue  # another run's; never shared
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "choose another --out")
            raise ResourceError(f"{partial}: cannot be created: {error.strerror}; {advice}") from error
        return partial


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = _absolute(out)
    _refuse_existing(out, overwrite=overwrite)
    partial = _create_partial(out)
    try:
        point("staged")
        yield partial
        _seal(partial)
        point("before-publish")
        _publish(partial, out, overwrite=overwrite)
        _fsync_folder(out.parent)
        point("after-publish")
        _remove_old(partial)
    except BaseException as error:
        written = _tree_bytes(partial)
        _remove(partial)
        if _system_errno(error) in _ADVICE:
            raise _as_resource_error(error, partial, written) from error
        raise


def _system_errno(error: BaseException) -> int | None:
    """The operating system's error number. safetensors (Rust) raises its own type and has it in the text only."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return None


def _as_resource_error(error: BaseException, path: Path, written: int | None = None) -> ResourceError:
    number = _system_errno(error) or 0
    where = error.filename if isinstance(error, OSError) and error.filename else path
    after = "" if written is None else f" after {_amount(written)} in {path.name}, which was removed"
    advice = _ADVICE.get(number, "check the disk")
    return ResourceError(f"{where}: {os.strerror(number)} (errno {number}){after}; {advice}")


def _tree_bytes(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue  # only a figure for a message; the error that is under way matters more
    return total


def _seal(partial: Path) -> None:
    """Umask-correct permissions, then everything on disk, leaves first."""
    # mkdir applied the umask for us; asking os.umask() would change it for other threads for a moment.
    folder_mode = stat.S_IMODE(os.stat(partial).st_mode)
    for where, folders, names in os.walk(partial, topdown=False):
        for name in names + folders:
            path = os.path.join(where, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RuntimeError(f"bug: {path} is not a regular file; results hold no links")
            # temporary files are born 0600, and safetensors writes through them
            os.chmod(path, folder_mode if stat.S_ISDIR(mode) else folder_mode & 0o666)
        for name in names:
            _fsync(os.path.join(where, name), os.O_RDONLY)
        _fsync_folder(Path(where))


def _fsync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(
            descriptor
        )  # a failure is fatal: the kernel may have dropped the pages, a second try would lie
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    try:
        _fsync(str(folder), os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network mounts cannot sync a folder and say so with EINVAL
            raise


def _publish(partial: Path, out: Path, *, overwrite: bool) -> None:
    try:
        os.rename(partial, out)  # also replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not overwrite:
            raise UsageError(
                f"{out}: appeared while this run was under way; choose another --out, or --overwrite to replace it"
            ) from error
        if not _exchange(partial, out):
            _swap_by_renames(partial, out)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one atomic step; False where the system has no such call (not Linux, old filesystems)."""
    renameat2 = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    )
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _swap_by_renames(partial: Path, out: Path) -> None:
    """Where there is no exchange. A kill between the renames leaves the old result under its aside name."""
    aside = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    os.rename(out, aside)
    try:
        os.rename(partial, out)
    except BaseException:
        os.rename(aside, out)
        raise
    os.rename(aside, partial)  # now as after an exchange: the old result has the partial's name


def _remove_old(partial: Path) -> None:
    if os.path.lexists(partial) and not _remove(partial):
        _log.warning("%s: is the replaced old result and could not be removed; remove it yourself", partial)


def _remove(partial: Path) -> bool:
    """Removes without ever raising: another error may be under way and must reach the user unchanged."""
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        try:
            os.unlink(partial)
        except OSError:
            pass  # the answer below tells
    return not os.path.lexists(partial)


def write_json(path: Path, data: Any) -> None:
    """`data` as indented UTF-8 JSON, on disk when this returns. NaN and Infinity are refused: they are not JSON."""
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 with its own line ends, on disk when this returns."""
    with open(path, "wb") as file:
        try:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
