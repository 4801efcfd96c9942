"""A run goes on where a killed one stopped, when the same command is given again.

What engines save (sums over batches, spectra, scores, trained factors) lies in OUT.resume (store/work.py). It is
written every minute, at the end of a stage and on SIGINT, SIGTERM and SIGHUP, and is only taken up by a run that would
have come to the same state by itself: source, text, method, versions and device are compared first.
"""

import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from spectrim.engines.checkpoint import Saved
from spectrim.engines.couple import couple
from spectrim.engines.layerwise import decompose_all
from spectrim.engines.loop import train
from spectrim.engines.measure import Progress, add_up, measure
from spectrim.engines.newton import newton_scores
from spectrim.engines.parts import size_of
from spectrim.engines.propagate import propagate
from spectrim.errors import InputError, Interrupted, NumericalError, ResourceError, SpectrimError, UsageError
from spectrim.fingerprint import fingerprint
from spectrim.given import Given
from spectrim.linalg.fallback import Fallback, heard, recall, take_back
from spectrim.method import Method
from spectrim.models.load import Source
from spectrim.request import Request
from spectrim.store import disk
from spectrim.store.points import point
from spectrim.store.state import read_state, write_state
from spectrim.store.target import with_margin
from spectrim.store.work import WorkFolder, locked

SAVE_EVERY_S = 60.0
OVERHEAD = 30
"""A state that takes s seconds to write is written after 30 s of work at least: 3 % of the time, whatever its size."""
FALLBACKS = "fallbacks"
"""In the facts of a state: what did not go the usual way until it was saved, in this process and those before it."""
FIRST_RATE = 2e8
"""Bytes a second that are assumed to be hashed and written until it was measured."""
STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ASKING = (train, measure, add_up, couple, decompose_all, propagate, newton_scores)
"""What asks `due` after each of its steps, so that a signal can wait for the end of one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """How a run treats the state of an earlier one, and how often it saves its own."""

    save_every_s: float = SAVE_EVERY_S  # 0: after every step
    restart: bool = False  # discard the state that is there
    take_lock: bool = False  # also from a process on another host, of which nobody here knows whether it lives
    command: tuple[str, ...] = ()  # words after `spectrim`, for `spectrim resume`; empty: not from the command line
    fields: Mapping[str, Any] = field(default_factory=lambda: {"shards": 1})  # of the fingerprint, beside the request
    given: Given | None = None  # states that other runs have left for this one
    stays: bool = False  # the folder is what the run is for, and is there when it has ended


class Resume:
    """The `Checkpoint` of one run: loads and saves the state of its stages, and tells what it did."""

    def __init__(
        self,
        folder: WorkFolder,
        *,
        save_every_s: float = SAVE_EVERY_S,
        reserve_bytes: int = 0,
        progress: Progress | None = None,
        given: Given | None = None,
    ) -> None:
        self.folder = folder
        self._given = given
        self._foreign: set[str] = set()  # stages whose state came from there
        self.resumed: list[dict[str, Any]] = []  # {"stage", "step"} of every state that was taken up
        self.warnings: list[str] = []
        self._save_every_s = save_every_s
        self._reserve_bytes = reserve_bytes  # what the result will take on the same disk
        self._progress = progress
        self._last: float | None = None
        self._write_s, self._rate = 0.0, FIRST_RATE
        self._kept: tuple[str, int] | None = None  # the newest state that is on disk
        self._good: set[Path] = set()  # states that this run has taken up or written
        self._recalled: dict[Path, list[Fallback]] = {}  # what states that were taken up say of earlier processes
        self._owed: tuple[str, Saved] | None = None  # a state of an earlier stage that could not be written yet
        self._stop: int | None = None  # the signal that waits for the step to end

    def load(self, stage: str, *, optional: bool = False) -> Saved | None:
        """The state of a stage; None if there is none, or none that is what was saved (told, and begun anew)."""
        if self._last is None:
            self._last = time.monotonic()
        path = self.folder.state_path(stage)
        if not os.path.lexists(path):
            if (taken := self._taken(stage)) is not None:
                return taken
            if not optional:
                self._discard_later_stages(f"there is no state of {stage}")
            return None
        try:
            saved, earlier = without_fallbacks(path, Saved(*read_state(path)))
        except InputError as error:
            disk.remove(path)
            self._warn(f"{error}; {stage} starts anew, which costs time and changes no number")
            self._discard_later_stages(f"that of {stage} is lost")
            return None
        self._good.add(path)
        self._recalled.setdefault(path, []).extend(recall(earlier))
        self.resumed.append({"stage": stage, "step": saved.step})
        self._kept = (stage, saved.step)
        if self._progress is not None:
            self._progress(f"resumed at step {saved.step} of {stage}", 0, 1)
        return saved

    def _taken(self, stage: str) -> Saved | None:
        """What other runs have left."""
        found = None if self._given is None else self._given.load(stage, self.folder.claimed)
        if found is None:
            return None
        recall(found.fallbacks)
        self._foreign.add(stage)
        self.resumed += [told for told in found.resumed if told not in self.resumed]
        return found.saved

    def due(self) -> bool:
        """Whether a state should be saved now: a signal waits, or the last one is old enough."""
        wait_s = max(self._save_every_s, OVERHEAD * self._write_s) if self._save_every_s else 0.0
        return self._stop is not None or self._idle_s() >= wait_s

    def worth(self, nbytes: int) -> bool:
        """Whether so much is quickly written, measured by the time that it took to work out since the last state.

        Never sooner than states are asked for, so that it does not depend on the load what a short run leaves.
        """
        wait_s = max(OVERHEAD * nbytes / self._rate, self._save_every_s) if self._save_every_s else 0.0
        return self._stop is not None or self._idle_s() >= wait_s

    def _idle_s(self) -> float:
        if self._last is None:
            self._last = time.monotonic()
        return time.monotonic() - self._last

    def save(self, stage: str, saved: Saved, *, needed: bool = False) -> bool:
        """Put a state on disk. A disk that fails is told and costs no more: the older state is untouched and the run
        goes on. `Interrupted` when a signal waits for it.
        """
        began = time.monotonic()
        owed, self._owed = self._owed, None
        is_kept = False
        try:
            if owed is not None:
                self._write(*owed)
                owed = None
            self._write(stage, saved)
            self._kept, is_kept = (stage, saved.step), True
        except ResourceError as error:
            self._warn(f"step {saved.step} of {stage} could not be saved for resuming: {error}")
            # What later stages rest on is given once; without it their states would be worth nothing.
            self._owed = owed or ((stage, saved) if needed else None)
        self._last = time.monotonic()
        self._write_s = self._last - began
        nbytes = size_of(saved.tensors)
        if is_kept and nbytes > 1e6:  # of a small one the seconds are those of two fsyncs
            self._rate = nbytes / max(self._write_s, 1e-9)
        if not needed:  # the state that it is needed for comes at once
            self.leave_if_stopped()
        return is_kept

    def forget(self, *stages: str, why: str | None = None) -> None:
        """Remove states that others stand for, or (`why`) that turned out to be of no use.

        `InputError` if one of the latter came from other runs: what they measured is not measured again unasked.
        """
        if why is not None and self._foreign & {*stages}:
            raise InputError(f"{', '.join(stages)}: {why}, and it was measured by other runs, which must be done again")
        names = [stage.replace(" ", "-") for stage in stages]
        for path in self.folder.states():
            if not any(path.stem == name or path.stem.startswith(name + "-") for name in names):
                continue
            disk.remove(path)
            point("state-forgotten")
            self._good.discard(path)
            if why is not None:
                take_back(self._recalled.pop(path, ()))
                self._warn(f"{path}: discarded: {why}")
                self.resumed = [told for told in self.resumed if self.folder.state_path(told["stage"]) != path]

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While this is open, SIGINT, SIGTERM and SIGHUP wait for the step to end and its state to be saved.

        Only where the state will be asked for: in one of `ASKING`, or while one is being written. Elsewhere they stop
        at once. A signal that was ignored when the program started (nohup) stays so.
        """
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's affair
            yield
            return
        before = {n: signal.getsignal(n) for n in STOPPERS}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

        def stop(number: int, frame: FrameType | None) -> None:
            if is_running(frame, *ASKING, Resume.save):
                self._stop = number
                signal.signal(number, signal.SIG_DFL)  # a second signal ends at once
            else:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.leave_if_stopped()

    def where(self) -> str:
        """Which state is kept, in words."""
        if self._kept is None:
            return f"nothing was saved yet in {self.folder.path}"
        stage, step = self._kept
        return f"the state after step {step} of {stage} is kept in {self.folder.path}"

    def leave_if_stopped(self) -> None:
        """`Interrupted` if a signal came."""
        if self._stop is not None:
            raise Interrupted(f"stopped by {signal.Signals(self._stop).name}; {self.where()}", self._stop)

    def _write(self, stage: str, saved: Saved) -> None:
        path = self.folder.state_path(stage)
        self.folder.require_space(size_of(saved.tensors) + self._reserve_bytes)
        told = [list(fallback) for fallback in heard()]
        write_state(path, saved.step, saved.tensors, {**saved.facts, FALLBACKS: told})
        self._good.add(path)

    def _warn(self, message: str) -> None:
        _log.warning("warning: %s", message)
        self.warnings.append(message)

    def _discard_later_stages(self, why: str) -> None:
        """Stages load in the order they run: what is there beyond this run's own was built on what is not there."""
        for path in self.folder.states():
            if path not in self._good:
                self._warn(f"{path}: discarded, since {why}, on which it was built")
                disk.remove(path)


def without_fallbacks(path: Path, saved: Saved) -> tuple[Saved, list[Fallback]]:
    """A state as its stage saved it, and the fallbacks of the processes that led to it."""
    facts = dict(saved.facts)
    told = facts.pop(FALLBACKS, [])
    fits = isinstance(told, list) and all(
        isinstance(row, list) and len(row) == len(Fallback._fields) and all(isinstance(text, str) for text in row)
        for row in told
    )
    if not fits:
        raise InputError(f"{path}: {FALLBACKS} must be a list of {len(Fallback._fields)} texts each")
    return saved._replace(facts=facts), [Fallback(*row) for row in told]


def is_running(frame: FrameType | None, *functions: Callable[..., Any]) -> bool:
    """Whether `frame` is a call of one of `functions`, or was called by one at any depth."""
    codes = {function.__code__ for function in map(inspect.unwrap, functions)}
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


@contextmanager
def resumable(
    request: Request,
    method: Method,
    source: Source,
    out: Path,
    *,
    options: ResumeOptions,
    needs_bytes: int,
    progress: Progress | None = None,
) -> Iterator[Resume]:
    """The run's work folder, gone when the block ends well (unless it `stays`), or before anything is worth keeping.

    States leave room for the result, which needs `needs_bytes`.
    """
    if not options.save_every_s >= 0:
        raise UsageError(f"--save-every must be at least 0 seconds, got {options.save_every_s:g}")
    facts = {**fingerprint(request, method, source), **options.fields}
    with locked(out, restart=options.restart, take_lock=options.take_lock) as folder:
        folder.claim(facts)
        folder.record(options.command)
        resume = Resume(
            folder, save_every_s=options.save_every_s, reserve_bytes=with_margin(needs_bytes), progress=progress,
            given=options.given,
        )  # fmt: skip
        try:
            if options.given is not None:
                options.given.check(folder.claimed)
            yield resume
        except BaseException as error:
            if not folder.states():
                folder.remove()
            elif not isinstance(error, SpectrimError):
                error.add_note(resume.where())  # for a signal that did not wait
            elif not isinstance(error, Interrupted):
                error.args = (f"{error}. {_way_on(error, resume)}",)
            raise
        if options.given is not None:
            options.given.remove()
        if not options.stays and not folder.remove():
            _log.warning("%s: the result is published, this is left over and could not be removed", folder.path)


def _way_on(error: SpectrimError, resume: Resume) -> str:
    """What can be done with the state that is kept after an error."""
    where = resume.where()
    where = where[0].upper() + where[1:]
    if isinstance(error, NumericalError):
        return f"{where}: the same command ends at the same place; with other options start anew with --restart"
    return f"{where}: the same command goes on from there, --restart discards it"
