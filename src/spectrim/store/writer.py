"""Writing a result so that OUT is, at every moment, absent, what it was before, or complete.

1. `preflight` refuses in seconds what would fail after hours.
2. `staged` gives a folder beside the target; everything is written there.
3. On a clean exit every file and folder is fsynced, then one rename (or one atomic exchange) publishes it.
4. On any exception the folder is removed. A SIGKILL leaves at most `OUT.partial-*`, never a partial OUT.
"""

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spectrim.errors import ResourceError, UsageError
from spectrim.store import disk
from spectrim.store.points import point
from spectrim.store.target import absolute, create_partial, preflight, refuse_existing

__all__ = ["preflight", "replace_text", "staged", "write_json", "write_text"]

_log = logging.getLogger(__name__)


@contextmanager
def staged(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` if the block ends well, and vanishes if it does not.

    `needed_bytes` is about what the result takes; a full disk's message says it.
    """
    out = absolute(out)
    refuse_existing(out, overwrite=overwrite)
    partial = create_partial(out)
    held = disk.hold_folder(partial)
    published = False
    try:
        point("staged")
        yield partial
        point("before-seal")
        disk.seal(partial)
        point("before-publish")
        _publish(partial, out, overwrite=overwrite)
        published = True
        point("renamed")
        disk.fsync_folder(out.parent)
        point("after-publish")
        _remove_replaced(partial)
        point("replaced-removed")
    except BaseException as error:
        removed_bytes = disk.tree_bytes(partial)
        disk.remove(partial)
        if published:
            error.add_note(f"{out}{COMPLETE}")
        if disk.system_errno(error) in disk.ADVICE:
            raise disk.as_resource_error(error, partial, removed_bytes, needed_bytes) from error
        raise
    finally:
        os.close(held)


COMPLETE = " is complete"
"""End of a note on an error that came after publishing: what is said of it must not be that nothing was."""


def _publish(partial: Path, out: Path, *, overwrite: bool) -> None:
    try:
        os.rename(partial, out)  # also replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not overwrite:
            raise UsageError(
                f"{out}: appeared while this run was under way; choose another --out, or add --overwrite to replace it"
            ) from error
        if not disk.exchange(partial, out):
            disk.swap_by_renames(partial, out)


def _remove_replaced(partial: Path) -> None:
    """After an exchange the old result has the partial's name; after a plain rename nothing has."""
    if not disk.remove(partial):
        _log.warning("%s: is the replaced old result and could not be removed; remove it yourself", partial)


def write_json(path: Path, data: Any) -> None:
    """`data` as indented UTF-8 JSON, on disk when this returns. NaN and Infinity are not JSON: refused."""
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 with its own line ends, on disk when this returns."""
    try:
        with open(path, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            point("text-written")
            os.fsync(file.fileno())
        point("text-synced")
    except OSError as error:
        # writes and syncs do not say which file; a full disk's message must
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str) -> None:
    """`text` as the file `path`, which is at every moment absent, what it was, or complete."""
    path = absolute(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_text(partial, text)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        reason = f"{error.strerror} (errno {error.errno})"
        raise ResourceError(f"{path}: cannot be written: {reason}; choose another place") from error
    disk.fsync_folder(path.parent)
