"""Whether OUT may and can be written: refused in seconds what would fail or destroy something after hours."""

import errno
import os
import secrets
import shutil
import stat
from pathlib import Path

from spectrim.errors import ResourceError, UsageError
from spectrim.store.disk import ADVICE, as_resource_error, fsync_folder, gigabytes

# Files, journals and the filesystem's own tables come on top of the weights.
SPACE_PERCENT = 110
# A mark that the folder is a model, so that a slip like `--out ~ --overwrite` deletes nothing.
_MODEL_MARKS = ("manifest.json", "config.json")
_CHOOSE = "choose another --out"


def preflight(out: Path, *, source: Path | None, overwrite: bool, bytes_needed: int) -> None:
    """Refuses an `out` that cannot or must not be written. Creates missing parent folders."""
    out = absolute(out)
    if source is not None:
        _refuse_source(out, Path(source))
    refuse_existing(out, overwrite=overwrite)
    if overwrite:
        _refuse_foreign_folder(out)
    ancestor = _existing_ancestor(out.parent)
    _refuse_small_disk(ancestor, out, bytes_needed)
    _create_parents(out, ancestor)
    # Making a partial folder is the only sure test of permission, quota and length of the name.
    os.rmdir(create_partial(out))


def absolute(out: Path) -> Path:
    """`out` without dots, links kept: a link at OUT must be seen as a link."""
    return Path(os.path.abspath(out))


def _refuse_source(out: Path, source: Path) -> None:
    real_out, real_source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if real_out == real_source or _same_place(real_out, real_source):
        raise UsageError(f"{out}: is the source model itself, which is never changed; {_CHOOSE}")
    if _is_within(real_out, real_source):
        raise UsageError(f"{out}: lies inside the source model {source}; {_CHOOSE}")
    if _is_within(real_source, real_out):
        raise UsageError(f"{out}: contains the source model {source}; {_CHOOSE}")


def _same_place(one: Path, other: Path) -> bool:
    """By device and inode: bind mounts and case-insensitive disks give one folder two names."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except (OSError, ValueError):
        return False


def _is_within(inner: Path, outer: Path) -> bool:
    return inner.is_relative_to(outer) or any(_same_place(parent, outer) for parent in inner.parents)


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuses links and mount points always, and files and filled folders without `overwrite`."""
    try:
        is_link = stat.S_ISLNK(os.lstat(out).st_mode)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a parent that is no folder, or may not be entered; a name too long
        if isinstance(error, ValueError) or error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return  # told with its own advice when the parents are looked at
        raise as_resource_error(error, out) from error
    if is_link:
        raise UsageError(f"{out}: is a link to {os.readlink(out)}; give the real path as --out")
    if os.path.ismount(out):
        raise UsageError(
            f"{out}: is a mount point, which cannot be replaced; use a folder in it: --out {out / 'model'}"
        )
    if not os.path.lexists(out) or overwrite:
        return
    num_entries = len(_entries(out)) if out.is_dir() else 0
    if num_entries or not out.is_dir():
        what = f"and holds {num_entries} entries" if num_entries else "and is not a folder"
        raise UsageError(f"{out}: exists {what}; {_CHOOSE}, or add --overwrite to replace it")


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise as_resource_error(error, folder) from error


def _refuse_foreign_folder(out: Path) -> None:
    entries = _entries(out) if out.is_dir() else []
    if entries and not any(mark in entries for mark in _MODEL_MARKS):
        raise UsageError(
            f"{out}: --overwrite replaces models only, and this folder of {len(entries)} entries has no "
            f"{' or '.join(_MODEL_MARKS)}; {_CHOOSE}, or delete the folder yourself"
        )


def _existing_ancestor(folder: Path) -> Path:
    ancestor = folder
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ResourceError(f"{ancestor}: is not a folder, so nothing can be written in it; {_CHOOSE}")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ResourceError(f"{ancestor}: cannot be written; give yourself permission or {_CHOOSE}")
    return ancestor


def _refuse_small_disk(ancestor: Path, out: Path, bytes_needed: int) -> None:
    needed, free = with_margin(bytes_needed), shutil.disk_usage(ancestor).free
    if free < needed:
        raise ResourceError(
            f"{out}: needs {gigabytes(needed)} on this disk, {gigabytes(free)} are free; free some space or {_CHOOSE}"
        )


def with_margin(num_bytes: int) -> int:
    """What must be free for weights of so many bytes."""
    return num_bytes * SPACE_PERCENT // 100


def _create_parents(out: Path, ancestor: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.parent
        while folder != ancestor:
            folder = folder.parent
            fsync_folder(folder)
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, f"create it (mkdir -p) or {_CHOOSE}")
        raise ResourceError(
            f"{out.parent}: cannot be created: {error.strerror} (errno {error.errno}); {advice}"
        ) from error


def create_partial(out: Path) -> Path:
    """A new `OUT.partial-<8 hex>` beside `out`, this run's own: an existing one is never shared."""
    while True:
        partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            advice = "use a shorter --out" if error.errno == errno.ENAMETOOLONG else None
            advice = advice or ADVICE.get(error.errno or 0, _CHOOSE)
            raise ResourceError(f"{partial}: cannot be created: {error.strerror}; {advice}") from error
        return partial
