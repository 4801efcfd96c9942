"""What runs leave beside their outputs when they are killed: found by name, told apart from work under way, removed.

    OUT.resume            the state of a run; the same command goes on from it
    OUT.partial-XXXXXXXX  a result that was being written, or, after `--overwrite`, the old one that was replaced
    OUT.old-XXXXXXXX      the old result, set aside for a moment where a filesystem has no atomic exchange

Nothing here is removed that a living process works in, and nothing that holds what spectrim does not write. What a dead
run alone could use (scratch files of `--low-memory`, writes that were not finished) goes although its states stay.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spectrim.errors import InputError, ResourceError, UsageError
from spectrim.store import disk, lock
from spectrim.store.lock import LOCK
from spectrim.store.state import read_step
from spectrim.store.target import absolute
from spectrim.store.work import COMMAND, SUFFIX, WorkFolder, locked, read_command, refuse_foreign

Kind = Literal["resume", "partial", "old"]
Part = Literal["folder", "scratch files"]
_NAME = re.compile(rf"(?P<out>.+?)(?:(?P<resume>{re.escape(SUFFIX)})|\.(?P<kind>partial|old)-[0-9a-f]{{8}})", re.DOTALL)
_TASK = re.compile(r"\.shard-\d+-of-\d+$")
"""Behind the name of an output: that of a task of a job array (shard.py), whose sums are for this output."""
_RESULT_KINDS = "safetensors|json|yaml|md|html|txt|jinja|svg|model|py|onnx|data"
_RESULT_FILE = re.compile(rf"[A-Za-z0-9._-]+\.({_RESULT_KINDS})(\.[a-z0-9]+)?|LICENSE|\.tmp\w+")


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One folder that a run left behind or is working in."""

    path: Path
    kind: Kind
    out: Path
    holder: str | None  # the process that works in it, in words; None: nobody does
    nbytes: int
    age_s: float  # since the folder was last changed
    states: list[tuple[str, int]] = field(default_factory=list)  # (stage, step), the newest last
    words: list[str] | None = None  # of the command that goes on, after `spectrim`
    folder: str | None = None  # in which that command was typed
    scratch_bytes: int = 0  # of `nbytes`: files that only the run that wrote them could use
    problem: str | None = None  # why it is not removed by us, or what cannot be read in it

    @property
    def whole(self) -> Path:
        """`out`; of a task of a job array the output that its sums are for."""
        return _whole(self.out)

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "out": str(self.out),
            "holder": self.holder,
            "bytes": self.nbytes,
            "seconds_old": round(self.age_s),
            "states": [{"stage": stage, "step": step} for stage, step in self.states],
            "command": self.words,
            "command_folder": self.folder,
            "scratch_bytes": self.scratch_bytes,
            "problem": self.problem,
        }


def find_leftovers(where: Path) -> list[Leftover]:
    """Those in the folder `where`, and those of an output `where` beside it (which need not exist), shards included."""
    where = absolute(where)
    found = [*_named(where, None), *_named(where.parent, where.name)]
    if not found and not os.path.lexists(where):
        raise UsageError(f"{where}: no such folder, and no run has left anything of that name")
    return sorted(found, key=lambda leftover: leftover.path)


def _named(folder: Path, out: str | None) -> Iterator[Leftover]:
    """Folders in `folder` that are named like ours, of one output or of all."""
    try:
        names = os.listdir(folder) if folder.is_dir() else []
    except OSError as error:
        raise disk.as_resource_error(error, folder) from error
    for name in names:
        match = _NAME.fullmatch(name)
        path = folder / name
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if out is not None and out not in (match["out"], _TASK.sub("", match["out"])):
            continue
        kind: Kind = "resume" if match["resume"] else "old" if match["kind"] == "old" else "partial"
        target = folder / match["out"]
        common: dict[str, Any] = {
            "path": path, "kind": kind, "out": target, "nbytes": disk.tree_bytes(path),
            "age_s": max(0.0, time.time() - _changed(path)),
        }  # fmt: skip
        yield _resume(common) if kind == "resume" else _result(common)


def _resume(common: dict[str, Any]) -> Leftover:
    path: Path = common["path"]
    try:
        refuse_foreign(path)
        work = WorkFolder(path)
        states = sorted((_changed(state), *read_step(state)) for state in work.states())
        words, folder = read_command(path) if os.path.lexists(path / COMMAND) else (None, None)
        scratch = sum(map(_size, work.unfinished()))
        holder = _holder(path / LOCK) or _merging(common["out"])
    except (InputError, UsageError) as error:
        return Leftover(**common, holder=None, problem=str(error))
    told = [(stage, step) for _, stage, step in states]
    return Leftover(**common, holder=holder, states=told, words=words, folder=folder, scratch_bytes=scratch)


def _merging(out: Path) -> str | None:
    """Who works on the output that a task's sums are for, in words: a merge that is stopped needs them again."""
    whole = _whole(out)
    return None if whole == out else _holder(whole.with_name(f"{whole.name}{SUFFIX}") / LOCK)


def _whole(out: Path) -> Path:
    """The output of a job array, of the name of one of its tasks too."""
    return out.with_name(_TASK.sub("", out.name))


def _result(common: dict[str, Any]) -> Leftover:
    path, out = common["path"], common["out"]
    work = out.with_name(f"{out.name}{SUFFIX}")
    try:
        holder = "a living process" if disk.is_held(path) else None
        if holder is None and work.is_dir() and not work.is_symlink():
            # Where folders cannot be locked: a run on the same output may be the one that writes here.
            holder = _holder(work / LOCK)
        strange = [name for name in os.listdir(path) if not _is_ours(path / name)]
    except (InputError, OSError) as error:
        return Leftover(**common, holder=None, problem=str(error))
    problem = f"holds {strange[0]!r}, which spectrim does not write" if strange else None
    if common["kind"] == "old" and not os.path.lexists(out):
        problem = f"is the only copy of {out}: put it back with `mv`"
    return Leftover(**common, holder=holder, problem=problem)


def _is_ours(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and _RESULT_FILE.fullmatch(path.name) is not None


def _holder(path: Path) -> str | None:
    """Who holds a lock file, in words."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        raise InputError(f"{path}: is a link")
    found = lock.read_holder_or_none(path)
    if disk.is_held(path):
        return "a living process" if found is None else lock.describe(found)
    if found is not None and (lock.is_elsewhere(found) or lock.is_alive(found)):
        return lock.describe(found)
    return None


def _changed(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:  # a living run has let it go
        return 0


def is_named(leftover: Leftover, where: Path) -> bool:
    """Whether `where` is the very output that it is of, or of which it is a task, and not a folder of outputs."""
    return absolute(where) in (leftover.out, leftover.whole)


def removable(leftover: Leftover, *, states: bool) -> Part | None:
    """What `clean` takes of it: nothing of what a process holds, or that has something strange in it; states and old
    results only when asked for.
    """
    if leftover.holder is not None or leftover.problem is not None:
        return None
    if states or leftover.kind == "partial":
        return "folder"
    return "scratch files" if leftover.scratch_bytes else None


def remove_leftover(leftover: Leftover, part: Part = "folder") -> None:
    """Removes it, or its scratch files alone, unless a process has taken it up since it was found."""
    if leftover.kind == "resume":
        with locked(leftover.out) as folder:  # which removes the scratch files
            empty = [path.name for path in folder.path.iterdir()] == [LOCK]  # its run has ended just now
            gone = folder.remove() if part == "folder" or empty else not folder.unfinished()
    else:
        if disk.is_held(leftover.path):
            raise UsageError(f"{leftover.path}: a process works in it now; wait for it")
        gone = disk.remove(leftover.path)
    if not gone:
        raise ResourceError(f"{leftover.path}: cannot be removed; check its permissions and remove it yourself")
