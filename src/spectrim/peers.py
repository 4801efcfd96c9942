"""How the processes of one run learn that one of them has failed: a board in the store, and a thread that watches.

A rank that fails writes on the board who it is and what happened, before it leaves. One that was killed cannot: the
others look whether its process lives (same host) or still counts up (other hosts), and write for it. The first entry
stands. Whoever then waits for that rank inside a collective, which on a GPU would wait for ever, is ended by its own
watching thread after a moment in which it may leave in order.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  documented there

from spectrim.errors import ResourceError

LOOK_EVERY_S = 0.25
SILENT_S = 60.0
"""A rank of another host that has not counted up for so long is taken for dead."""
LEAVE_WITHIN_S = 8.0
"""For a rank that hears of a failure. The launcher kills what is left after 30 s."""
_BOARD = "failed"


class Member(NamedTuple):
    """One process of the run."""

    rank: int
    host: str
    process: int
    began: int | None  # ticks since boot, which tell it from a later process of the same number

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class Failure(NamedTuple):
    """Who failed, and what is known of it."""

    rank: int
    who: str
    what: str
    exit_code: int
    by_signal: bool = False


class PeerFailed(ResourceError):
    """Another process of this run failed; this one stops because of it, with the same exit code."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.who} failed, so that all processes of this run stop: {failure.what}")
        self.failure = failure
        self.exit_code = failure.exit_code


def state_of_process(process: int) -> tuple[str, int] | None:
    """State letter and start of a process of this host; None if there is none, or where it cannot be told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def began(process: int) -> int | None:
    """When a process of this host began; None where it cannot be told."""
    found = state_of_process(process)
    return None if found is None else found[1]


def is_gone(member: Member) -> bool:
    """Whether a process of this host has ended, its parent's call for it or not; False where it cannot be told."""
    if member.began is None:
        return False
    found = state_of_process(member.process)
    return found is None or found[0] in "ZX" or found[1] != member.began


class Watch:
    """The thread that watches all others, over a connection to the store that nobody else uses."""

    def __init__(self, store: Store, own: Member, members: Sequence[Member]) -> None:
        self._store, self._own = store, own
        self._others = [member for member in members if member.rank != own.rank]
        self._stopped = threading.Event()
        self._heard = threading.Event()
        self._failure: Failure | None = None
        self._lock = threading.Lock()  # the store's connection takes one question at a time
        self._beats: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, name="spectrim-watch", daemon=True)
        self._thread.start()

    def failure(self, wait_s: float = 0.0) -> Failure | None:
        """The first that failed, as soon as it is known, at most after `wait_s`."""
        if wait_s:
            self._heard.wait(wait_s)
        return self._failure

    def tell(self, failure: Failure) -> Failure:
        """Put a failure on the board, unless one is there; returns the one that stands."""
        mine = json.dumps(failure)
        try:
            with self._lock:
                told = self._store.compare_set(_BOARD, "", mine).decode()
        except RuntimeError:  # the store has gone with the process that kept it
            told = mine
        return Failure(*json.loads(told or mine))

    def stop(self) -> None:
        """All is done."""
        self._stopped.set()
        self._thread.join(LOOK_EVERY_S * 8)

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(LOOK_EVERY_S):
            count += 1
            found = self._look(count)
            if found is not None:
                self._failure = found
                self._heard.set()
                self._end_if_stuck(found)
                return

    def _look(self, count: int) -> Failure | None:
        try:
            with self._lock:
                self._store.set(f"beat {self._own.rank}", str(count))
                if self._store.check([_BOARD]):
                    return Failure(*json.loads(self._store.get(_BOARD).decode()))
        except RuntimeError as error:
            keeper = self._others[0] if self._others[0].rank == 0 else self._own
            dead = next((member for member in self._others if is_gone(member)), keeper)
            return _died(dead, f"the store of this run does not answer any more ({_line(error)})")
        for member in self._others:
            if member.host == self._own.host and member.began is not None:
                if is_gone(member):
                    return self.tell(_died(member, "its process has ended without a word: it was killed, or crashed"))
            elif self._is_silent(member):
                return self.tell(_died(member, f"nothing was heard of it for {SILENT_S:.0f} s"))
        return None

    def _is_silent(self, member: Member) -> bool:
        """Whether the count of a rank of another host stands still."""
        now, key = time.monotonic(), f"beat {member.rank}"
        try:
            with self._lock:
                count = int(self._store.get(key)) if self._store.check([key]) else 0
        except RuntimeError:
            return False  # the next look tells
        before, since = self._beats.get(member.rank, (-1, now))
        if count != before:
            self._beats[member.rank] = (count, now)
            return False
        return now - since > SILENT_S

    def _end_if_stuck(self, failure: Failure) -> None:
        if failure.rank == self._own.rank or self._stopped.wait(LEAVE_WITHIN_S):
            return
        sys.stderr.write(f"rank {self._own.rank}: error: {PeerFailed(failure)}\n")
        sys.stderr.flush()
        os._exit(failure.exit_code)


def _died(member: Member, how: str) -> Failure:
    return Failure(member.rank, str(member), how, ResourceError.exit_code)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
